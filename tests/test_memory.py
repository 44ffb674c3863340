"""--accum auto finds the fewest passes that fit, on all processes alike, and leaves no trace; and a
run that is short of memory says what helps."""

import json
import pathlib

import numpy as np
import pytest
import torch

import train_sit
import train_vae
from bench import reproduce
from common import processes, training
from common.runs import load_checkpoint
from conftest import ROOT, VAE, read_metrics, refused, same_state, script, torchrun
from small_memory import SmallMemory
from study import paper


@pytest.fixture(scope="module")
def words(pictures, vfm_weights):
    """Stage 1 with a mapper and a discriminator, whose batch norms make the number of passes count.
    The adversarial loss begins at the second step."""
    data = ["--data", pictures, "--vfm-weights", vfm_weights]
    return [*VAE, *data, "--gan-start", 1, "--save-every", 2]


def same_run(a, b):
    """Whether two runs have the same log and the same state, bit for bit."""
    states = [load_checkpoint(folder, "cpu") for folder in (a, b)]
    parts = [[state[name] for name in ("net", "disc", "ema", "optimizer")] for state in states]
    same_log = read_metrics(f"{a}/metrics.jsonl") == read_metrics(f"{b}/metrics.jsonl")
    return same_log and same_state(*parts)


@pytest.mark.parametrize(
    ("count", "counts"),
    [(1, [1]), (8, [1, 2, 4, 8]), (9, [1, 3, 9]), (12, [1, 2, 4, 12]), (7, [1, 7])],
)
def test_numbers_of_passes_to_try(count, counts):
    assert training.pass_counts(count) == counts


def test_the_trial_leaves_no_trace(words, inside, capsys):
    """A run whose passes were found by trial is the one with the same number given, bit for bit:
    the trial, which fails twice and then runs, changes no weight, statistic or random generator."""
    script(train_vae, *words, "--steps", 4, "--accum", 4, "--out", "given")
    torch.manual_seed(5)
    with SmallMemory(largest=2) as memory:
        script(train_vae, *words, "--steps", 4, "--out", "found")
    # 8 pictures and 4 do not fit. Then two passes of the trial, and four of each step.
    assert memory.tried == [8, 4, 2, 2] + [2] * 16
    assert same_run("given", "found")
    printed = capsys.readouterr().out
    assert "--accum 4, the fewest passes that fit: 2 pictures a pass" in printed
    assert "batch 8 = 1 processes x 4 passes x 2" in printed


def test_a_resumed_run_keeps_its_passes_on_the_same_machine(words, inside, capsys):
    with SmallMemory(largest=4) as memory:
        script(train_vae, *words, "--steps", 2)
    assert memory.tried == [8, 4, 4] + [4] * 4
    with open("runs/vae/config.json") as file:
        arguments = json.load(file)["arguments"]
    assert arguments["accum"] == 2
    assert arguments["machine"]["memory"] == 10**6
    assert load_checkpoint("runs/vae", "cpu")["arguments"]["accum"] == 2

    # The same memory: it is not tried again, though more would fit now.
    with SmallMemory(largest=8) as memory:
        script(train_vae, *words, "--steps", 3)
    assert memory.tried == [4, 4]
    assert "--accum 2 as before" in capsys.readouterr().out

    # More memory.
    with SmallMemory(largest=8, memory=2 * 10**6) as memory:
        script(train_vae, *words, "--steps", 4)
    assert memory.tried == [8, 8]
    assert "--accum was 2 on another machine" in capsys.readouterr().out

    # A number that is given wins.
    with SmallMemory(largest=8, memory=2 * 10**6) as memory:
        script(train_vae, *words, "--steps", 5, "--accum", 4)
    assert memory.tried == [2] * 4


def test_two_processes_agree_on_the_passes_that_the_smaller_memory_holds(words, inside):
    """The first process holds all its 4 pictures, the second only 2: it fails before its first
    batch norm while the first process goes on, which must not wait for it there."""
    script(train_vae, *words, "--steps", 2, "--accum", 2, "--lr", "1e-4", "--out", "one")
    own = ["--steps", 2, "--lr", "1e-4", "--out", "two"]
    printed = torchrun(2, "tests/small_memory", "4,2", *words, *own, cwd=inside)
    assert "--accum 2, the fewest passes that fit: 2 pictures a pass" in printed
    one, two = (read_metrics(f"{folder}/metrics.jsonl") for folder in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)


def test_a_picture_that_does_not_fit_is_a_sentence(words, inside, capsys):
    with SmallMemory(largest=0):
        message = refused(capsys, train_vae, *words, "--steps", 1)
    assert "not even one picture a pass fits" in message
    assert "--grad-checkpoint" in message


def test_a_trial_takes_room_for_what_the_optimiser_will_need():
    """Its two moments, unless it has them, as in a run that is resumed."""
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    shapes = [tensor.shape for tensor in training.new_moments(optimizer)]
    assert shapes == [(2, 3), (2, 3), (2,), (2,)]
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert training.new_moments(optimizer) == []


def test_other_errors_of_the_trial_are_not_taken_for_a_lack_of_memory():
    optimizer = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters())

    def wrong(part):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        training.fits_memory([{}], wrong, optimizer, 8, torch.device("cpu"))
    assert processes.SyncBatchNorm.together


def test_on_a_cpu_auto_is_one_pass(words):
    for stage in (train_vae, train_sit):
        args = stage.parse_arguments([])
        assert args.accum == "auto"
        training.settle_passes(args, torch.device("cpu"), None, None, None, None)
        assert args.accum == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError("Unable to allocate 7.45 GiB for an array"),
    ],
)
def test_a_run_that_is_short_of_memory_says_what_helps(error, words, inside, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(train_vae, "build_networks", fail)
    capsys.readouterr()
    argv = ["train_vae.py", *map(str, words), "--steps", "1"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stop:
        processes.run_main(train_vae.main, training.FOR_LESS_MEMORY)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.count("train_vae.py: error:") == 1
    assert all(flag in printed for flag in ("--accum", "--grad-checkpoint", "--batch-size"))


# --------------------------------------------------------------------------------------------------
# What docs/reproduce.md states


def test_the_page_on_reproducing_states_what_its_command_prints(capsys):
    """Without the tables that take half a minute: those of memory and hours."""
    reproduce.print_network()
    reproduce.print_disk()
    page = pathlib.Path(ROOT, "docs", "reproduce.md").read_text()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10
    assert all(line in page for line in lines)
    for command in paper.commands("system", paper.TABLES["system"][0]):
        assert command in page


def test_memory_is_a_line_and_auto_is_its_first_number_of_passes_that_fits():
    line = reproduce.line_through((8, 10.0), (16, 18.0))
    assert line.at(0) == 2
    assert line.at(128) == 130
    assert reproduce.passes_that_fit(line, 128, 66 / (1 - training.SPARE)) == 2
    assert reproduce.passes_that_fit(line, 128, 66) == 4
    assert reproduce.passes_that_fit(line, 128, 2) is None
