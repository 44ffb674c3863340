"""train_vae.py in float64 arithmetic, whatever it asks for: what then still differs between one process and two is no
rounding. python tests/in_float64.py <arguments of train_vae.py>"""
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double

import common  # noqa: E402
import train_vae  # noqa: E402

if __name__ == "__main__":
    common.run(train_vae.main)
