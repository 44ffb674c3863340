"""All of Send-VAE in five to ten minutes on two CPU cores, with nothing downloaded. Also the tutorial: each command it runs is
printed first, and can be typed by hand.

    python demo.py                                  # draws 6,600 pictures of objects, trains every stage on them
    python demo.py --data my_pictures               # the same on a folder of <class>/<picture>
    python demo.py --vfm vit_small_patch14_dinov2.lvd142m       # a real vision model from the hub instead of the stand-in

It trains a Send-VAE, the same VAE without alignment, a SiT on the latents of each, draws samples with guidance, and ends
with one picture, runs/demo/demo.png, and a table. What is done is not done again; delete runs/demo to start over.
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
from common.processes import available_cores, resolve_precision, run_main, setup
from common.weights import load_vae
from tools import stand_in
from tools.pictures import draw_pictures

OUT = "runs/demo"
SIZE = 32  # of pictures; latents and the vision model's tokens are 8 x 8
VAE_FLAGS = f"""--resolution {SIZE} --spec f4d8 --ch 32 --ch-mult 1 1 2 --num-res-blocks 1 --recon l1 --lpips 0 --gan 0
    --mapper-patch 1 --mapper-width 128 --mapper-hidden 256 --batch-size 8 --lr 2e-3 --lr-schedule cosine
    --warmup 50 --ema 0.98 --stats-images 2000 --val-images 400 --workers 1"""
SIT_FLAGS = """--patch 2 --depth 6 --width 128 --heads 4 --repa 0 --no-flip --batch-size 32 --lr 1.5e-3
    --lr-schedule cosine --warmup 50 --ema 0.995 --sample-every 2400 --workers 1"""
STEPS = dict(
    bf16=(1000, 5600), fp32=(600, 2400)
)  # VAE, SiT: what ten minutes hold with and without fast bf16
SAMPLE_FLAGS = "--num 240 --batch-size 60 --sampler ode --steps 40 --cfg 4 --interval 0 1"


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


# ----------------------------------------------------------------------------------------------------------------------
# The tutorial


def command(script, flags, **paths):
    """The words of a stage's command, as one would type them after `python`."""
    named = [
        w for k, v in paths.items() if v is not None for w in (f"--{k.replace('_', '-')}", str(v))
    ]
    return [script, *named, *flags.split()]


