"""Shared by all tests: the repository on sys.path, a tiny folder of pictures, weights of a tiny vision model, and two
ways to run a script: in this process (fast) and under torchrun (what several GPUs do)."""
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import common  # noqa: E402

VAE = ["--resolution", "32", "--spec", "f4d4", "--ch", "32", "--ch-mult", "1", "1", "1", "--num-res-blocks", "1",
       "--lpips", "0", "--batch-size", "8", "--lr", "1e-3", "--precision", "fp32", "--workers", "0", "--log-every", "1",
       "--vfm", "test_vit", "--mapper-hidden", "64"]
SIT = ["--depth", "2", "--width", "64", "--heads", "2", "--patch", "2", "--repa-block", "1", "--vfm", "test_vit",
       "--batch-size", "8", "--lr", "1e-3", "--precision", "fp32", "--workers", "0", "--log-every", "1", "--ema", "0.9",
       "--preview-steps", "3"]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Folder with train/{a,b}/*.png, 12 pictures a class of 40 x 48 pixels: smooth colours, so that a VAE can learn."""
    root = tmp_path_factory.mktemp("pictures") / "train"
    rng = np.random.default_rng(0)
    for name in "ab":
        (root / name).mkdir(parents=True)
        for i in range(12):
            small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
            small.resize((48, 40), Image.BICUBIC).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def vfm_weights(tmp_path_factory):
    """Random weights of timm's test_vit in a safetensors file."""
    import timm
    from safetensors.torch import save_file
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vfm") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return str(path)


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
        common.run(module.main)
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
    done = subprocess.run([*start, os.path.join(ROOT, f"{name}.py"), *map(str, words)], cwd=cwd, capture_output=True,
                          text=True, env=dict(os.environ, OMP_NUM_THREADS="1"), timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
