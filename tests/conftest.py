"""Shared by all tests: the repository on sys.path, a tiny folder of pictures, weights of a tiny vision model, and two
ways to run a script: in this process (fast) and under torchrun (what several GPUs do)."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from common.processes import run_main

VAE = [
    "--resolution",
    "32",
    "--spec",
    "f4d4",
    "--ch",
    "32",
    "--ch-mult",
    "1",
    "1",
    "1",
    "--num-res-blocks",
    "1",
    "--lpips",
    "0",
    "--batch-size",
    "8",
    "--lr",
    "1e-3",
    "--precision",
    "fp32",
    "--workers",
    "0",
    "--log-every",
    "1",
    "--vfm",
    "test_vit",
    "--mapper-hidden",
    "64",
]
SIT = [
    "--depth",
    "2",
    "--width",
    "64",
    "--heads",
    "2",
    "--patch",
    "2",
    "--repa-block",
    "1",
    "--vfm",
    "test_vit",
    "--batch-size",
    "8",
    "--lr",
    "1e-3",
    "--precision",
    "fp32",
    "--workers",
    "0",
    "--log-every",
    "1",
    "--ema",
    "0.9",
    "--preview-steps",
    "3",
]


def make_pictures(root):
    """root/{a,b}/*.png, 12 pictures a class of 40 x 48 pixels: smooth colours, so that a VAE can learn."""
    rng = np.random.default_rng(0)
    for name in "ab":
        os.makedirs(os.path.join(root, name))
        for i in range(12):
            small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
            small.resize((48, 40), Image.BICUBIC).save(os.path.join(root, name, f"{i:02d}.png"))
    return root


def make_vfm_weights(path):
    """Random weights of timm's test_vit in a safetensors file."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures") / "train")


@pytest.fixture(scope="session")
def vfm_weights(tmp_path_factory):
    return make_vfm_weights(tmp_path_factory.mktemp("vfm") / "test_vit.safetensors")


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """An empty current folder, as the scripts write to runs/ below it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(module, *words):
    """Runs a script's main() here, as `python <module>.py words` would, errors included."""
    before, handlers = sys.argv, {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    sys.argv = [f"{module.__name__}.py", *map(str, words)]
    try:
        run_main(module.main)
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


def refused(capsys, module, *words):
    """The one sentence with which a script refuses its arguments; it must exit with code 2 and print no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script(module, *words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    lines = [line for line in error.strip().splitlines() if "error:" in line]
    assert len(lines) == 1, error
    return lines[0]


def torchrun(processes, name, *words, cwd):
    """`torchrun --nproc_per_node=<processes> <name>.py words`; one process means plain python."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*start, os.path.join(ROOT, f"{name}.py"), *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


# ---- processes that are to be watched and killed ---------------------------------------------------------------------


def wait_for(what, seconds=120):
    """Waits until what() is true."""
    end = time.time() + seconds
    while not what():
        assert time.time() < end, "it did not happen"
        time.sleep(0.02)


def start(processes, name, *words, cwd, timeout=1800):
    """The script as a process group of its own -> Popen; its output goes to <cwd>/output.txt."""
    first = [sys.executable] + [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ] * (processes > 1)
    with open(os.path.join(cwd, "output.txt"), "w") as out:
        return subprocess.Popen(
            [*first, os.path.join(ROOT, f"{name}.py"), *map(str, words), "--timeout", str(timeout)],
            cwd=cwd,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
        )


def processes_in(folder):
    """{number: environment} of the processes whose current folder is `folder` (torchrun's have process groups of their own)."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/cwd") == str(folder):
                with open(f"/proc/{pid}/environ") as file:
                    found[int(pid)] = dict(
                        x.split("=", 1) for x in file.read().split("\0") if "=" in x
                    )
    return found


def kill_all_in(folder):
    for pid in processes_in(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def same_state(a, b):
    """Two nested states are equal bit for bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b
