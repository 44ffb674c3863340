"""Measures on small pictures what the details of the recipe move in which our defaults and the
published code differ, or did (docs/differences.md).

    python -m bench.recipe --data data/cifar10 --vfm-weights WEIGHTS.safetensors  # all, then tables
    python -m bench.recipe ... --only no-flip    # these, and what they are compared with
    python -m bench.recipe ... --list            # print the commands, run nothing
    python -m bench.recipe --report              # the tables of the runs that exist
    python -m bench.recipe --gradients --lpips-weights VGG LINEAR  # of the losses, after the runs

A base VAE is trained without alignment. Then each run tunes it with other flags or another seed,
400 steps of 8 pictures; one takes about a minute of one core. The network, the vision
model and the mapper are those of study/run.py. Everything is written to runs/recipe, with a log of
each run under log/. It may be stopped at any time: rerun the same command to go on.

--gradients compares the gradients of LPIPS and discriminator by the reconstructions in fp32 with
those under bf16 autocast, and those of LPIPS with and without --lpips-rescale. The discriminator is
that of the run `gan`. Without --lpips-weights VGG16 has random weights.
"""

import argparse
import json
import os
import tempfile
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch

from bench.speed import write_random_lpips
from common.files import UserError
from common.flags import parse_flags, positive
from common.pictures import from_uint8
from common.processes import autocast, available_cores, run_main, say, setup
from common.published import load_discriminator
from common.runs import lock
from common.weights import load_vae
from fid import Pictures
from models import LPIPS
from study.run import MAPPER, NETWORK, Command, Job, run_jobs
from study.text import pooled_spread

OUT = "runs/recipe"
BASE_STEPS = 2000
TUNING_STEPS = 400
SHARED = (
    "--resolution 32 --val-images 1000 --stats-images 2000 --recon l1 --lpips 0 --batch-size 8 "
    "--lr-schedule cosine --warmup 100 --ema 0.999 --save-every 100000 --sample-every 100000 "
    "--workers 0"
)
PLAIN = "--gan 0 --precision fp32"
# In bf16, as on a GPU: --autocast-losses means something there only.
GAN = "--gan 0.1 --precision bf16"
# Of the run gan-0, for its discriminator.
GAN_CHECKPOINT = f"{OUT}/gan-0/checkpoints/{TUNING_STEPS:09d}.pt"


class Recipe(NamedTuple):
    """How a VAE is tuned."""

    # The name of the recipe that it is compared with; its own if it is such a recipe.
    reference: str
    # Flags that the reference has, too.
    common: str
    # Flags in which it differs from the reference.
    flags: str


RECIPES = {
    "default": Recipe("default", PLAIN, ""),
    "running-norm": Recipe("default", PLAIN, "--mapper-norm running"),
    "no-flip": Recipe("default", PLAIN, "--no-flip"),
    "clip-together": Recipe("default", PLAIN, "--clip-together"),
    "torch-init": Recipe("default", PLAIN, "--mapper-init torch"),
    "gan": Recipe("gan", GAN, ""),
    # That of the VAE.
    "disc-lr": Recipe("gan", GAN, "--disc-lr 1e-3"),
    "init-disc": Recipe("gan", GAN, f"--init-disc {GAN_CHECKPOINT}"),
    "autocast-losses": Recipe("gan", GAN, "--autocast-losses"),
    "no-ema-warmup": Recipe("default", PLAIN, "--no-ema-warmup"),
}

# Name in metrics.jsonl -> (heading, digits after the point).
MEASURES = {
    "val_psnr": ("PSNR, dB", 3),
    "val_align": ("alignment loss", 4),
    "disc": ("discriminator's loss", 3),
}


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", default="data/cifar10", help="folder with train/ and test/")
    p.add_argument(
        "--vfm-weights", help="local file of tf_efficientnet_lite0 (default: timm's hub)"
    )
    p.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    p.add_argument("--seeds", type=positive, default=3, help="of what the others are compared with")
    p.add_argument("--variant-seeds", type=positive, default=2, help="of each of the others")
    p.add_argument("--jobs", type=positive, default=available_cores(), help="runs side by side")
    p.add_argument("--list", action="store_true", help="print the commands, run nothing")
    p.add_argument("--report", action="store_true", help="print the tables, run nothing")
    p.add_argument("--gradients", action="store_true", help="compare gradients of the losses")
    p.add_argument("--lpips-weights", nargs="+", help="local files of VGG16 and the linear layers")
    return parse_flags(p, argv)


