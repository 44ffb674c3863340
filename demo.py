"""All of Send-VAE in about ten minutes on two CPU cores, with nothing downloaded. Also the tutorial: each command it runs is
printed first, and can be typed by hand.

    python demo.py                                  # draws 6,600 pictures of objects, trains every stage on them
    python demo.py --data my_pictures               # the same on a folder of <class>/<picture>
    python demo.py --vfm vit_small_patch14_dinov2.lvd142m       # a real vision model from the hub instead of the stand-in

It trains a Send-VAE, the same VAE without alignment, a SiT on the latents of each, draws samples with guidance, and ends
with one picture, runs/demo/demo.png, and a table. What is done is not done again; delete runs/demo to start over.
"""
import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

import common
from models import load_vae
from tools.pictures import draw_pictures

OUT = "runs/demo"
STAND_IN = dict(name="test_resnet", stride=8)               # a tiny timm CNN; its map at stride 8 is the token grid
SIZE, GRID = 32, 8                                          # pictures of 32 x 32, latents and tokens 8 x 8 (an f4 VAE)
VAE_FLAGS = f"""--resolution {SIZE} --spec f4d8 --ch 32 --ch-mult 1 1 2 --num-res-blocks 1 --recon l1 --lpips 0 --gan 0
    --mapper-patch 1 --mapper-width 128 --mapper-hidden 256 --batch-size 8 --lr 2e-3 --lr-schedule cosine
    --warmup 50 --ema 0.98 --stats-images 2000 --val-images 400 --workers 1"""
SIT_FLAGS = """--patch 2 --depth 6 --width 128 --heads 4 --repa 0 --no-flip --batch-size 32 --lr 1.5e-3
    --lr-schedule cosine --warmup 50 --ema 0.995 --sample-every 2400 --workers 1"""
STEPS = dict(bf16=(1000, 5600), fp32=(600, 2400))           # VAE, SiT: what ten minutes hold with and without fast bf16
SAMPLE_FLAGS = "--num 240 --batch-size 60 --sampler ode --steps 40 --cfg 4 --interval 0 1"


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="your own folder of <class>/<picture> (default: drawn here)")
    p.add_argument("--vfm", help="any timm model with weights on the hub (default: a small stand-in, trained here)")
    p.add_argument("--vfm-weights", help="local file of its weights")
    p.add_argument("--vfm-stride", type=int, help="for a CNN: stride of the feature map")
    return p.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# Stand-in for the vision foundation model: a small timm network, trained here instead of downloaded

def load_all(data):
    """ImageSet -> pictures uint8 (N,3,S,S) and the attributes (N,A), 0 or 1, of a list in CelebA's format beside the
    folder; A is 0 where there is none."""
    pictures = data.stack(range(len(data)), SIZE)
    parent, split = os.path.split(data.root)
    path = os.path.join(parent, "list_attr_celeba.txt")
    if not os.path.exists(path):
        return pictures, torch.zeros(len(data), 0)
    with open(path) as file:
        rows = dict(line.split(maxsplit=1) for line in file.readlines()[2:])
    names = [f"{split}/{os.fsdecode(name)}" for name in data.names]
    return pictures, torch.tensor([[float(v == "1") for v in rows[name].split()] for name in names])


def build_stand_in(classes):
    """-> timm model, index of the feature map that serves as tokens, its width."""
    import timm
    model = timm.create_model(STAND_IN["name"], pretrained=False, num_classes=classes)
    layer = [f["reduction"] for f in model.feature_info].index(STAND_IN["stride"])
    return model, layer, model.feature_info[layer]["num_chs"]


def stand_in_forward(model, layer, x):
    """uint8 (B,3,S,S) -> features of the last layer (B,E), mean token (B,D); test_resnet's inputs are in [-1,1]."""
    x = F.interpolate(common.from_uint8(x), (GRID * STAND_IN["stride"],) * 2, mode="bicubic")
    x, (tokens,) = model.forward_intermediates(x, indices=[layer], norm=False, output_fmt="NCHW")
    return model.forward_head(x, pre_logits=True), tokens.mean((2, 3))


