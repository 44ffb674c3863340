"""What all tests share: a tiny folder of pictures, random weights of a tiny vision model, the flags
of tiny networks, and three ways to run a stage: in this process (fast), as commands under torchrun
(as on several GPUs), and as processes that the test watches and kills."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from common.processes import run_main

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Tests must not need the network. huggingface_hub reads this variable when it is imported, and then
# refuses a download at once instead of after several attempts.
os.environ["HF_HUB_OFFLINE"] = "1"

# Tests run on the CPU on any machine: runs of one and of several processes are compared, for which
# one GPU does not suffice. CUDA reads this variable when it is first asked for.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Workers of pytest-xdist share the cores, as the processes that tests start do.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Flags of tiny networks. Those of TINY serve both training stages.
TINY = shlex.split(
    "--batch-size 8 --lr 1e-3 --precision fp32 --workers 0 --log-every 1 --vfm test_vit"
)
VAE = TINY + shlex.split(
    "--resolution 32 --spec f4d4 --ch 32 --ch-mult 1 1 1 --num-res-blocks 1 --lpips 0"
    " --mapper-hidden 64"
)
SIT = TINY + shlex.split(
    "--depth 2 --width 64 --heads 2 --patch 2 --repa-block 1 --ema 0.9 --preview-steps 3"
)
# The quickest VAE: without vision model, mapper and discriminator.
PLAIN_VAE = [*VAE, "--align", "none", "--gan", "0"]


def make_pictures(root):
    """Writes 12 pictures of 40 x 48 pixels for each of two classes, root/{a,b}/*.png. Their colours
    are smooth, so that a VAE can learn them."""
    rng = np.random.default_rng(0)
    for name in "ab":
        os.makedirs(os.path.join(root, name))
        for i in range(12):
            small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
            small.resize((48, 40), Image.BICUBIC).save(os.path.join(root, name, f"{i:02d}.png"))
    return root


def damage_inside(path):
    """Replaces the pixels of a PNG file by bytes that cannot be unpacked. The checksums are right,
    so that only decoding finds it."""
    with open(path, "rb") as file:
        content = file.read()
    start = content.index(b"IDAT")
    length = int.from_bytes(content[start - 4 : start], "big")
    chunk = b"IDAT" + b"\xff" * length
    checksum = zlib.crc32(chunk).to_bytes(4, "big")
    with open(path, "wb") as file:
        file.write(content[:start] + chunk + checksum + content[start + len(chunk) + 4 :])


def interrupt_drawing(monkeypatch, number):
    """Has sample.py be interrupted, as by Ctrl-C, where it begins to draw its batch of this number,
    from 1. Returns the list that collects the ids of each batch, also of later runs."""
    # Not at the top: it imports huggingface_hub, for which the variable above must be set.
    import sample

    draw = sample.draw
    batches = []

    def draw_or_stop(net, vae, ids, *rest):
        batches.append(ids.tolist())
        if len(batches) == number:
            raise KeyboardInterrupt
        return draw(net, vae, ids, *rest)

    monkeypatch.setattr(sample, "draw", draw_or_stop)
    return batches


def make_vfm_weights(path):
    """Writes random weights of timm's test_vit to a safetensors file."""
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
    """Makes an empty folder the current one, since the stages write to runs/ below it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------------------------
# Stages that run in this process, or as commands to their end


def script(module, *words):
    """Runs a stage's main() in this process as `python <module>.py words` would, errors
    included."""
    argv_before = sys.argv
    handlers_before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    sys.argv = [f"{module.__name__}.py", *map(str, words)]
    try:
        run_main(module.main)
    finally:
        sys.argv = argv_before
        for number, handler in handlers_before.items():
            signal.signal(number, handler)


def refused(capsys, module, *words):
    """Returns the one sentence with which a stage refuses its arguments. The stage must exit with
    code 2 and print no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script(module, *words)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in error
    lines = [line for line in error.strip().splitlines() if "error:" in line]
    assert len(lines) == 1, error
    return lines[0]


def command(processes, name, *words, restarts=0):
    """The command line, a list, of `torchrun --nproc_per_node=<processes> <name>.py words`. For one
    process it is plain python."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    return [*launcher, os.path.join(ROOT, f"{name}.py"), *map(str, words)]


def torchrun(processes, name, *words, cwd):
    """Runs a stage to its end, which must be a good one without warnings, and returns what it
    printed."""
    done = subprocess.run(
        command(processes, name, *words),
        cwd=cwd,
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    # Such as torch's FutureWarning of a function that is about to go.
    assert "Warning:" not in done.stderr, done.stderr[-4000:]
    return done.stdout


# --------------------------------------------------------------------------------------------------
# Processes that a test watches and kills


def wait_for(condition, seconds=120):
    """Waits until condition() is true."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"the condition was still false after {seconds} seconds"
        time.sleep(0.02)


def start(processes, name, *words, cwd, timeout=1800, restarts=0):
    """Starts a stage as a process group of its own and returns its Popen. Its output goes to
    <cwd>/output.txt."""
    with open(os.path.join(cwd, "output.txt"), "w") as output:
        return subprocess.Popen(
            command(processes, name, *words, "--timeout", timeout, restarts=restarts),
            cwd=cwd,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
        )


def environment_of(pid):
    """The environment variables of a process, as a dict."""
    with open(f"/proc/{pid}/environ") as file:
        variables = file.read().split("\0")
    return dict(variable.split("=", 1) for variable in variables if "=" in variable)


def processes_in(folder):
    """{process id: environment} of all processes whose current folder is `folder`. The process
    group of `start` does not serve, since torchrun gives each of its processes a group of its
    own."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        # A process may end, or belong to somebody else.
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/cwd") == str(folder):
                found[int(pid)] = environment_of(pid)
    return found


def rank_1_in(folder):
    """The process id of the second of two processes that run in a folder. Its loaders have the same
    LOCAL_RANK, but were started later."""
    return min(
        pid
        for pid, environment in processes_in(folder).items()
        if environment.get("LOCAL_RANK") == "1"
    )


def kill_all_in(folder):
    for pid in processes_in(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --------------------------------------------------------------------------------------------------
# What a run leaves behind


def same_state(a, b):
    """Whether two nested states are equal bit for bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


def half_written_files(folder):
    return [name for _, _, names in os.walk(folder) for name in names if name.endswith(".tmp")]


def read_metrics(path):
    """The lines of a metrics.jsonl, without the speed, which no two runs have in common."""
    with open(path) as file:
        lines = [json.loads(line) for line in file]
    for line in lines:
        line.pop("images_per_s", None)
    return lines