# --------------------------------------------------------------------------------------------------
# Runs


def plan(args):
    """All runs as {name: Job}: the first seeds of every recipe come before all second ones."""
    wanted = {*args.only, *(RECIPES[name].reference for name in args.only)}
    chosen = [name for name in RECIPES if name in wanted]
    jobs = {"base": base_job(args)}
    for seed in range(max(args.seeds, args.variant_seeds)):
        for name in chosen:
            is_reference = RECIPES[name].reference == name
            if seed < (args.seeds if is_reference else args.variant_seeds):
                jobs[run_name(name, seed)] = tuning_job(args, name, seed)
    return jobs


def run_name(recipe, seed):
    return f"{recipe}-{seed}"


def training(args, flags, steps, name):
    """The Command of a training run of this name."""
    data = f"--data {args.data}/train --val {args.data}/test"
    folder = f"{OUT}/{name}"
    words = f"train_vae.py {data} {SHARED} {flags} --steps {steps} --out {folder}"
    return Command(words, f"{folder}/checkpoints/{steps:09d}.pt")


def base_job(args):
    flags = f"{NETWORK} --align none {PLAIN} --lr 2e-3"
    return Job([], [training(args, flags, BASE_STEPS, "base")])


def tuning_job(args, name, seed):
    recipe = RECIPES[name]
    weights = f" --vfm-weights {args.vfm_weights}" if args.vfm_weights else ""
    flags = f"{MAPPER}{weights} --init {OUT}/base --lr 1e-3 --seed {seed} {recipe.common}"
    after = ["base"]
    if "--init-disc" in recipe.flags:
        after.append(run_name(recipe.reference, 0))
    return Job(
        after, [training(args, f"{flags} {recipe.flags}", TUNING_STEPS, run_name(name, seed))]
    )


def run_all(args):
    os.makedirs(f"{OUT}/log", exist_ok=True)
    lock(OUT)
    failed = run_jobs(plan(args), args.jobs, 1, OUT)
    report(OUT)
    if failed:
        raise UserError(f"{len(failed)} runs failed, the first is '{failed[0]}'; see {OUT}/log")


# --------------------------------------------------------------------------------------------------
# Report


