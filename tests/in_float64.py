"""Runs train_vae.py in float64 arithmetic, whatever precision it asks for. A difference between one
process and two that is still there is no rounding error.

    python tests/in_float64.py <arguments of train_vae.py>
"""

import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train_vae
from common.processes import run_main


class AdamW(torch.optim.AdamW):
    """AdamW without its fused kernels, which want float32 for found_inf. It ignores found_inf, so
    every step must be finite."""

    def __init__(self, params, fused, **rest):
        super().__init__(params, **rest)

    def step(self):
        self.found_inf = None
        super().step()


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    torch.optim.AdamW = AdamW
    run_main(train_vae.main)
