"""The short form of tests/chaos.py: one kill of each program on one process. And the faults that the long one found, one by one."""
import os
import subprocess
import sys

import numpy as np
import pytest

import common
import sample
import train_sit
import train_vae
from conftest import SIT, VAE, refused, script


@pytest.mark.parametrize("program", ["vae", "sit", "sample"])
def test_killed_at_random_it_ends_as_if_it_had_not_been(program):
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "chaos.py")
    run = subprocess.run([sys.executable, script, "1", "--only", program, "--processes", "1"], capture_output=True, text=True,
                         timeout=900)
    assert run.returncode == 0 and "1 kills" in run.stdout, run.stdout + run.stderr


@pytest.fixture(scope="module")
def sit(pictures, tmp_path_factory):
    """Run folder of a SiT of one step, without REPA."""
    folder = tmp_path_factory.mktemp("sit")
    script(train_vae, *VAE, "--data", pictures, "--align", "none", "--gan", 0, "--steps", 1, "--out", folder / "vae")
    script(train_sit, *SIT, "--data", pictures, "--repa", 0, "--vae", folder / "vae", "--steps", 1, "--out", folder / "sit")
    return folder / "sit"


def test_a_kill_between_the_set_and_the_end_of_its_parts(sit, inside, capsys):
    """The set is whole, and a scheduler gives the same command again: it must not fail, and must leave no parts behind."""
    words = ["--sit", sit, "--num", 3, "--steps", 2, "--precision", "fp32", "--out", "set.npz"]
    script(sample, *words)
    whole = open("set.npz", "rb").read()
    common.lock("set.npz.parts")
    common.unlock("set.npz.parts")
    script(sample, *words)
    assert open("set.npz", "rb").read() == whole and sorted(os.listdir()) == ["set.npz"]
    assert "already there, with other settings" in refused(capsys, sample, *words, "--seed", 1)
    np.savez("set.npz", arr_0=np.zeros(3))                  # not ours
    assert "--overwrite replaces it" in refused(capsys, sample, *words)
    script(sample, *words, "--overwrite")
    assert len(np.load("set.npz")["arr_0"]) == 3 and sorted(os.listdir()) == ["set.npz"]


def test_half_a_file_of_a_killed_process_goes_when_it_is_written_again(inside):
    """A set, the list of files and the pictures in samples/ lie outside the folders that a run cleans when it locks them."""
    os.makedirs("a[1]")
    for name in ("a[1]/set.npz.123.tmp", "a[1]/set.npz.99999.tmp", "a[1]/other.npz.123.tmp"):
        open(name, "w").close()
    with common.writing("a[1]/set.npz") as file:
        file.write(b"x")
    assert sorted(os.listdir("a[1]")) == ["other.npz.123.tmp", "set.npz"]
