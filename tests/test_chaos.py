"""The short form of tests/chaos.py: one kill of each program on one process. And the faults that the long one found, one by one."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from common import runs
from common.files import writing
from common.pictures import ImageSet, TrainingBatches
from common.runs import (
    Saver,
    list_checkpoints,
    load_checkpoint,
    lock,
    resumable_array,
    save_checkpoint,
)
import sample
import train_sit
import train_vae
from conftest import (
    ROOT,
    SIT,
    VAE,
    kill_all_in,
    processes_in,
    refused,
    same_state,
    script,
    start,
    torchrun,
    wait_for,
)


@pytest.mark.parametrize("program", ["vae", "sit", "sample"])
def test_killed_at_random_it_ends_as_if_it_had_not_been(program):
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "chaos.py")
    run = subprocess.run(
        [sys.executable, script, "1", "--only", program, "--processes", "1"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0 and "1 kills" in run.stdout, run.stdout + run.stderr


@pytest.fixture(scope="module")
def sit(pictures, tmp_path_factory):
    """Run folder of a SiT of one step, without REPA."""
    folder = tmp_path_factory.mktemp("sit")
    script(
        train_vae,
        *VAE,
        "--data",
        pictures,
        "--align",
        "none",
        "--gan",
        0,
        "--steps",
        1,
        "--out",
        folder / "vae",
    )
    script(
        train_sit,
        *SIT,
        "--data",
        pictures,
        "--repa",
        0,
        "--vae",
        folder / "vae",
        "--steps",
        1,
        "--out",
        folder / "sit",
    )
    return folder / "sit"


def test_a_kill_between_the_set_and_the_end_of_its_parts(sit, inside, capsys):
    """The set is whole, and a scheduler gives the same command again: it must not fail, and must leave no parts behind."""
    words = ["--sit", sit, "--num", 3, "--steps", 2, "--precision", "fp32", "--out", "set.npz"]
    script(sample, *words)
    whole = open("set.npz", "rb").read()
    os.close(lock("set.npz.parts"))
    script(sample, *words)
    assert open("set.npz", "rb").read() == whole and sorted(os.listdir()) == ["set.npz"]
    assert "already there, with other settings" in refused(capsys, sample, *words, "--seed", 1)
    np.savez("set.npz", arr_0=np.zeros(3))  # not ours
    assert "--overwrite replaces it" in refused(capsys, sample, *words)
    script(sample, *words, "--overwrite")
    assert len(np.load("set.npz")["arr_0"]) == 3 and sorted(os.listdir()) == ["set.npz"]


def test_half_a_file_of_a_killed_process_goes_when_it_is_written_again(inside):
    """A set, the list of files and the pictures in samples/ lie outside the folders that a run cleans when it locks them."""
    os.makedirs("a[1]")
    for name in ("a[1]/set.npz.123.tmp", "a[1]/set.npz.99999.tmp", "a[1]/other.npz.123.tmp"):
        open(name, "w").close()
    with writing("a[1]/set.npz") as file:
        file.write(b"x")
    assert sorted(os.listdir("a[1]")) == ["other.npz.123.tmp", "set.npz"]


@contextlib.contextmanager
def no_file_over(size):
    """Stands for a full disk: both fail a write that has begun."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_for_a_while_leaves_no_gap(inside, pictures, monkeypatch, capsys):
    """Between steps 2 and 5 nothing can be written: not a checkpoint, a picture or a line. A line once ended the run."""
    words = [
        *VAE,
        "--data",
        pictures,
        "--align",
        "none",
        "--gan",
        0,
        "--save-every",
        1,
        "--sample-every",
        2,
    ]
    item, disk = TrainingBatches.__getitem__, contextlib.ExitStack()

    def fill_and_free(self, k):
        if self.flip and k == 2:  # the training's own batches
            disk.enter_context(no_file_over(300))
        if self.flip and k == 5:
            disk.close()
        return item(self, k)

    monkeypatch.setattr(TrainingBatches, "__getitem__", fill_and_free)
    with disk:
        script(train_vae, *words, "--steps", 6)
    text = capsys.readouterr().out
    for step in (3, 4):
        assert f"cannot save step {step} in runs/vae" in text
    assert (
        "cannot write runs/vae/samples/0000004.png" in text
        and "cannot write runs/vae/metrics.jsonl" in text
    )
    with open("runs/vae/metrics.jsonl") as file:
        assert [json.loads(line)["step"] for line in file] == [1, 2, 3, 4, 5, 6]
    assert load_checkpoint("runs/vae", "cpu")["step"] == 6 and os.path.exists(
        "runs/vae/samples/0000006.png"
    )


