"""The short form of tests/chaos.py, one kill of each program on one process, and one test for each
fault that the long form found."""

import contextlib
import copy
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch

import sample
import train_sit
import train_vae
from common import runs
from common.files import writing
from common.pictures import ImageSet, TrainingBatches
from common.runs import (
    RunLog,
    Saver,
    list_checkpoints,
    load_checkpoint,
    lock,
    resumable_array,
    save_checkpoint,
)
from conftest import (
    PLAIN_VAE,
    ROOT,
    SIT,
    VAE,
    damage_inside,
    half_written_files,
    kill_all_in,
    rank_1_in,
    read_metrics,
    refused,
    same_state,
    script,
    start,
    torchrun,
    wait_for,
)


@pytest.mark.parametrize("program", ["vae", "sit", "sample"])
def test_a_run_killed_at_random_ends_as_if_it_had_never_been_killed(program):
    chaos = os.path.join(ROOT, "tests", "chaos.py")
    run = subprocess.run(
        [sys.executable, chaos, "1", "--only", program, "--processes", "1"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0 and "1 kills" in run.stdout, run.stdout + run.stderr


@pytest.fixture(scope="module")
def sit(pictures, tmp_path_factory):
    """Run folder of a SiT of one step, without REPA. Its VAE is in the folder beside it."""
    folder = tmp_path_factory.mktemp("sit")
    vae = folder / "vae"
    words = ["--data", pictures, "--steps", 1]
    script(train_vae, *PLAIN_VAE, *words, "--out", vae)
    script(train_sit, *SIT, *words, "--repa", 0, "--vae", vae, "--out", folder / "sit")
    return folder / "sit"


def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


# --------------------------------------------------------------------------------------------------
# Files that are half written, and full disks


def test_a_kill_between_the_finished_set_and_the_removal_of_its_parts(sit, inside, capsys):
    """The set is whole, and a scheduler gives the same command again: it must not fail, and must
    remove the parts."""
    words = ["--sit", sit, "--num", 3, "--steps", 2, "--precision", "fp32", "--out", "set.npz"]
    script(sample, *words)
    whole = read_bytes("set.npz")
    os.close(lock("set.npz.parts"))
    script(sample, *words)
    assert read_bytes("set.npz") == whole
    assert sorted(os.listdir()) == ["set.npz"]

    assert "already there, with other settings" in refused(capsys, sample, *words, "--seed", 1)
    # A file that we did not write.
    np.savez("set.npz", arr_0=np.zeros(3))
    assert "--overwrite replaces it" in refused(capsys, sample, *words)
    script(sample, *words, "--overwrite")
    assert len(np.load("set.npz")["arr_0"]) == 3
    assert sorted(os.listdir()) == ["set.npz"]


def test_half_a_file_of_a_killed_process_is_removed_when_the_file_is_written_again(inside):
    """A set, the list of files and the pictures in samples/ are not in the folders that a run
    cleans when it locks them.
    """
    os.makedirs("a[1]")
    for name in ("a[1]/set.npz.123.tmp", "a[1]/set.npz.99999.tmp", "a[1]/other.npz.123.tmp"):
        open(name, "w").close()
    with writing("a[1]/set.npz") as file:
        file.write(b"x")
    assert sorted(os.listdir("a[1]")) == ["other.npz.123.tmp", "set.npz"]


@contextlib.contextmanager
def no_file_over(size):
    """Limits the size of files, which stands for a full disk: both make a write fail that has
    begun.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill_the_disk_from_step_2_to_5(monkeypatch, disk):
    """Makes TrainingBatches fill the disk when it reads the batch of step 2, and free it when it
    reads that of step 5. `disk` is an ExitStack."""
    read_batch = TrainingBatches.__getitem__

    def fill_and_free(self, step):
        # Only the training's own batches are flipped; those of previews are not.
        if self.flip and step == 2:
            disk.enter_context(no_file_over(300))
        if self.flip and step == 5:
            disk.close()
        return read_batch(self, step)

    monkeypatch.setattr(TrainingBatches, "__getitem__", fill_and_free)


def test_a_disk_that_is_full_for_a_while_leaves_no_gap(inside, pictures, monkeypatch, capsys):
    """Between steps 2 and 5 nothing can be written: no checkpoint, no picture and no line of
    metrics. A line that could not be written once ended the run."""
    words = ["--data", pictures, "--save-every", 1, "--sample-every", 2, "--steps", 6]
    with contextlib.ExitStack() as disk:
        fill_the_disk_from_step_2_to_5(monkeypatch, disk)
        script(train_vae, *PLAIN_VAE, *words)
    text = capsys.readouterr().out
    assert "cannot save step 3 in runs/vae" in text
    assert "cannot save step 4 in runs/vae" in text
    assert "cannot write runs/vae/samples/0000004.png" in text
    assert "cannot write runs/vae/metrics.jsonl" in text
    steps = [line["step"] for line in read_metrics("runs/vae/metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert load_checkpoint("runs/vae", "cpu")["step"] == 6
    assert os.path.exists("runs/vae/samples/0000006.png")


def test_a_disk_that_is_full_from_the_start(inside, pictures, sit, capsys):
    words = ["--data", pictures, "--steps", 2]
    latents = ["--repa", 0, "--vae", sit.parent / "vae", "--cache", "c"]
    with no_file_over(300):
        message = refused(capsys, train_vae, *PLAIN_VAE, *words)
        assert "make room" in message
        message = refused(capsys, train_sit, *SIT, *words, *latents)
        assert "cannot write c/latents-" in message
    assert not half_written_files(".")
    assert not list(inside.rglob("*latents.npy"))


def test_arrays_take_their_room_on_the_disk_when_they_are_made(inside):
    """On a full disk a write through a memory map is a bus error, without a message and without an
    exit code of ours."""
    resumable_array("folder", "big.npy", np.float16, (1000, 1000), 10)
    assert os.stat("folder/big.npy").st_blocks * 512 >= 2_000_000


# --------------------------------------------------------------------------------------------------
# Signals and processes


def count_lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def test_torchrun_restarts_a_run_that_lost_a_process(pictures, tmp_path):
    """One of two processes is killed. Both are started again, and the run resumes by itself, in a
    folder whose name has a space. No checkpoint but the last is at a line of metrics, so that the
    unfinished sums of a line are restored as well."""
    folder = tmp_path / "a run"
    folder.mkdir()
    words = [*VAE, "--data", pictures, "--align", "none"]
    words += ["--steps", 12, "--save-every", 3, "--log-every", 4]
    torchrun(2, "train_vae", *words, "--out", "whole", cwd=folder)
    run = start(2, "train_vae", *words, cwd=folder, restarts=1)
    try:
        wait_for(lambda: len(list_checkpoints(str(folder / "runs/vae"))) >= 2)
        os.kill(rank_1_in(folder), signal.SIGKILL)
        assert run.wait(300) == 0
    finally:
        kill_all_in(folder)
    text = (folder / "output.txt").read_text()
    assert "resuming  runs/vae at step" in text, text
    assert "process 0 lost process 1" in text, text

    restarted = load_checkpoint(str(folder / "runs/vae"), "cpu")
    whole = load_checkpoint(str(folder / "whole"), "cpu")
    del restarted["arguments"], whole["arguments"]
    assert restarted["step"] == 12
    assert same_state(restarted, whole)
    metrics = read_metrics(folder / "runs/vae/metrics.jsonl")
    assert metrics == read_metrics(folder / "whole/metrics.jsonl")
    assert [line["step"] for line in metrics] == [4, 8, 12]


def test_a_signal_to_one_process_stops_all_together(pictures, tmp_path):
    words = [*PLAIN_VAE, "--data", pictures, "--workers", 1]
    words += ["--steps", 100000, "--save-every", 100000]
    run = start(2, "train_vae", *words, cwd=tmp_path)
    try:
        wait_for(lambda: count_lines(tmp_path / "runs/vae/metrics.jsonl") >= 3)
        os.kill(rank_1_in(tmp_path), signal.SIGUSR1)
        # torchrun's own code, which is 0 if both processes ended with 0.
        assert run.wait(60) == 0
    finally:
        kill_all_in(tmp_path)
    state = load_checkpoint(str(tmp_path / "runs/vae"), "cpu")
    assert f"stopped   by a signal at step {state['step']}" in (tmp_path / "output.txt").read_text()


def first_picture_of_rank_1(folder):
    """The path of the first picture that the second of two processes reads."""
    batches = TrainingBatches(ImageSet(folder), 8, 0, 32)
    batches.world = 2
    batches.rank = 1
    return batches.data.path(int(batches[0]["index"][0]))


def test_the_error_of_one_process_is_on_the_terminal(pictures, inside):
    """A picture that only the second process reads has damage that the check does not see."""
    shutil.copytree(pictures, "p")
    path = first_picture_of_rank_1("p")
    damage_inside(path)
    words = [*PLAIN_VAE, "--data", "p", "--steps", 3]
    run = start(2, "train_vae", *words, cwd=inside, timeout=20)
    assert run.wait(120) != 0
    text = (inside / "output.txt").read_text()
    assert f"error: cannot read the picture {path!r}" in text, text
    # torchrun prints a traceback of its own at the end.
    assert "Traceback" not in text.split("failed (exitcode")[0], text


def test_a_set_that_is_stopped_resumes(sit, tmp_path):
    words = ["--sit", sit, "--num", 40, "--batch-size", 2, "--steps", 40, "--precision", "fp32"]
    run = start(1, "sample", *words, "--out", "set.npz", cwd=tmp_path)
    marks = tmp_path / "set.npz.parts/done.npy"
    wait_for(lambda: marks.exists() and np.load(marks).sum() >= 2)
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 0
    assert not (tmp_path / "set.npz").exists()
    assert "stopped by SIGTERM" in (tmp_path / "output.txt").read_text()

    output = torchrun(1, "sample", *words, "--out", "set.npz", cwd=tmp_path)
    assert "resuming set.npz.parts" in output
    torchrun(1, "sample", *words, "--out", "whole.npz", cwd=tmp_path)
    with np.load(tmp_path / "set.npz") as a, np.load(tmp_path / "whole.npz") as b:
        assert np.array_equal(a["arr_0"], b["arr_0"])


def test_saving_waits_for_a_copy_only_and_writes_the_state_of_its_step(inside, monkeypatch):
    may_write = threading.Event()

    def save_when_allowed(*arguments):
        may_write.wait(60)
        return save_checkpoint(*arguments)

    monkeypatch.setattr(runs, "save_checkpoint", save_when_allowed)
    weight = torch.zeros(3)
    saver = Saver("run")
    # This call returns although nothing can be written yet.
    saver.save(1, {}, dict(step=1, net=dict(weight=weight)))
    # The next step changes the weights.
    weight += 1
    assert not list_checkpoints("run")
    may_write.set()
    saver.close()
    assert load_checkpoint("run", "cpu")["net"]["weight"].tolist() == [0, 0, 0]


def log_a_step(log, step):
    log.add({"flow": torch.tensor(1.4)}, torch.tensor(True))
    log.line(step)


def test_a_run_continues_with_the_sums_that_it_saved(inside, monkeypatch):
    """A checkpoint holds the means over the processes of a line's unfinished sums. Several
    processes round them, for which rounding to integers stands here; so the run that saved must
    continue with the means as well, or its next line differs from that of a resumed run.
    """
    monkeypatch.setattr(runs, "mean_over_processes", torch.round)
    whole = types.SimpleNamespace(out="whole", batch_size=8, accum=1)
    resumed = types.SimpleNamespace(out="resumed", batch_size=8, accum=1)
    log = RunLog(whole, None, 0, 2, 1)
    log.add({"flow": torch.tensor(1.4)}, torch.tensor(True))
    saved = copy.deepcopy(log.sums())
    log_a_step(log, 2)
    log_a_step(RunLog(resumed, saved, 1, 2, 1), 2)
    lines = read_metrics("whole/metrics.jsonl")
    assert lines == read_metrics("resumed/metrics.jsonl")
    assert [line["step"] for line in lines] == [2]


def test_a_cpu_limited_to_avx2_multiplies_in_fp32():
    """oneDNN would emulate bf16, 35 times slower than fp32 (2.7 and 95 GFLOP/s on one AVX-512 core
    limited so)."""
    code = (
        "import torch; from common.processes import resolve_precision;"
        " print(resolve_precision('auto', torch.device('cpu')))"
    )
    limited = dict(os.environ, ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=limited, text=True)
    assert output.strip() == "fp32"