def read_run(folder):
    """{measure: number} of a finished run, None of any other. The losses are means over the second
    half of training, and the measures of held-out pictures those of its end."""
    if not os.path.exists(f"{folder}/checkpoints/{TUNING_STEPS:09d}.pt"):
        return None
    with open(f"{folder}/metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    found = {}
    for measure in MEASURES:
        values = [line[measure] for line in lines if measure in line]
        if measure.startswith("val_"):
            values = values[-1:]
        if values:
            found[measure] = np.mean(values[len(values) // 2 :])
    return found


def read_recipe(out, name):
    """The read_run of every finished run of a recipe, one for each seed."""
    found = []
    while (run := read_run(f"{out}/{run_name(name, len(found))}")) is not None:
        found.append(run)
    return found


def difference(reference, variant, spread, freedom):
    """The difference of the means of two lists of numbers, and half its 95% interval by Student's
    t."""
    factor = scipy.stats.t.ppf(0.975, freedom) if freedom else np.nan
    half = factor * spread * np.sqrt(1 / len(reference) + 1 / len(variant))
    return np.mean(variant) - np.mean(reference), half


def report(out):
    """Prints a table for each recipe that others are compared with."""
    for reference in RECIPES:
        names = [name for name, recipe in RECIPES.items() if recipe.reference == reference]
        runs = {name: read_recipe(out, name) for name in names}
        runs = {name: found for name, found in runs.items() if found}
        if reference in runs:
            print("\n".join(table(reference, runs)), end="\n\n")


def table(reference, runs):
    """The lines of a Markdown table. runs: {name of a recipe: [read_run of each seed]}, those of
    the reference among them."""
    measures = [measure for measure in MEASURES if measure in runs[reference][0]]
    values = {}
    for measure in measures:
        values[measure] = {name: [run[measure] for run in found] for name, found in runs.items()}
    spreads = {measure: pooled_spread(list(values[measure].values())) for measure in measures}
    headings = [f"{MEASURES[measure][0]} | difference" for measure in measures]
    lines = [
        f"| recipe | flags | seeds | {' | '.join(headings)} |",
        "| --- | --- | ---: |" + " ---: |" * 2 * len(measures),
    ]
    for name, found in runs.items():
        cells = [f"`{name}`", f"`{RECIPES[name].flags}`" if RECIPES[name].flags else "", len(found)]
        for measure in measures:
            cells += measure_cells(measure, values[measure], spreads[measure], reference, name)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def measure_cells(measure, values, spread, reference, name):
    """A recipe's mean, and its difference from the reference with half the 95% interval; of the
    reference itself the mean, and the range of its seeds. values: {name: [number of each seed]}."""
    _, digits = MEASURES[measure]
    mean = f"{np.mean(values[name]):.{digits}f}"
    if name == reference:
        return mean, f"seeds {min(values[name]):.{digits}f} to {max(values[name]):.{digits}f}"
    change, half = difference(values[reference], values[name], *spread)
    return mean, f"{change:+.{digits}f} ± {half:.{digits}f}"


# --------------------------------------------------------------------------------------------------
# Gradients


def gradient(loss, images):
    """The gradient of a function from images (B,3,H,W) to a scalar, (B,3,H,W)."""
    images = images.detach().clone().requires_grad_()
    loss(images).backward()
    return images.grad


def compare(found, wanted):
    """Two gradients (B,3,H,W) -> (relative difference, cosine), as vectors of all their numbers."""
    found = found.flatten().double()
    wanted = wanted.flatten().double()
    relative = (found - wanted).norm() / wanted.norm()
    cosine = found @ wanted / (found.norm() * wanted.norm())
    return relative.item(), cosine.item()


def under_autocast(loss):
    """The function `loss` under bf16 autocast."""

    def function(images):
        with autocast(images.device, "bf16"):
            return loss(images)

    return function


@torch.no_grad()
def reconstructions(vae, data, count):
    """Held-out pictures and their reconstructions, each (count,3,H,W)."""
    held_out = Pictures(f"{data}/test", count, vae.resolution)
    pictures = [batch for _, batch in held_out.batches(torch.device("cpu"), 0)]
    x = from_uint8(torch.cat(pictures))
    return x, vae.decode(vae.encode(x)[0])


def make_lpips(weights):
    """(LPIPS without, with rescaling), with random weights if there are none."""
    with tempfile.TemporaryDirectory() as folder:
        if not weights:
            torch.manual_seed(0)
            weights = [write_random_lpips(os.path.join(folder, "lpips.pth"))]
        return LPIPS(weights), LPIPS(weights, rescale=True)


def gradients(args):
    """Prints how much the gradients of LPIPS and discriminator change, as a Markdown table."""
    setup("cpu")
    vae = load_vae(f"{OUT}/base").eval()
    x, y = reconstructions(vae, args.data, 64)
    plain, rescaled = make_lpips(args.lpips_weights)
    discriminator = load_discriminator(GAN_CHECKPOINT).train().requires_grad_(False)
    losses = {
        "LPIPS": lambda images: plain(images, x).mean(),
        "LPIPS, rescaled": lambda images: rescaled(images, x).mean(),
        "discriminator": lambda images: -discriminator(images).mean(),
    }
    exact = {name: gradient(loss, y) for name, loss in losses.items()}
    pairs = {}
    for name, loss in losses.items():
        pairs[f"{name}: bf16 instead of fp32"] = gradient(under_autocast(loss), y), exact[name]
    pairs["LPIPS: rescaled instead of not"] = exact["LPIPS, rescaled"], exact["LPIPS"]
    print("| gradient by the reconstructions | relative difference | cosine |")
    print("| --- | ---: | ---: |")
    for name, (found, wanted) in pairs.items():
        relative, cosine = compare(found, wanted)
        print(f"| {name} | {relative:.3f} | {cosine:.4f} |")


def main():
    args = parse_arguments()
    if args.gradients:
        gradients(args)
    elif args.report:
        report(OUT)
    elif args.list:
        for name, job in plan(args).items():
            say(f"# {name}\npython {job.commands[0].words}")
    else:
        run_all(args)


if __name__ == "__main__":
    run_main(main)
