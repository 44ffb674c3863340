"""Loader processes, shared memory, processes that wait for each other, and run folders on file
systems without locks."""

import ast
import contextlib
import errno
import io
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time

import pytest
import torch

import common.pictures as pictures_module
import common.runs as runs_module
import train_vae
from common.files import UserError, writing
from common.pictures import ImageSet, PictureBlocks, TrainingBatches, load_batches, read_ahead
from common.processes import (
    Attendance,
    asked_to_stop,
    at_signal,
    run_main,
    say,
    sentence_for_user,
)
from common.runs import lock
from conftest import PLAIN_VAE, ROOT, refused, script

CPU = torch.device("cpu")
MIB = 2**20


def black(indices, size):
    """Stands for ImageSet.stack."""
    return torch.zeros(len(indices), 3, size, size, dtype=torch.uint8)


# --------------------------------------------------------------------------------------------------
# Shared memory


@pytest.mark.parametrize(
    "item,workers,room,expected",
    [
        (MIB, 8, None, (8, 4)),  # Where nothing is known of it, only READ_AHEAD counts.
        (24 * MIB, 8, 24 * 1024 * MIB, (8, 1)),  # The paper's batch: 192 MiB, not 768.
        (200 * MIB, 8, 24 * 1024 * MIB, (8, 1)),  # A loader always reads one item ahead.
        (MIB, 8, 64 * MIB, (8, 4)),
        (MIB, 8, 20 * MIB, (8, 2)),
        (MIB, 8, 7 * MIB, (5, 1)),
        (MIB, 1, 3 * MIB, (1, 1)),
    ],
)
def test_loaders_read_ahead_what_the_shared_memory_holds(item, workers, room, expected):
    assert read_ahead(item, workers, room) == expected


def test_too_little_shared_memory_for_one_loader_is_refused(inside, pictures, capsys, monkeypatch):
    with pytest.raises(UserError, match=r"/dev/shm, is too small .*--shm-size.*--workers 0"):
        read_ahead(MIB, 1, 3 * MIB - 1)
    monkeypatch.setattr(pictures_module, "shared_memory_room", lambda: 50000)
    words = [*PLAIN_VAE, "--data", pictures, "--steps", 1]
    message = refused(capsys, train_vae, *words, "--workers", 2)
    assert "a batch has 0.0248 MB, of which three must fit, and there are 0.05 MB" in message
    script(train_vae, *words, "--workers", 0)


def test_shared_memory_is_shared_between_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([4096, 4096] + [1000] * 8))
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/dev/shm")
    assert pictures_module.shared_memory_room() == 4096 * 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert pictures_module.shared_memory_room() == 4096 * 125


def fill_up(tensor):
    """Stands for Tensor.share_memory_ where something else has taken the room meanwhile."""
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left")


def test_a_shared_memory_that_fills_up_is_an_error_not_a_hang(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "share_memory_", fill_up)  # The loaders inherit it.
    blocks = PictureBlocks(black, 8, 16, 4)
    with pytest.raises(UserError, match=r"--workers 0 \(unable to allocate shared memory"):
        list(load_batches(blocks, range(4), 1, CPU))
    assert len(list(load_batches(blocks, range(4), 0, CPU))) == 4


def test_a_loader_that_the_system_kills_is_named_in_a_sentence():
    def kill_itself(indices, size):
        os.kill(os.getpid(), signal.SIGKILL)

    blocks = PictureBlocks(kill_itself, 8, 16, 4)
    with pytest.raises(RuntimeError) as caught:
        list(load_batches(blocks, range(4), 1, CPU))
    sentence = sentence_for_user(caught.value, "")
    assert sentence.startswith("error: DataLoader worker (pid")
    assert "lower --workers" in sentence


def test_the_size_of_an_item_is_that_of_its_tensors(pictures):
    def extra(index, flip):
        return {"latent": torch.zeros(len(index), 2, 5, dtype=torch.float16)}

    data = ImageSet(pictures)
    for batches in (
        TrainingBatches(data, 6, 0, 8, extra=extra),
        TrainingBatches(data, 6, 0, extra=extra),
        PictureBlocks(data.stack, 8, 24, 6),
    ):
        assert batches.item_bytes() == sum(tensor.nbytes for tensor in batches[0].values())


# --------------------------------------------------------------------------------------------------
# Loaders that hang


def test_a_signal_ends_a_run_whose_loaders_hang(monkeypatch):
    """The loaders ignore the signal, which reaches them too, and would keep the process alive."""
    monkeypatch.setattr(pictures_module, "LOOK_EVERY", 0.2)
    monkeypatch.setattr(pictures_module, "WAIT_AFTER_SIGNAL", 0.5)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)

    def hang(indices, size):
        time.sleep(1000)

    others = multiprocessing.active_children()
    blocks = PictureBlocks(hang, 8, 16, 4)
    threading.Timer(1, asked_to_stop.set).start()
    try:
        with pytest.raises(UserError, match="stopped by a signal after waiting"):
            next(load_batches(blocks, range(4), 1, CPU))
    finally:
        asked_to_stop.clear()
    left = [process for process in multiprocessing.active_children() if process not in others]
    for process in left:
        process.join(5)
    assert not any(process.is_alive() for process in left)


