"""What can be computed of a step's needs without doing it: communication of its gradients, and memory of its activations.

    python -m bench.sizes

Communication: a ring all-reduce of fp32 gradients among n sends 2 (n-1)/n of their size from each. Memory: the peak of all
tensors that a forward and backward pass makes, on fake tensors: every operation runs, with shapes and no numbers. Weights,
gradients, AdamW's moments and EMA are not in it; bf16 copies of weights are.
"""

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.processes import autocast
import models


class LiveMemory(TorchDispatchMode):
    """Bytes of tensors made while it is on that are still alive, and their peak. On fake tensors nothing is computed."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {
            id(t.untyped_storage())
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in given:
                storage = tensor.untyped_storage()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return made

    def freed(self, count):
        self.bytes -= count


def activation_memory(make, loss, precision):
    """Bytes alive at the peak of a forward and backward pass beyond weights and gradients."""
    with FakeTensorMode():
        net, inputs = make()
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        with LiveMemory() as memory:
            with autocast(torch.device("cpu"), precision):
                value = loss(net(*inputs))
            value.backward()
    return memory.peak


def main():
    def sit(checkpoint, batch, precision):
        def make():
            net = models.SiT("XL", 1, 32, 16, vfm_dim=768)
            net.grad_checkpoint = checkpoint
            return net, (
                torch.randn(batch, 32, 16, 16),
                torch.rand(batch),
                torch.zeros(batch, dtype=torch.long),
                True,
            )

        return activation_memory(
            make, lambda out: out[0].square().mean() + out[1].float().square().mean(), precision
        )

    def vae(checkpoint, batch, precision):
        def make():
            net = models.VAE("f16d32", 256)
            net.grad_checkpoint = checkpoint
            return net, (torch.randn(batch, 3, 256, 256),)

        return activation_memory(make, lambda y: y.square().mean(), precision)

    with torch.device("meta"):
        counts = {
            "SiT-XL/1 with projector": models.SiT("XL", 1, 32, 16, vfm_dim=768),
            "VAE f16d32 and mapper": torch.nn.ModuleList(
                [models.VAE(), models.Mapper(32, 16, 1, 768, 12)]
            ),
        }
    counts = {k: sum(p.numel() for p in net.parameters()) for k, net in counts.items()}
    print(
        "| module | parameters, M | gradients fp32, GB | sent by each of 8 GPUs a step, GB | of 64 |"
    )
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, count in counts.items():
        sent = (f"{2 * (n - 1) / n * 4 * count / 1e9:.2f}" for n in (8, 64))
        print(
            "| " + " | ".join([name, f"{count / 1e6:.1f}", f"{4 * count / 1e9:.2f}", *sent]) + " |"
        )
    models.VAE.forward = lambda self, x: self.decode(
        self.encode(x)[0]
    )  # in this process only, as the next
    models.attention = torch.nn.functional.scaled_dot_product_attention  # as on a GPU, also in bf16
    print(
        "\n| activations | precision | GB | with --grad-checkpoint, GB |\n| --- | --- | ---: | ---: |"
    )
    for name, function, batch in (
        ("SiT-XL/1, batch 32", sit, 32),
        ("VAE f16d32, 256 px, batch 16", vae, 16),
    ):
        for precision in ("fp32", "bf16"):
            plain, recomputed = (function(on, batch, precision) / 1e9 for on in (False, True))
            print(f"| {name} | {precision} | {plain:.2f} | {recomputed:.2f} |")


if __name__ == "__main__":
    main()
