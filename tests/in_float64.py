"""train_vae.py in float64 arithmetic, whatever it asks for: what then still differs between one process and two is no
rounding. python tests/in_float64.py <arguments of train_vae.py>"""

import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double


class AdamW(torch.optim.AdamW):
    """The fused one wants float32 for found_inf, which only matters in steps that are not finite."""

    def __init__(self, params, fused, **rest):
        super().__init__(params, **rest)

    def step(self):
        self.found_inf = None
        super().step()


torch.optim.AdamW = AdamW

from common.processes import run_main
import train_vae  # noqa: E402

if __name__ == "__main__":
    run_main(train_vae.main)