def test_a_disk_that_is_full_from_the_start(inside, pictures, sit, capsys):
    with no_file_over(300):
        message = refused(
            capsys, train_vae, *VAE, "--data", pictures, "--align", "none", "--gan", 0, "--steps", 2
        )
        assert "make room" in message
        message = refused(
            capsys,
            train_sit,
            *SIT,
            "--data",
            pictures,
            "--repa",
            0,
            "--vae",
            sit.parent / "vae",
            "--cache",
            "c",
        )
        assert "cannot write c/latents-" in message
    assert not [
        f for _, _, files in os.walk(".") for f in files if f.endswith((".tmp", "latents.npy"))
    ]


def test_room_for_arrays_is_taken_when_they_are_made(inside):
    """On a full disk a write through a memory map is a bus error: no message, no exit code of ours."""
    resumable_array("folder", "big.npy", np.float16, (1000, 1000), 10)
    assert os.stat("folder/big.npy").st_blocks * 512 >= 2_000_000


# ---- signals, processes ------------------------------------------------------------------------------------------------


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def rank_1_in(folder):
    return min(
        pid
        for pid, environment in processes_in(folder).items()
        if environment.get("LOCAL_RANK") == "1"
    )  # not its loader


def test_torchrun_restarts_a_run_that_lost_a_process(pictures, tmp_path):
    """One of two processes is killed: both are started again and the run goes on by itself, in a folder whose name has spaces."""
    folder = tmp_path / "a run"
    folder.mkdir()
    words = [
        *VAE,
        "--data",
        pictures,
        "--align",
        "none",
        "--steps",
        12,
        "--save-every",
        3,
        "--log-every",
        2,
    ]
    torchrun(2, "train_vae", *words, "--out", "whole", cwd=folder)
    with open(folder / "output.txt", "w") as out:
        run = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node=2",
                "--max-restarts=1",
                os.path.join(ROOT, "train_vae.py"),
                *map(str, words),
            ],
            cwd=folder,
            stdout=out,
            stderr=out,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
        )
    try:
        wait_for(lambda: len(list_checkpoints(str(folder / "runs/vae"))) >= 2)
        os.kill(rank_1_in(folder), signal.SIGKILL)
        assert run.wait(300) == 0
    finally:
        kill_all_in(folder)
    text = (folder / "output.txt").read_text()
    assert "resuming  runs/vae at step" in text and "process 0 lost process 1" in text, text
    a, b = (load_checkpoint(str(folder / f), "cpu") for f in ("runs/vae", "whole"))
    assert a["step"] == 12 and all(same_state(a[k], b[k]) for k in a if k != "arguments")
    metrics = [
        [
            {k: v for k, v in json.loads(line).items() if k != "images_per_s"}
            for line in open(folder / f / "metrics.jsonl")
        ]
        for f in ("runs/vae", "whole")
    ]
    assert metrics[0] == metrics[1] and [line["step"] for line in metrics[0]] == [
        2,
        4,
        6,
        8,
        10,
        12,
    ]


