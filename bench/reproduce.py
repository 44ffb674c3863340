"""Computes what the paper's main run needs: its commands, the network, the disk, the cores that
read pictures; and the memory, the passes a step and the hours of both stages on several cards.

    python -m bench.reproduce    # about a minute, on a CPU

Everything is computed and nothing measured. Memory is that of bench/sizes.py. Hours are operations
divided by a card's peak in bf16 and the share of it that study/paper.py assumes.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from bench import sizes
from common.training import SPARE, pass_counts
from study import paper
import models
import train_sit
import train_vae


class Card(NamedTuple):
    """A kind of GPU: what its driver, CUDA and NCCL are assumed to leave of its memory, GiB, and
    the peak of its dense bf16 products, operations a second, from its data sheet."""

    name: str
    memory: float
    peak: float


CARDS = [
    Card("H100, 80 GB", 77, 989e12),
    Card("A100, 40 GB", 38, 312e12),
    Card("RTX 4090, 24 GB", 22.5, 165e12),
]
# JPEG pictures that a core decodes and crops in a second: BENCHMARKS.md.
PICTURES_A_CORE = 439


# --------------------------------------------------------------------------------------------------
# Memory, passes and hours


class Line(NamedTuple):
    """A line through two computed sizes: memory grows linearly with the pictures in a pass."""

    fixed: float  # bytes
    each: float  # bytes a picture

    def at(self, pictures):
        return self.fixed + self.each * pictures


def line_through(first, second):
    """first and second: (pictures, bytes)."""
    each = (second[1] - first[1]) / (second[0] - first[0])
    return Line(first[1] - each * first[0], each)


def memory_of_stages():
    """{stage: Line} of the training steps with default flags, in bf16, without torch.compile."""
    found = sizes.stage_1_memory((8, 16), "bf16")
    stage_1 = line_through(*((count, plain) for count, (plain, _) in found.items()))
    stage_2 = line_through(*((count, sizes.sit_memory(False, count, "bf16")) for count in (8, 16)))
    # Weights, gradient, two moments and EMA; and the vision model, DINOv2-B.
    kept = 20 * sizes.parameter_counts()["SiT-XL/1 with projector"] + 4 * 86.6e6
    return {"1": stage_1, "2": stage_2._replace(fixed=stage_2.fixed + kept)}


def passes_that_fit(line, share, memory):
    """What --accum auto would find: passes a step, for `share` pictures of a step on each GPU and
    `memory` bytes. None if not even single pictures fit."""
    for count in pass_counts(share):
        if line.at(share // count) + SPARE * memory <= memory:
            return count
    return None


def stage_hours():
    """{stage: GPU-hours on an H100 at the assumed share of its peak}."""
    spent = paper.hours("system", paper.TABLES["system"][0])
    return {"1": spent["VAE"], "2": spent["SiT"]}


def print_machines():
    lines = memory_of_stages()
    hours = stage_hours()
    batches = {
        "1": train_vae.parse_arguments([]).batch_size,
        "2": train_sit.parse_arguments([]).batch_size,
    }
    print("| stage | GPUs | `--accum` | pictures a pass | memory of each, GiB | hours |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for stage, line in lines.items():
        for card in CARDS:
            for count in (8, 1):
                share = batches[stage] // count
                passes = passes_that_fit(line, share, card.memory * 2**30)
                pictures = share // passes
                used = line.at(pictures) / 2**30
                time = hours[stage] / count * paper.H100_OPERATIONS / card.peak
                print(
                    f"| {stage} | {count} x {card.name} | {passes} | {pictures} | {used:.0f} | "
                    f"{time:.0f} |"
                )


# --------------------------------------------------------------------------------------------------
# Network and disk


def batch_norm_sums(norms, calls):
    """Of one pass: how many sums over the processes, and their bytes. A norm sums twice forward and
    twice backward, a float32 number for each channel."""
    number = 4 * calls * len(norms)
    return number, 4 * 4 * calls * sum(norm.num_features for norm in norms)


def batch_norms(network):
    return [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]


def print_network():
    with torch.device("meta"):
        discriminator = models.PatchDiscriminator()
        mapper = models.Mapper(32, 16, 1, 768, 12)
    parameters = sizes.parameter_counts()
    trained = {
        "1": parameters["VAE f16d32 and mapper"]
        + sum(p.numel() for p in discriminator.parameters()),
        "2": parameters["SiT-XL/1 with projector"],
    }
    print("| stage | gradients, GB | each of 8 GPUs sends a step, GB |")
    print("| --- | ---: | ---: |")
    for stage, count in trained.items():
        size = 4 * count / 1e9
        print(f"| {stage} | {size:.2f} | {2 * 7 / 8 * size:.2f} |")
    # The discriminator runs on reconstructions twice, and on pictures once.
    number, size = batch_norm_sums(batch_norms(discriminator), calls=3)
    more, more_bytes = batch_norm_sums(batch_norms(mapper), calls=1)
    print()
    print(
        f"Batch norms of stage 1: {number + more} sums a pass, {(size + more_bytes) / 1e3:.1f} kB "
        "together."
    )


def latent_bytes(pictures, sides=2, channels=32, side=16):
    """The latents' cache: mean and std, fp16, of every picture and its mirror image."""
    return pictures * sides * 2 * channels * side**2 * 2


def print_disk():
    parameters = sizes.parameter_counts()
    print("| what | GB |")
    print("| --- | ---: |")
    print("| ImageNet's training pictures, JPEG (the published archive) | 138 |")
    print(f"| latents of stage 2 | {latent_bytes(paper.IMAGENET_PICTURES) / 1e9:.0f} |")
    for stage, name in (("1", "VAE f16d32 and mapper"), ("2", "SiT-XL/1 with projector")):
        # Weights, two moments and EMA. Two checkpoints stay while the third is written.
        size = 3 * 4 * 4 * parameters[name] / 1e9
        print(f"| checkpoints of stage {stage}, three at most | {size:.0f} |")
    print(f"| 50,000 samples of 256x256, `.npz` | {50000 * 256 * 256 * 3 / 1e9:.0f} |")


def print_reading():
    print("| stage | pictures/s on 8 H100 | cores that decode them |")
    print("| --- | ---: | ---: |")
    for stage, spent in stage_hours().items():
        rate = 80 * paper.IMAGENET_PICTURES / (spent / 8 * 3600)
        print(f"| {stage} | {rate:.0f} | {math.ceil(rate / PICTURES_A_CORE)} |")


def main():
    entry = paper.TABLES["system"][0]
    print("\n".join([*paper.downloads("system")[:1], *paper.commands("system", entry)]))
    for table in (print_network, print_disk, print_reading, print_machines):
        print()
        table()


if __name__ == "__main__":
    main()