def train_stand_in(train, val, path, steps=300, batch=64, peak=4e-3):
    """Trains the stand-in to tell classes and attributes, also from its mean token, so that tokens hold what pictures
    differ in (one class without attributes: to tell quarter turns), and writes its weights in timm's own key names."""
    x, attributes = load_all(train)
    y, classes = torch.from_numpy(train.labels), len(train.classes)
    if classes == 1 and attributes.shape[1] == 0:
        x, y, classes = torch.cat([x.rot90(k, (2, 3)) for k in range(4)]), torch.arange(4).repeat_interleave(len(x)), 4
        attributes = torch.zeros(len(x), 0)
    torch.manual_seed(0)
    model, layer, width = build_stand_in(classes)
    heads = nn.ModuleList(nn.Linear(n, classes + attributes.shape[1]) for n in (model.head_hidden_size, width))
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], weight_decay=0.02, fused=True)
    order = torch.cat([torch.randperm(len(x)) for _ in range(steps * batch // len(x) + 1)])
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 60, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        rows = order[step * batch:(step + 1) * batch]
        pooled, token = stand_in_forward(model, layer, x[rows])
        loss = F.cross_entropy(model.get_classifier()(pooled), y[rows])
        for guess in (heads[0](pooled), heads[1](token)):
            loss = loss + F.cross_entropy(guess[:, :classes], y[rows])
            if attributes.shape[1]:
                loss = loss + 3 * F.binary_cross_entropy_with_logits(guess[:, classes:], attributes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"stand-in {STAND_IN['name']}: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    with common.writing(path) as file:
        save_file(model.state_dict(), file.name)
    share = stand_in_accuracy(path, load_all(val)[0], torch.from_numpy(val.labels), classes)
    print(f"stand-in: tells the class of {share:.1%} of the {len(val)} pictures in {val.root}")


@torch.no_grad()
def stand_in_accuracy(path, pictures, labels, classes):
    """Share of uint8 pictures (N,3,S,S) whose class the stand-in gives as their label (N,)."""
    from safetensors.torch import load_file
    model, layer, _ = build_stand_in(classes)
    model.load_state_dict(load_file(path))
    model.eval()
    logits = torch.cat([model.get_classifier()(stand_in_forward(model, layer, part)[0]) for part in pictures.split(256)])
    return (logits.argmax(1) == labels).float().mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# The tutorial

def command(script, flags, **paths):
    """The words of a stage's command, as one would type them after `python`."""
    named = [w for k, v in paths.items() if v is not None for w in (f"--{k.replace('_', '-')}", str(v))]
    return [script, *named, *flags.split()]


def call(*commands):
    """Runs commands side by side, each with its share of the cores: small networks gain little from a second one. The
    first writes to the terminal, the others to a log. Finished stages say so and return at once."""
    here = os.path.dirname(os.path.abspath(__file__))
    share = max(1, common.cores() // len(commands))
    running = []
    for i, words in enumerate(commands):
        print(f"\n$ python {shlex.join(words)}" + (f"      # beside it; its output: {OUT}/log.txt" if i else ""), flush=True)
        out = open(f"{OUT}/log.txt", "a") if i else None
        running.append(subprocess.Popen([sys.executable, os.path.join(here, words[0]), *words[1:]], stdout=out, stderr=out,
                                        env=dict(os.environ, OMP_NUM_THREADS=str(share))))
    for i, process in enumerate(running):
        if process.wait():
            for other in running:
                other.kill()
            if i:
                print(f"demo.py: error: {shlex.join(commands[i])} failed; its output is in {OUT}/log.txt", file=sys.stderr)
            sys.exit(process.returncode)


def last(folder, key):
    """The last value of a measurement in a run's metrics.jsonl, or None."""
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        return ([json.loads(line)[key] for line in file if f'"{key}"' in line] or [None])[-1]


@torch.no_grad()
def reconstruct(folder, pictures):
    """uint8 (B,3,S,S) -> uint8 (B,3,S,S) through the VAE of a run's folder."""
    vae = load_vae(folder)
    return common.to_uint8(vae.decode(vae.encode(common.from_uint8(pictures))[0]))


def main():
    args = parse_arguments()
    device, start = common.setup("cpu"), time.time()
    if args.data:
        train = val = args.data
    else:
        draw_pictures(f"{OUT}/pictures", SIZE)
        train, val = f"{OUT}/pictures/train", f"{OUT}/pictures/val"
    data, held_out = common.ImageSet(train), common.ImageSet(val)

    stand_in = f"{OUT}/stand_in.safetensors"
    if not os.path.exists(stand_in):
        print(f"\nNo pre-trained vision model can be had offline: a stand-in ({STAND_IN['name']}) is trained on these pictures. It "
              "knows only them;\n`--vfm NAME` takes a real one from the hub.", flush=True)
        train_stand_in(data, held_out, stand_in)
    teacher = dict(vfm=STAND_IN["name"], vfm_weights=stand_in, vfm_stride=STAND_IN["stride"])
    if args.vfm:
        teacher = dict(vfm=args.vfm, vfm_weights=args.vfm_weights, vfm_stride=args.vfm_stride)

    names = dict(send="Send-VAE", plain="no alignment")
    vae_steps, sit_steps = STEPS[common.resolve_precision("auto", device)]
    call(command("train_vae.py", VAE_FLAGS, data=train, val=val, steps=vae_steps, out=f"{OUT}/vae_send", **teacher),
         command("train_vae.py", VAE_FLAGS, data=train, val=val, steps=vae_steps, out=f"{OUT}/vae_plain", align="none"))
    call(*(command("train_sit.py", SIT_FLAGS, data=train, vae=f"{OUT}/vae_{n}", steps=sit_steps, out=f"{OUT}/sit_{n}") for n in names))
    if not all(os.path.exists(f"{OUT}/samples_{n}.npz") for n in names):
        call(*(command("sample.py", SAMPLE_FLAGS + " --overwrite", sit=f"{OUT}/sit_{n}", out=f"{OUT}/samples_{n}.npz")
               for n in names))

    chosen = np.linspace(0, len(held_out) - 1, 12).astype(int)
    originals = held_out.stack(chosen, SIZE)
    rows, classes = [originals, *(reconstruct(f"{OUT}/vae_{name}", originals) for name in names)], len(data.classes)
    table = []
    for name, title in names.items():
        with np.load(f"{OUT}/samples_{name}.npz") as file:
            pictures, labels = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(file["labels"])
        for k in range(4):                                  # 4 rows; class j fills the columns 2j and 2j+1
            rows.append(torch.stack([pictures[labels == j % classes][2 * k + i] for j in range(6) for i in (0, 1)]))
        told = stand_in_accuracy(stand_in, pictures, labels, classes) if classes > 1 else float("nan")
        table.append((title, last(f"{OUT}/vae_{name}", "val_psnr"), last(f"{OUT}/vae_{name}", "val_align"), told))
    common.save_grid(f"{OUT}/demo.png", rows)
    print(f"\n{OUT}/demo.png: originals; reconstructions of {names['send']} and of the VAE with {names['plain']}; then 4 rows of "
          f"samples of\neach, two columns a class: {', '.join(data.classes[:6])}\n")
    print(f"{'VAE':14} {'PSNR, dB':>9} {'1 - cosine':>11} {'samples told as their class by the stand-in':>45}")
    for title, psnr, align, told in table:
        print(f"{title:14} {psnr:9.2f} {f'{align:11.3f}' if align else '          -'} {told:45.1%}")
    print("\nThe stand-in is also what Send-VAE was aligned to, so its verdict on the samples is not impartial.")
    print(f"{time.time() - start:.0f} s. Next: python sample.py --cfg 1.5; your own pictures: see README.md")


if __name__ == "__main__":
    common.run(main)
