"""All of Send-VAE in four to six minutes on two CPU cores, with nothing downloaded. It is also the
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
import shutil
import subprocess
import sys
import time

import numpy as np
import torch

from common.files import UserError
from common.flags import parse_flags
from common.pictures import ImageSet, from_uint8, save_grid, to_uint8
from common.processes import available_cores, run_main, setup
from common.weights import load_vae
from tools import stand_in
from tools.pictures import draw_pictures

OUT = "runs/demo"
STAND_IN = f"{OUT}/stand_in.safetensors"
JUDGE = f"{OUT}/judge.safetensors"

# The two VAEs that are compared: name in paths, title.
VAES = {"send": "Send-VAE", "plain": "no alignment"}

# Pictures are 32 x 32, latents 8 x 8, and the vision model's patch tokens 4 x 4.
SIZE = 32

# A small VAE with latents of 6 channels (f4d6), and a mapper from 2 x 2 latents to a token.
# Most of a step's arithmetic is at full resolution, so its channels are few there. The perceptual
# and adversarial losses are off: their networks are larger than the VAE itself. All is in fp32,
# since few CPUs are fast in bf16.
# The stages use a GPU where there is one. Compilation, the default there, would take longer than
# the training of networks as small as these.
VAE_FLAGS = f"""--resolution {SIZE} --spec f4d6 --ch 16 --ch-mult 1 2 2 --num-res-blocks 1
    --recon l1 --lpips 0 --gan 0 --mapper-patch 2 --mapper-width 128 --mapper-hidden 256
    --steps 900 --batch-size 8 --lr 2e-3 --lr-schedule cosine --warmup 50 --ema 0.98
    --stats-images 1000 --val-images 400 --precision fp32 --workers 1 --no-compile
    --log-every 25"""

# A small SiT without REPA, so that the two SiTs differ in nothing but their latents.
SIT_FLAGS = """--patch 2 --depth 4 --width 128 --heads 4 --repa 0 --no-flip
    --steps 3000 --batch-size 32 --lr 3e-3 --lr-schedule cosine --warmup 50 --ema 0.995
    --preview-n 2 --preview-steps 20 --precision fp32 --workers 1 --no-compile
    --log-every 50"""

# 25 steps of the ODE, with guidance all the way from noise to data.
SAMPLE_FLAGS = """--num 240 --batch-size 60 --sampler ode --steps 25 --cfg 4 --interval 0 1
    --precision fp32 --no-compile"""

# The losses that the bar shows beside the time that is left.
LOSSES = ("align", "recon", "flow")

# Heads the column of the judge's verdicts.
SHARE_TITLE = "samples classified as their class"

# What each chapter takes on 2 cores with AVX2, from which the time that is left is estimated.
SECONDS = {
    "Pictures": 4,
    "The judge": 7,
    "The vision model": 9,
    "Stage 1, the VAEs": 63,
    "Stage 2, the SiTs": 150,
    "Samples": 12,
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
    progress = Progress()

    train, val = prepare_pictures(args, progress)
    train_set = ImageSet(train)
    val_set = ImageSet(val)
    fit_judge(train_set, val_set, progress)
    vfm_flags = prepare_vision_model(args, train_set, progress)
    train_vaes(train, val, vfm_flags, progress)
    train_sits(train, progress)
    draw_samples(progress)
    save_picture(val_set, train_set.classes)
    print_table(train_set.classes)

    print(f"\n{time.time() - progress.start:.0f} s. Next: python sample.py --cfg 1.5")
    print("For your own pictures see README.md")


def prepare_pictures(args, progress):
    """1. Pictures, in ImageNet's layout, <class>/<picture>. -> folders to train on and to test on.

    Each of ours shows an object: its shape is its class; its colour, texture, background, size and
    place are attributes, which `python probe.py` predicts from the latents."""
    progress.chapter("Pictures")
    if args.data is not None:
        return args.data, args.data
    draw_pictures(f"{OUT}/pictures", SIZE)
    return f"{OUT}/pictures/train", f"{OUT}/pictures/val"


def fit_judge(train_set, val_set, progress):
    """2. The judge, a classifier that no VAE is aligned to. One class needs none."""
    progress.chapter("The judge")
    if is_fitted(JUDGE, train_set) or len(train_set.classes) == 1:
        return
    share = stand_in.fit_judge(train_set, val_set, SIZE, JUDGE, progress.report)
    progress.print(
        f"It classifies {share:.1%} of the {len(val_set)} pictures in {val_set.root} right."
    )


def prepare_vision_model(args, train_set, progress):
    """3. The vision model whose patch tokens the mapper predicts, of another architecture than the
    judge. -> the flags that select it"""
    progress.chapter("The vision model")
    if args.vfm is None:
        if not is_fitted(STAND_IN, train_set):
            progress.print(
                f"Nothing is downloaded: {stand_in.NAME} is trained on these pictures instead.\n"
                "It knows nothing else; `--vfm NAME` takes a real model from the hub."
            )
            stand_in.fit(train_set, SIZE, STAND_IN, progress.report)
        return f"--vfm {stand_in.NAME} --vfm-weights {STAND_IN} --vfm-stride {stand_in.STRIDE}"
    flags = f"--vfm {shlex.quote(args.vfm)}"
    if args.vfm_weights is not None:
        flags += f" --vfm-weights {shlex.quote(args.vfm_weights)}"
    if args.vfm_stride is not None:
        flags += f" --vfm-stride {args.vfm_stride}"
    return flags


def is_fitted(path, train_set):
    """Whether a network was trained before. Raises a UserError if it was on other pictures."""
    if not os.path.exists(path):
        return False
    if stand_in.trained_on(path) != train_set.fingerprint:
        raise UserError(
            f"{path} was trained on other pictures than those in {train_set.root}: delete {OUT} to "
            "start over, or give the pictures of before with --data"
        )
    return True


def train_vaes(train, val, vfm_flags, progress):
    """4. Stage 1: two VAEs from scratch. The second differs in nothing but the alignment loss."""
    progress.chapter("Stage 1, the VAEs")
    data = f"--data {shlex.quote(train)} --val {shlex.quote(val)}"
    run_side_by_side(
        progress,
        f"train_vae.py {data} --out {OUT}/vae_send {vfm_flags} {VAE_FLAGS}",
        f"train_vae.py {data} --out {OUT}/vae_plain --align none {VAE_FLAGS}",
    )


def train_sits(train, progress):
    """5. Stage 2: the same SiT on the latents of each VAE."""
    progress.chapter("Stage 2, the SiTs")
    data = f"--data {shlex.quote(train)}"
    run_side_by_side(
        progress,
        f"train_sit.py {data} --vae {OUT}/vae_send --out {OUT}/sit_send {SIT_FLAGS}",
        f"train_sit.py {data} --vae {OUT}/vae_plain --out {OUT}/sit_plain {SIT_FLAGS}",
    )


def draw_samples(progress):
    """6. A set of samples from each SiT, the classes equally often."""
    progress.chapter("Samples")
    if all(os.path.exists(f"{OUT}/samples_{name}.npz") for name in VAES):
        progress.print("The sets are complete.")
        return
    run_side_by_side(
        progress,
        f"sample.py --sit {OUT}/sit_send --out {OUT}/samples_send.npz {SAMPLE_FLAGS} --overwrite",
        f"sample.py --sit {OUT}/sit_plain --out {OUT}/samples_plain.npz {SAMPLE_FLAGS} --overwrite",
    )


def save_picture(val_set, classes):
    """7. One picture of everything, 12 columns wide."""
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
        f"\n7. {OUT}/demo.png: originals; reconstructions of {VAES['send']} and of the VAE with "
        f"{VAES['plain']};\nthen 4 rows of samples of each, from left to right in the order of the "
        f"classes: {names}"
    )


def print_table(classes):
    """8. The numbers: what alignment costs (PSNR) and what it gives (latents that a SiT learns
    faster, hence a lower flow loss after the same steps; recognisable samples)."""
    print(f"\n{'VAE':14} {'PSNR, dB':>8} {'1 - cosine':>11} {'flow loss':>10} {SHARE_TITLE:>36}")
    for name, title in VAES.items():
        psnr = last_measurement(f"{OUT}/vae_{name}", "val_psnr")
        align = last_measurement(f"{OUT}/vae_{name}", "val_align")
        align_text = "-" if align is None else f"{align:.3f}"
        flow = last_measurement(f"{OUT}/sit_{name}", "flow")
        share = float("nan")
        if len(classes) > 1:
            pictures, labels = load_samples(name)
            share = stand_in.accuracy(JUDGE, pictures, labels, len(classes))
        print(f"{title:14} {psnr:8.2f} {align_text:>11} {flow:10.3f} {share:36.1%}")
    print("\nThe judge was trained on the classes of the pictures. No VAE was aligned to it.")


# --------------------------------------------------------------------------------------------------
# Running commands, and reading what they write


class Progress:
    """One bar over all chapters, which says at any time how long is left in all. Where the output
    is no terminal, such as a file, a line every 20 seconds takes its place."""

    def __init__(self):
        self.start = time.time()
        self.is_terminal = sys.stdout.isatty()
        self.line_length = 0  # of the bar, as long as it stands on the terminal
        self.next_line = self.start + 20
        # What was done in this run: how long it took, and how long after SECONDS. The first 20
        # seconds are added in advance, so that the start says little of the machine's speed.
        self.took = 20
        self.planned = 20
        self.title = None

    def chapter(self, title):
        """Prints a chapter's heading."""
        if self.title is not None:
            self.took, self.planned = self.so_far()
        self.title = title
        self.begun = time.time()
        # Of the chapter, how much is done, and how much of it was done before this run.
        self.share = 0.0
        self.share_before = None
        number = list(SECONDS).index(title) + 1
        self.print(f"\n{number}. {title}; about {self.seconds_left():.0f} s are left in all")

    def so_far(self):
        """-> took and planned, with what this run has done of the chapter."""
        if self.share_before is None or self.share == self.share_before:
            return self.took, self.planned
        share = self.share - self.share_before
        return self.took + time.time() - self.begun, self.planned + share * SECONDS[self.title]

    def seconds_left(self):
        """How long all that is left will take at the speed of what this run has done so far."""
        titles = list(SECONDS)
        later = titles[titles.index(self.title) + 1 :]
        planned = (1 - self.share) * SECONDS[self.title] + sum(SECONDS[title] for title in later)
        took, took_after_plan = self.so_far()
        return planned * took / took_after_plan

    def report(self, share, words):
        """Says that a share of the chapter is done, and draws the bar. words: about the work."""
        if self.share_before is None:
            self.share_before = share
        # A stage that was killed begins again at its last checkpoint.
        self.share_before = min(self.share_before, share)
        self.share = share
        left = self.seconds_left()
        done = 1 - left / (left + time.time() - self.start)
        minutes, seconds = divmod(round(left), 60)
        line = f"{done:4.0%} done, {minutes}:{seconds:02d} left in all; {words}"
        if self.is_terminal:
            filled = round(20 * done)
            marks = "#" * filled
            bar = marks.ljust(20, ".")
            line = f"[{bar}]{line}"
            line = line[: shutil.get_terminal_size().columns - 1]
            print("\r" + line.ljust(self.line_length), end="", flush=True)
            self.line_length = len(line)
        elif time.time() >= self.next_line:
            self.print(line)
            self.next_line = time.time() + 20

    def print(self, text):
        """Prints text in place of the bar, which the next report draws below it."""
        if self.line_length > 0:
            blank_line = "".ljust(self.line_length)
            print(f"\r{blank_line}\r", end="")
            self.line_length = 0
        print(text, flush=True)


