"""Runs train_vae.py as on GPUs that hold a pass of few pictures, and other numbers on each.

python tests/small_memory.py 4,2 <arguments of train_vae.py>    # the second process holds 2
"""

import os
import sys
from unittest import mock

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train_vae
from common import training
from common.processes import run_main


class SmallMemory:
    """In this context train_vae.vae_losses raises CUDA's error for more than `largest` pictures,
    on a device of `memory` bytes.

    tried: how many pictures each pass had."""

    def __init__(self, largest, memory=10**6):
        self.largest = largest
        self.tried = []
        self.losses = train_vae.vae_losses
        self.patches = [
            mock.patch.object(train_vae, "vae_losses", self.limited),
            mock.patch.object(training, "memory_limit", lambda device: memory),
        ]

    def limited(self, networks, batch, step, args):
        self.tried.append(len(batch["position"]))
        if self.tried[-1] > self.largest:
            # Halfway, as it happens on a GPU.
            networks.discriminator.requires_grad_(False)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
        return self.losses(networks, batch, step, args)

    def __enter__(self):
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()


if __name__ == "__main__":
    limits = sys.argv.pop(1).split(",")
    with SmallMemory(int(limits[int(os.environ.get("RANK", 0))])):
        run_main(train_vae.main)
