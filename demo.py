"""All of Send-VAE in three to six minutes on two CPU cores, with nothing downloaded. It is also the
tutorial: each command is printed before it runs, and can be typed by hand.

    python demo.py                        # on 6,600 pictures of objects that it draws itself
    python demo.py --data my_pictures     # the same on your own folder of <class>/<picture>
    python demo.py --vfm vit_small_patch14_dinov2.lvd142m     # with a real vision model, downloaded

It trains a Send-VAE, the same VAE without alignment, and a SiT on the latents of each. Then it
draws samples with guidance and ends with one picture, runs/demo/demo.png, and a table. Rerun it to
resume: what is done is not done again. Delete runs/demo to start over.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time

import numpy as np
import torch

from common.flags import parse_flags
from common.pictures import ImageSet, from_uint8, save_grid, to_uint8
from common.processes import available_cores, run_main, setup
from common.weights import load_vae
from tools import stand_in
from tools.pictures import draw_pictures

OUT = "runs/demo"
LOG = f"{OUT}/log.txt"
STAND_IN = f"{OUT}/stand_in.safetensors"
JUDGE = f"{OUT}/judge.safetensors"

# The two VAEs that are compared: name in paths, title.
VAES = {"send": "Send-VAE", "plain": "no alignment"}

# Pictures are 32 x 32, latents 8 x 8, and the vision model's patch tokens 4 x 4.
SIZE = 32

# A small VAE with latents of 4 channels (f4d4), and a mapper from 2 x 2 latents to a token.
# Most of a step's arithmetic is at full resolution, so its channels are few there. The perceptual
# and adversarial losses are off: their networks are larger than the VAE itself. All is in fp32,
# since few CPUs are fast in bf16.
# The stages use a GPU where there is one. Compilation, the default there, would take longer than
# the training of networks as small as these.
VAE_FLAGS = f"""--resolution {SIZE} --spec f4d4 --ch 16 --ch-mult 1 2 4 --num-res-blocks 1
    --recon l1 --lpips 0 --gan 0 --mapper-patch 2 --mapper-width 128 --mapper-hidden 256
    --steps 600 --batch-size 8 --lr 2e-3 --lr-schedule cosine --warmup 50 --ema 0.98
    --stats-images 1000 --val-images 400 --precision fp32 --workers 1 --no-compile"""

# A small SiT without REPA, so that the two SiTs differ in nothing but their latents.
SIT_FLAGS = """--patch 2 --depth 4 --width 128 --heads 4 --repa 0 --no-flip
    --steps 2400 --batch-size 32 --lr 3e-3 --lr-schedule cosine --warmup 50 --ema 0.995
    --preview-n 2 --preview-steps 20 --precision fp32 --workers 1 --no-compile"""

# 25 steps of the ODE, with guidance all the way from noise to data.
SAMPLE_FLAGS = """--num 240 --batch-size 60 --sampler ode --steps 25 --cfg 4 --interval 0 1
    --precision fp32 --no-compile"""


# What each chapter takes on 2 cores with AVX2.
SECONDS = {
    "Pictures": 4,
    "Vision model and judge": 15,
    "Stage 1, the VAEs": 60,
    "Stage 2, the SiTs": 115,
    "Samples": 15,
}


def parse_arguments():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", help="your own folder of <class>/<picture> (default: drawn here)")
    p.add_argument(
        "--vfm",
        help="any timm model with weights on the hub (default: a small stand-in, trained here)",
    )
    p.add_argument("--vfm-weights", help="local file of its weights")
    p.add_argument("--vfm-stride", type=int, help="for a CNN: stride of the feature map")
    return parse_flags(p)


# --------------------------------------------------------------------------------------------------
# The tutorial, a function for each chapter


def main():
    args = parse_arguments()
    setup("cpu")
    clock = Clock()

    train, val = prepare_pictures(args, clock)
    train_set = ImageSet(train)
    val_set = ImageSet(val)
    vfm_flags = prepare_networks(args, train_set, val_set, clock)
    train_vaes(train, val, vfm_flags, clock)
    train_sits(train, clock)
    draw_samples(clock)
    save_picture(val_set, train_set.classes)
    print_table(train_set.classes)

    print(f"\n{time.time() - clock.start:.0f} s. Next: python sample.py --cfg 1.5")
    print("For your own pictures see README.md")


def prepare_pictures(args, clock):
    """1. Pictures, in ImageNet's layout, <class>/<picture>. -> folders to train on and to test on.

    Each of ours shows an object: its shape is its class; its colour, texture, background and pose
    are attributes, which `python probe.py` predicts from the latents."""
    clock.chapter("Pictures")
    if args.data is not None:
        return args.data, args.data
    draw_pictures(f"{OUT}/pictures", SIZE)
    return f"{OUT}/pictures/train", f"{OUT}/pictures/val"


def prepare_networks(args, train_set, val_set, clock):
    """2. The vision model whose patch tokens the mapper predicts, and the judge, a classifier of
    another architecture that no VAE is aligned to. -> the flags that select the vision model."""
    clock.chapter("Vision model and judge")
    if len(train_set.classes) > 1 and not os.path.exists(JUDGE):
        stand_in.fit_judge(train_set, val_set, SIZE, JUDGE)
    if args.vfm is None and not os.path.exists(STAND_IN):
        print(
            f"Nothing is downloaded: a stand-in ({stand_in.NAME}) is trained on these pictures.\n"
            "It knows nothing else; `--vfm NAME` takes a real model from the hub.",
            flush=True,
        )
        stand_in.fit(train_set, SIZE, STAND_IN)
    if args.vfm is None:
        return f"--vfm {stand_in.NAME} --vfm-weights {STAND_IN} --vfm-stride {stand_in.STRIDE}"
    flags = f"--vfm {shlex.quote(args.vfm)}"
    if args.vfm_weights is not None:
        flags += f" --vfm-weights {shlex.quote(args.vfm_weights)}"
    if args.vfm_stride is not None:
        flags += f" --vfm-stride {args.vfm_stride}"
    return flags


def train_vaes(train, val, vfm_flags, clock):
    """3. Stage 1: two VAEs from scratch. The second differs in nothing but the alignment loss."""
    clock.chapter("Stage 1, the VAEs")
    data = f"--data {shlex.quote(train)} --val {shlex.quote(val)}"
    run_side_by_side(
        f"train_vae.py {data} --out {OUT}/vae_send {vfm_flags} {VAE_FLAGS}",
        f"train_vae.py {data} --out {OUT}/vae_plain --align none {VAE_FLAGS}",
    )


def train_sits(train, clock):
    """4. Stage 2: the same SiT on the latents of each VAE."""
    clock.chapter("Stage 2, the SiTs")
    data = f"--data {shlex.quote(train)}"
    run_side_by_side(
        f"train_sit.py {data} --vae {OUT}/vae_send --out {OUT}/sit_send {SIT_FLAGS}",
        f"train_sit.py {data} --vae {OUT}/vae_plain --out {OUT}/sit_plain {SIT_FLAGS}",
    )


def draw_samples(clock):
    """5. A set of samples from each SiT, the classes equally often."""
    clock.chapter("Samples")
    if all(os.path.exists(f"{OUT}/samples_{name}.npz") for name in VAES):
        print("The sets are complete.")
        return
    run_side_by_side(
        f"sample.py --sit {OUT}/sit_send --out {OUT}/samples_send.npz {SAMPLE_FLAGS} --overwrite",
        f"sample.py --sit {OUT}/sit_plain --out {OUT}/samples_plain.npz {SAMPLE_FLAGS} --overwrite",
    )


def save_picture(val_set, classes):
    """6. One picture of everything, 12 columns wide."""
    chosen = np.linspace(0, len(val_set) - 1, 12).astype(int)
    originals = val_set.stack(chosen, SIZE)  # (12,3,32,32)
    rows = [originals]
    for name in VAES:
        rows.append(reconstruct(f"{OUT}/vae_{name}", originals))
    for name in VAES:
        pictures, labels = load_samples(name)
        shown = choose_samples(labels, len(classes))
        rows += pictures[shown].view(6, 4, 2, *pictures.shape[1:]).transpose(0, 1).flatten(1, 2)
    save_grid(f"{OUT}/demo.png", rows)
    names = ", ".join(classes[label] for label in labels[shown].unique().tolist())
    print(
        f"\n6. {OUT}/demo.png: originals; reconstructions of {VAES['send']} and of the VAE with "
        f"{VAES['plain']};\nthen 4 rows of samples of each, from left to right in the order of the "
        f"classes: {names}"
    )


def print_table(classes):
    """7. The numbers: what alignment costs (PSNR) and what it gives (recognisable samples)."""
    title_of_share = "samples classified as their class by the judge"
    print(f"\n{'VAE':14} {'PSNR, dB':>9} {'1 - cosine':>11} {title_of_share:>51}")
    for name, title in VAES.items():
        psnr = last_measurement(f"{OUT}/vae_{name}", "val_psnr")
        align = last_measurement(f"{OUT}/vae_{name}", "val_align")
        align_text = "-" if align is None else f"{align:.3f}"
        share = float("nan")
        if len(classes) > 1:
            pictures, labels = load_samples(name)
            share = stand_in.accuracy(JUDGE, pictures, labels, len(classes))
        print(f"{title:14} {psnr:9.2f} {align_text:>11} {share:51.1%}")
    print("\nThe judge was trained on the classes of the pictures. No VAE was aligned to it.")


# --------------------------------------------------------------------------------------------------
# Running commands, and reading what they write


class Clock:
    """Says at each chapter how long is left in all."""

    def __init__(self):
        self.start = time.time()
        self.begun = self.start
        self.title = None
        self.slowness = 1.0  # against the machine of SECONDS

    def chapter(self, title):
        """Prints the chapter's heading. The time that is left is that of SECONDS, corrected by how
        long the last chapter took, unless a rerun found it done."""
        now = time.time()
        if self.title is not None and now - self.begun > SECONDS[self.title] / 4:
            self.slowness = (now - self.begun) / SECONDS[self.title]
        self.title = title
        self.begun = now
        titles = list(SECONDS)
        number = titles.index(title)
        left = self.slowness * sum(SECONDS[other] for other in titles[number:])
        print(f"\n{number + 1}. {title}; about {left:.0f} s are left in all", flush=True)


def run_side_by_side(*commands):
    """Prints commands such as "train_vae.py --steps 10" and runs them at once, each on its share of
    the cores: small networks gain little from a second core.

    The first writes to the terminal, the others to a log. If one fails, so does the demo. A stage
    that has finished before says so and returns at once."""
    here = os.path.dirname(os.path.abspath(__file__))
    cores = max(1, available_cores() // len(commands))
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
    running = []
    with open(LOG, "a") as log:
        for number, command in enumerate(commands):
            words = shlex.split(command)
            note = "" if number == 0 else f"      # at the same time; its output is in {LOG}"
            print(f"\n$ python {shlex.join(words)}{note}", flush=True)
            output = None if number == 0 else log
            running.append(
                subprocess.Popen(
                    [sys.executable, os.path.join(here, words[0]), *words[1:]],
                    stdout=output,
                    stderr=output,
                    env=environment,
                )
            )
    for number, process in enumerate(running):
        if process.wait() != 0:
            for other in running:
                other.kill()
            if number > 0:
                failed = shlex.join(shlex.split(commands[number]))
                print(f"demo.py: error: {failed} failed; see {LOG}", file=sys.stderr)
            sys.exit(process.returncode)


@torch.no_grad()
def reconstruct(folder, pictures):
    """uint8 (B,3,S,S) -> uint8 (B,3,S,S), through the VAE of a run's folder."""
    vae = load_vae(folder)
    mean, _ = vae.encode(from_uint8(pictures))
    return to_uint8(vae.decode(mean))


def load_samples(name):
    """-> the samples drawn for one of VAES, uint8 (N,3,32,32), and their labels (N,)."""
    with np.load(f"{OUT}/samples_{name}.npz") as file:
        pictures = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(file["labels"])
    return pictures, labels


def choose_samples(labels, classes, count=48):
    """Labels (N,) of a set with the classes equally often -> the indices of `count` samples, in
    the order of their classes, the same number of each as far as the set and `count` allow.

    With six classes these are the first eight of each; with more than the set has room for eight
    of, more classes are shown with fewer samples."""
    per_class = -(-count // classes)
    per_class = max(per_class, 8)
    chosen = []
    for label in range(classes):
        chosen += (labels == label).nonzero()[:per_class, 0].tolist()
    return chosen[:count]


def last_measurement(folder, key):
    """-> the last value of a measurement in a run's metrics.jsonl, None if it was never taken."""
    value = None
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        for line in file:
            value = json.loads(line).get(key, value)
    return value


if __name__ == "__main__":
    run_main(main)
