"""Computes what a training step needs, without doing it: the communication of its gradients and the
memory of its activations.

    python -m bench.sizes

Communication: a ring all-reduce of fp32 gradients among n processes sends 2 (n-1)/n of their size
from each. Memory: the peak of all tensors that a forward and backward pass makes, on fake tensors:
every operation runs, on shapes without numbers. Copies of the weights in bf16 are included. Only
the table of stage 1 includes the weights themselves, their gradients, AdamW's moments and the EMA.

The tensors are on a CPU. tests/test_fake_cuda.py asserts that those of a GPU take the same memory.
What torch.compile saves is not counted.
"""

import os
import tempfile
import weakref
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import speed
from common.processes import autocast
from common.training import weighted_sum
import models
import train_vae


# --------------------------------------------------------------------------------------------------
# Measuring on fake tensors


class LiveMemory(TorchDispatchMode):
    """While it is active, counts the tensors that are made.

    bytes: the size of those that are still alive. peak: the largest that `bytes` ever was. On fake
    tensors nothing is computed.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = function(*args, **kwargs)
        # A result that shares the storage of an input (a view) takes no memory of its own.
        inputs = {id(tensor.untyped_storage()) for tensor in tensors_in((args, kwargs))}
        for tensor in tensors_in(results):
            storage = tensor.untyped_storage()
            if id(storage) not in inputs:
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return results

    def _freed(self, size):
        self.bytes -= size


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def activation_memory(make, loss, precision):
    """Bytes alive at the peak of a forward and backward pass, beyond weights and gradients.

    make() -> (network, its inputs); loss(the network's output) -> scalar.
    """
    with FakeTensorMode():
        net, inputs = make()
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with LiveMemory() as memory:
            with autocast(inputs[0].device, precision):
                value = loss(net(*inputs))
            value.backward()
    return memory.peak


# --------------------------------------------------------------------------------------------------
# The networks of the paper's runs


def sit_memory(grad_checkpoint, batch, precision):
    """Bytes of SiT-XL/1 with REPA's projector on latents (batch,32,16,16)."""

    def make():
        net = models.SiT("XL", 1, 32, 16, vfm_dim=768)
        net.grad_checkpoint = grad_checkpoint
        x = torch.randn(batch, 32, 16, 16)
        t = torch.rand(batch)
        y = torch.zeros(batch, dtype=torch.long)
        return net, (x, t, y, True)

    def loss(output):
        velocity, tokens = output
        return velocity.square().mean() + tokens.float().square().mean()

    return activation_memory(make, loss, precision)


class Autoencoder(nn.Module):
    """A VAE from pictures to reconstructions, both (B,3,H,W), by way of the posterior's mean."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, x):
        mean, _ = self.vae.encode(x)
        return self.vae.decode(mean)


def vae_memory(grad_checkpoint, batch, precision):
    """Bytes of the f16d32 VAE on pictures (batch,3,256,256)."""

    def make():
        vae = models.VAE("f16d32", 256)
        vae.grad_checkpoint = grad_checkpoint
        return Autoencoder(vae), (torch.randn(batch, 3, 256, 256),)

    def loss(reconstructions):
        return reconstructions.square().mean()

    return activation_memory(make, loss, precision)


def stage_1_networks():
    """The networks of stage 1 with its default flags, with random weights on the CPU; and the
    flags."""
    with tempfile.TemporaryDirectory() as folder, speed.untrained_vision_models():
        lpips = speed.write_random_lpips(os.path.join(folder, "lpips.pth"))
        args = train_vae.parse_arguments(["--lpips-weights", lpips])
        return train_vae.build_networks(args, torch.device("cpu"), "bf16"), args


def make_fake(network, mode):
    """Replaces a network's parameters and buffers by fake tensors, in place."""
    for part in network.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = mode.from_tensor(parameter.detach())
                part._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = mode.from_tensor(buffer)


def stage_1_memory(batches, precision):
    """Bytes of a training step of stage 1 with all losses, {batch: (without, with gradient
    checkpointing)} for these numbers of pictures in a pass."""
    networks, args = stage_1_networks()
    modules = nn.ModuleList([networks.net, networks.discriminator, networks.vfm, networks.lpips])
    mode = FakeTensorMode()
    make_fake(modules, mode)
    found = {}
    with mode:
        kept = 0
        for parameter in modules.parameters():
            kept += parameter.nbytes
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                # The gradient, AdamW's two moments, and the EMA of all but the discriminator.
                kept += 3 * parameter.nbytes
        kept += sum(parameter.nbytes for parameter in networks.net.parameters())

        for count in batches:
            batch = dict(
                image=torch.zeros(count, 3, 256, 256, dtype=torch.uint8),
                position=torch.arange(count),
            )
            sizes = []
            for networks.net.vae.grad_checkpoint in (False, True):
                with LiveMemory() as memory:
                    with autocast(torch.device("cpu"), precision):
                        losses = train_vae.vae_losses(networks, batch, 0, args)
                        loss = weighted_sum(losses, args)
                    loss.backward()
                    del losses, loss
                sizes.append(kept + memory.peak)
            found[count] = sizes
    return found


def parameter_counts():
    """{name: number of trained parameters}, without taking memory for them."""
    with torch.device("meta"):
        sit = models.SiT("XL", 1, 32, 16, vfm_dim=768)
        send_vae = nn.ModuleList([models.VAE(), models.Mapper(32, 16, 1, 768, 12)])
    networks = {"SiT-XL/1 with projector": sit, "VAE f16d32 and mapper": send_vae}
    return {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()}


# --------------------------------------------------------------------------------------------------
# The two tables


def print_communication():
    columns = "module | parameters, M | gradients fp32, GB | sent by each of 8 GPUs a step, GB"
    print(f"| {columns} | of 64 |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, count in parameter_counts().items():
        size = 4 * count / 1e9
        sent_by_8 = 2 * 7 / 8 * size
        sent_by_64 = 2 * 63 / 64 * size
        print(f"| {name} | {count / 1e6:.1f} | {size:.2f} | {sent_by_8:.2f} | {sent_by_64:.2f} |")


def print_activations():
    print("| activations | precision | GB | with --grad-checkpoint, GB |")
    print("| --- | --- | ---: | ---: |")
    for name, memory, batch in (
        ("SiT-XL/1, batch 32", sit_memory, 32),
        ("VAE f16d32, 256 px, batch 16", vae_memory, 16),
    ):
        for precision in ("fp32", "bf16"):
            plain = memory(False, batch, precision) / 1e9
            recomputed = memory(True, batch, precision) / 1e9
            print(f"| {name} | {precision} | {plain:.2f} | {recomputed:.2f} |")


def print_stage_1():
    print("| stage 1, all losses, bf16: pictures in a pass | GiB | with --grad-checkpoint, GiB |")
    print("| ---: | ---: | ---: |")
    for count, sizes in stage_1_memory((16, 32, 64, 128), "bf16").items():
        plain, recomputed = (size / 2**30 for size in sizes)
        print(f"| {count} | {plain:.1f} | {recomputed:.1f} |")


def main():
    print_communication()
    print()
    # The attention that a GPU uses, also where these fake tensors are bf16 on a CPU.
    fused = torch.nn.functional.scaled_dot_product_attention
    with mock.patch.object(models, "attention", fused):
        print_activations()
        print()
        print_stage_1()


if __name__ == "__main__":
    main()