def run_side_by_side(progress, *commands):
    """Prints commands such as "train_vae.py --steps 10 --out runs/vae" and runs them at once, each
    on its share of the cores: small networks gain little from a second core.

    Their output goes to a log beside --out, and the progress of the training stages is read from
    their metrics.jsonl. If one fails, so does the demo. A stage that has finished before says so
    and returns at once."""
    here = os.path.dirname(os.path.abspath(__file__))
    cores = max(1, available_cores() // len(commands))
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
    running = []
    for command in commands:
        words = shlex.split(command)
        log_path = value_of(words, "--out") + ".log"
        progress.print(f"\n$ python {shlex.join(words)}      # its output is in {log_path}")
        program = [sys.executable, os.path.join(here, words[0]), *words[1:]]
        with open(log_path, "a") as log:
            process = subprocess.Popen(program, stdout=log, stderr=log, env=environment)
        running.append((process, words, log_path))
    try:
        while not all_done(running):
            report_steps(progress, [words for _, words, _ in running])
            time.sleep(0.5)
    except KeyboardInterrupt:
        # The stages were interrupted too, and save a checkpoint.
        for process, _, _ in running:
            process.wait()
        raise


def value_of(words, flag):
    """-> the word after a flag in a command's words"""
    return words[words.index(flag) + 1]


def all_done(running):
    """Whether all of some processes, (process, its words, path of its log), have ended. Raises a
    UserError if one has failed, and ends the others."""
    codes = [process.poll() for process, _, _ in running]
    for code, (_, _, log_path) in zip(codes, running, strict=True):
        if code is not None and code != 0:
            for process, _, _ in running:
                process.kill()
            with open(log_path, errors="replace") as log:
                reason = log.read().strip().splitlines()[-1:]
            raise UserError(f"{log_path} ends with: {''.join(reason)}")
    return None not in codes


def report_steps(progress, runs):
    """Reports how far the commands of a chapter have come, given by their words."""
    if runs[0][0] == "sample.py":
        # It writes nothing before the end.
        share = (time.time() - progress.begun) / SECONDS[progress.title]
        progress.report(min(share, 0.95), "")
        return
    steps = int(value_of(runs[0], "--steps"))
    records = [last_losses(value_of(words, "--out")) for words in runs]
    share = min(record["step"] for record in records) / steps
    losses = [f"{key} {records[0][key]:.3f}" for key in LOSSES if key in records[0]]
    speed = records[0].get("images_per_s", 0)
    words = f"step {records[0]['step']} of {steps}"
    if losses:
        words += f": {', '.join(losses)}, {speed:.0f} pictures/s"
    progress.report(share, words)


def last_losses(folder):
    """-> the last record of a run's metrics.jsonl that has losses; step 0 if there is none."""
    record = {"step": 0}
    path = os.path.join(folder, "metrics.jsonl")
    if os.path.exists(path):
        with open(path) as file:
            for line in file:
                # The line that is being written may lack its end.
                if line.endswith("\n") and "images_per_s" in line:
                    record = json.loads(line)
    return record


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