def test_a_signal_to_one_process_stops_all_together(pictures, tmp_path):
    words = [
        *VAE,
        "--data",
        pictures,
        "--align",
        "none",
        "--gan",
        0,
        "--steps",
        100000,
        "--save-every",
        100000,
        "--workers",
        1,
    ]
    run = start(2, "train_vae", *words, cwd=tmp_path)
    try:
        wait_for(lambda: lines(tmp_path / "runs/vae/metrics.jsonl") >= 3)
        os.kill(rank_1_in(tmp_path), signal.SIGUSR1)
        assert run.wait(60) == 0  # torchrun's own code: both processes ended with 0
    finally:
        kill_all_in(tmp_path)
    state = load_checkpoint(str(tmp_path / "runs/vae"), "cpu")
    assert f"stopped   by a signal at step {state['step']}" in (tmp_path / "output.txt").read_text()


def test_one_process_s_error_is_on_the_terminal(pictures, inside):
    """A picture breaks, after the list of files was made, that only the second process reads."""
    shutil.copytree(pictures, "p")
    batches = TrainingBatches(ImageSet("p"), 8, 0, 32)
    batches.world, batches.rank = 2, 1
    path = batches.data.path(int(batches[0]["index"][0]))
    open(path, "wb").close()
    run = start(
        2,
        "train_vae",
        *VAE,
        "--data",
        "p",
        "--align",
        "none",
        "--gan",
        0,
        "--steps",
        3,
        cwd=inside,
        timeout=20,
    )
    assert run.wait(120) != 0
    text = (inside / "output.txt").read_text()
    assert (
        f"error: cannot read the picture {path!r}" in text
        and "Traceback" not in text.split("failed (exitcode")[0]
    ), text


def test_a_set_that_is_stopped_goes_on(sit, tmp_path):
    words = [
        "--sit",
        sit,
        "--num",
        40,
        "--batch-size",
        2,
        "--steps",
        40,
        "--precision",
        "fp32",
        "--out",
        "set.npz",
    ]
    run = start(1, "sample", *words, cwd=tmp_path)
    marks = tmp_path / "set.npz.parts/done.npy"
    wait_for(lambda: marks.exists() and 2 <= np.load(marks).sum())
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 0 and not (tmp_path / "set.npz").exists()
    assert "stopped by SIGTERM" in (tmp_path / "output.txt").read_text()
    assert "resuming set.npz.parts" in torchrun(1, "sample", *words, cwd=tmp_path)
    torchrun(1, "sample", *words[:-1], "whole.npz", cwd=tmp_path)
    with np.load(tmp_path / "set.npz") as a, np.load(tmp_path / "whole.npz") as b:
        assert np.array_equal(a["arr_0"], b["arr_0"])


def test_saving_waits_for_a_copy_only_and_writes_the_state_of_its_step(inside, monkeypatch):
    save, may_write = save_checkpoint, threading.Event()
    monkeypatch.setattr(
        runs, "save_checkpoint", lambda *arguments: may_write.wait(60) and save(*arguments)
    )
    weight, saver = torch.zeros(3), Saver("run")
    saver.save(
        1, {}, dict(step=1, net=dict(weight=weight))
    )  # returns although nothing can be written yet
    weight += 1  # the next step
    assert not list_checkpoints("run")
    may_write.set()
    saver.close()
    assert load_checkpoint("run", "cpu")["net"]["weight"].tolist() == [0, 0, 0]


def test_a_cpu_limited_to_avx2_multiplies_in_fp32():
    """oneDNN would emulate bf16, 35 times slower than fp32 (2.7 and 95 GFLOP/s on one AVX-512 core limited so)."""
    code = "import torch; from common.processes import resolve_precision; print(resolve_precision('auto', torch.device('cpu')))"
    limited = dict(os.environ, ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")
    assert (
        subprocess.check_output(
            [sys.executable, "-c", code], cwd=ROOT, env=limited, text=True
        ).strip()
        == "fp32"
    )
