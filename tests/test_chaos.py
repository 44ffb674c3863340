"""The short form of tests/chaos.py: one kill of each program on one process."""
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("program", ["vae", "sit", "sample"])
def test_killed_at_random_it_ends_as_if_it_had_not_been(program):
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "chaos.py")
    run = subprocess.run([sys.executable, script, "1", "--only", program, "--processes", "1"], capture_output=True, text=True,
                         timeout=900)
    assert run.returncode == 0 and "1 kills" in run.stdout, run.stdout + run.stderr