def test_loaders_that_are_slow_but_work_are_waited_for(monkeypatch):
    """After a signal too, so that the step ends and its checkpoint is written."""
    monkeypatch.setattr(pictures_module, "LOOK_EVERY", 0.1)

    def be_slow(indices, size):
        time.sleep(0.5)
        return black(indices, size)

    asked_to_stop.set()
    try:
        assert len(list(load_batches(PictureBlocks(be_slow, 8, 8, 4), range(2), 1, CPU))) == 2
    finally:
        asked_to_stop.clear()


# --------------------------------------------------------------------------------------------------
# Processes that wait for each other


class StoppedAttendance(Attendance):
    """That of a process which stops after one sign of life."""

    def _show_life(self):
        self.store.set(f"alive {self.number}", "0")


def test_a_process_that_works_is_waited_for_beyond_the_timeout():
    store = torch.distributed.HashStore()
    first, second = (Attendance(store, number, 2, timeout=0.4) for number in range(2))
    seconds = []

    def wait():
        begin = time.monotonic()
        second.wait_for_all()
        seconds.append(time.monotonic() - begin)

    for _ in range(2):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(1.5)
        first.wait_for_all()
        thread.join()
    assert min(seconds) > 1.4


def test_a_process_without_a_sign_of_life_is_named():
    store = torch.distributed.HashStore()
    attendances = [Attendance(store, 0, 3, timeout=0.4), Attendance(store, 1, 3, timeout=0.4)]
    StoppedAttendance(store, 2, 3, timeout=0.4)

    def wait():
        with contextlib.suppress(UserError):
            attendances[1].wait_for_all()

    threading.Thread(target=wait, daemon=True).start()
    with pytest.raises(UserError, match=r"process 0 lost process 2, which died or hangs"):
        attendances[0].wait_for_all()


# --------------------------------------------------------------------------------------------------
# Locks


@pytest.fixture
def anew():
    """Each warning is given once for each reason, in a process."""
    runs_module._warn_of_no_locks.cache_clear()
    yield
    runs_module._warn_of_no_locks.cache_clear()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(number, inside, capsys, monkeypatch, anew):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(runs_module.fcntl, "lockf", refuse)
    for _ in range(2):
        os.close(lock("run"))
    output = capsys.readouterr().out
    assert output.count("warning: no lock can be taken (run: ") == 1
    assert os.strerror(number) in output


def test_other_errors_of_a_lock_are_errors(inside, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(runs_module.fcntl, "lockf", refuse)
    with pytest.raises(UserError, match="cannot write into run: Input/output error"):
        lock("run")


def test_neither_fcntl_nor_sigusr1_is_needed(inside, capsys, monkeypatch, anew):
    """As on Windows."""
    monkeypatch.setattr(runs_module, "fcntl", None)
    monkeypatch.delattr(signal, "SIGUSR1")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        at_signal(signal.SIG_DFL)
        os.close(lock("run"))
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert "warning: no lock can be taken (this system has no fcntl)" in capsys.readouterr().out


# Modules of the standard library that Windows lacks.
ONLY_UNIX = {"fcntl", "grp", "pwd", "resource", "termios"}


def imports_at_the_top(path):
    """Names of the modules that a file needs when it is imported: those in `try` may be missing."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module


def test_nothing_needs_a_module_that_windows_lacks():
    root = pathlib.Path(ROOT)
    for folder in (".", "common", "probing", "tools"):
        for path in root.glob(f"{folder}/*.py"):
            assert ONLY_UNIX.isdisjoint(imports_at_the_top(path)), path


# --------------------------------------------------------------------------------------------------
# What terminals and shells do


def test_names_that_the_terminal_cannot_show_do_not_end_a_run(monkeypatch):
    """Also a UserError's sentence. Python takes ASCII where LANG is not set, as in a cron job."""
    bytes_written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_written, encoding="ascii"))
    run_main(lambda: say("class 개"))
    assert bytes_written.getvalue() == b"class \\uac1c\n"


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    """Shells leave the ~ in --data=~/pictures."""
    monkeypatch.setenv("HOME", "/me")
    words = ["--data=~/p", "--out", "~x", "--vfm", "a~/b", "--lpips-weights", "~/v", "w"]
    args = train_vae.parse_arguments(words)
    assert args.data == "/me/p"
    assert args.out == "~x"
    assert args.vfm == "a~/b"
    assert args.lpips_weights == ["/me/v", "w"]


def test_data_given_twice_are_no_union(capsys):
    args = train_vae.parse_arguments(["--data", "p", "--lr", "1", "--data=q"])
    assert args.data == "q"
    assert "note: --data is given 2 times, and the last counts, q;" in capsys.readouterr().out
    train_vae.parse_arguments(["--data", "p", "--data=p", "--lr", "1", "--lr", "2"])
    assert capsys.readouterr().out == ""


def test_a_wrong_path_is_an_error_in_a_sentence(inside):
    with open("file", "w"), pytest.raises(NotADirectoryError) as error, writing("file/x/y"):
        pass
    expected = f"error: {inside}/file/x: Not a directory; give another path, or mend this one"
    assert sentence_for_user(error.value, "") == expected


def test_a_full_disk_names_the_file(inside):
    with pytest.raises(OSError) as error, writing("a/b"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert sentence_for_user(error.value, "") == (
        "error: No space left on device: a/b; make room and rerun the command"
    )
