"""Runs a stage with torch.compile's tracing of forward and backward passes, but without the code
generation that takes minutes on a CPU.

    python tests/aot_eager.py train_vae --compile <other arguments of train_vae.py>
"""

import functools
import importlib
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common.processes import run_main

if __name__ == "__main__":
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    stage = importlib.import_module(sys.argv.pop(1))
    run_main(stage.main)