def call(*commands):
    """Runs commands side by side, each with its share of the cores: small networks gain little from a second one. The
    first writes to the terminal, the others to a log. Finished stages say so and return at once."""
    here = os.path.dirname(os.path.abspath(__file__))
    share = max(1, available_cores() // len(commands))
    running = []
    for i, words in enumerate(commands):
        print(
            f"\n$ python {shlex.join(words)}"
            + (f"      # beside it; its output: {OUT}/log.txt" if i else ""),
            flush=True,
        )
        out = open(f"{OUT}/log.txt", "a") if i else None
        running.append(
            subprocess.Popen(
                [sys.executable, os.path.join(here, words[0]), *words[1:]],
                stdout=out,
                stderr=out,
                env=dict(os.environ, OMP_NUM_THREADS=str(share)),
            )
        )
    for i, process in enumerate(running):
        if process.wait():
            for other in running:
                other.kill()
            if i:
                print(
                    f"demo.py: error: {shlex.join(commands[i])} failed; its output is in {OUT}/log.txt",
                    file=sys.stderr,
                )
            sys.exit(process.returncode)


def last(folder, key):
    """The last value of a measurement in a run's metrics.jsonl, or None."""
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        return ([json.loads(line)[key] for line in file if f'"{key}"' in line] or [None])[-1]


@torch.no_grad()
def reconstruct(folder, pictures):
    """uint8 (B,3,S,S) -> uint8 (B,3,S,S) through the VAE of a run's folder."""
    vae = load_vae(folder)
    return to_uint8(vae.decode(vae.encode(from_uint8(pictures))[0]))


def main():
    args = parse_arguments()
    device, start = setup("cpu"), time.time()
    if args.data:
        train = val = args.data
    else:
        draw_pictures(f"{OUT}/pictures", SIZE)
        train, val = f"{OUT}/pictures/train", f"{OUT}/pictures/val"
    data, held_out = ImageSet(train), ImageSet(val)

    weights = f"{OUT}/stand_in.safetensors"
    if not os.path.exists(weights):
        print(
            f"\nNo pre-trained vision model can be had offline: a stand-in ({stand_in.NAME}) is trained on these pictures. It "
            "knows only them;\n`--vfm NAME` takes a real one from the hub.",
            flush=True,
        )
        stand_in.fit(data, held_out, SIZE, weights)
    teacher = dict(vfm=stand_in.NAME, vfm_weights=weights, vfm_stride=stand_in.STRIDE)
    if args.vfm:
        teacher = dict(vfm=args.vfm, vfm_weights=args.vfm_weights, vfm_stride=args.vfm_stride)

    names = dict(send="Send-VAE", plain="no alignment")
    vae_steps, sit_steps = STEPS[resolve_precision("auto", device)]
    call(
        command(
            "train_vae.py",
            VAE_FLAGS,
            data=train,
            val=val,
            steps=vae_steps,
            out=f"{OUT}/vae_send",
            **teacher,
        ),
        command(
            "train_vae.py",
            VAE_FLAGS,
            data=train,
            val=val,
            steps=vae_steps,
            out=f"{OUT}/vae_plain",
            align="none",
        ),
    )
    call(
        *(
            command(
                "train_sit.py",
                SIT_FLAGS,
                data=train,
                vae=f"{OUT}/vae_{n}",
                steps=sit_steps,
                out=f"{OUT}/sit_{n}",
            )
            for n in names
        )
    )
    if not all(os.path.exists(f"{OUT}/samples_{n}.npz") for n in names):
        call(
            *(
                command(
                    "sample.py",
                    SAMPLE_FLAGS + " --overwrite",
                    sit=f"{OUT}/sit_{n}",
                    out=f"{OUT}/samples_{n}.npz",
                )
                for n in names
            )
        )

    chosen = np.linspace(0, len(held_out) - 1, 12).astype(int)
    originals = held_out.stack(chosen, SIZE)
    rows, classes = (
        [originals, *(reconstruct(f"{OUT}/vae_{name}", originals) for name in names)],
        len(data.classes),
    )
    table = []
    for name, title in names.items():
        with np.load(f"{OUT}/samples_{name}.npz") as file:
            pictures, labels = (
                torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2),
                torch.from_numpy(file["labels"]),
            )
        for k in range(4):  # 4 rows; class j fills the columns 2j and 2j+1
            rows.append(
                torch.stack(
                    [pictures[labels == j % classes][2 * k + i] for j in range(6) for i in (0, 1)]
                )
            )
        told = (
            stand_in.accuracy(weights, pictures, labels, classes) if classes > 1 else float("nan")
        )
        table.append(
            (
                title,
                last(f"{OUT}/vae_{name}", "val_psnr"),
                last(f"{OUT}/vae_{name}", "val_align"),
                told,
            )
        )
    save_grid(f"{OUT}/demo.png", rows)
    print(
        f"\n{OUT}/demo.png: originals; reconstructions of {names['send']} and of the VAE with {names['plain']}; then 4 rows of "
        f"samples of\neach, two columns a class: {', '.join(data.classes[:6])}\n"
    )
    print(
        f"{'VAE':14} {'PSNR, dB':>9} {'1 - cosine':>11} {'samples told as their class by the stand-in':>45}"
    )
    for title, psnr, align, told in table:
        print(f"{title:14} {psnr:9.2f} {f'{align:11.3f}' if align else '          -'} {told:45.1%}")
    print(
        "\nThe stand-in is also what Send-VAE was aligned to, so its verdict on the samples is not impartial."
    )
    print(
        f"{time.time() - start:.0f} s. Next: python sample.py --cfg 1.5; your own pictures: see README.md"
    )


if __name__ == "__main__":
    run_main(main)
