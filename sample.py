"""Draw pictures from a trained SiT: a grid to look at, or a set (.npz) to compute FID on.

    dx = [v - w/2 s] dt + sqrt(w) dW, run from t = 1 (noise) to 0 (data); score s = -((1-t) v + x) / t, w(t) = 2t
    (SDE, Euler-Maruyama, as REPA), or dx = v dt (ODE, Euler or Heun), on normalised latents, in float64 steps.
    Guidance: v <- v_null + cfg (v_class - v_null), while t is inside --interval.

    python sample.py --cfg 1.5                                             # grid of 8 classes x 8, newest SiT under runs/
    python sample.py --classes 207 360 --n 16 --out grid.png               # numbers or folder names of classes
    torchrun --nproc_per_node=8 sample.py --num-images 50000 --cfg 1 --out samples.npz

Picture i of a set is a function of (--seed, i) alone: not of the batch size, nor of the number of processes. An
interrupted set goes on where it was, with the same command.
"""

import argparse
import glob
import json
import os
import shutil

import numpy as np
import torch
from tqdm import tqdm

from common.draws import normal, uniform
from common.files import UserError, reading, write_json, writing
from common.flags import add_machine_flags, parse_flags, positive, whole_number
from common.pictures import save_grid, to_uint8
from common.processes import (
    autocast,
    barrier,
    conv_memory_format,
    rank,
    resolve_precision,
    run_main,
    say,
    setup,
    stop_at_signal,
    world,
)
from common.runs import lock, mark_done, newest_result, provenance, resumable_array
from common.weights import load_sit, load_vae


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    g = p.add_argument_group("what")
    g.add_argument("--sit", help="sit.safetensors or run folder (default: the newest under runs/)")
    g.add_argument(
        "--vae", help="vae.safetensors or run folder (default: the one the SiT was trained on)"
    )
    g.add_argument("--raw", action="store_true", help="raw weights instead of the EMA ones")
    g.add_argument(
        "--classes", nargs="+", help="grid: numbers or folder names (default: 8 spread over all)"
    )
    g.add_argument("--n", type=positive, default=8, help="grid: pictures of each class")
    g.add_argument(
        "--num",
        "--num-images",
        type=positive,
        help="set: number of pictures (under torchrun write --num-images: "
        "it takes --num for an abbreviation of its own --numa-binding)",
    )
    g.add_argument(
        "--labels",
        choices=["equal", "random"],
        default="equal",
        help="set: every class equally often, or drawn at random; moves FID, so it is written into the result",
    )
    g.add_argument(
        "--out", help=".png or .npz (default: grid.png or samples.npz in the SiT's folder)"
    )
    g.add_argument(
        "--overwrite",
        action="store_true",
        help="set: do not go on with an interrupted one, and replace --out",
    )
    g.add_argument(
        "--batch-size", type=positive, default=64, help="pictures a process draws at once"
    )
    g = p.add_argument_group("sampler")
    g.add_argument("--sampler", choices=["sde", "ode", "heun"], default="sde")
    g.add_argument(
        "--steps",
        type=lambda text: whole_number(text, least=2),
        default=250,
        help="of the integration (Heun: two evaluations each)",
    )
    g.add_argument("--cfg", type=float, default=2.5, help="guidance scale; 1: none")
    g.add_argument(
        "--interval",
        type=float,
        nargs=2,
        default=[0.0, 0.75],
        metavar=("LO", "HI"),
        help="times with guidance",
    )
    add_machine_flags(p)
    return parse_flags(p, argv)


# ----------------------------------------------------------------------------------------------------------------------
# Samplers


def guided_velocity(sit, x, t, y, cfg=1.0, interval=(0.0, 1.0)):
    """v at x (B,C,h,w), time t (a float), labels y (B,). The null half is computed only inside the interval.
    Guiding v is guiding the SDE's drift: at fixed x and t the drift is affine in v, and the weights sum to 1."""
    times = torch.full((len(x),), t, device=x.device)
    if cfg == 1.0 or not interval[0] <= t <= interval[1]:
        return sit(x, times, y)
    null = torch.full_like(y, sit.num_classes)
    v, v_null = sit(torch.cat([x, x]), torch.cat([times, times]), torch.cat([y, null])).chunk(2)
    return v_null + cfg * (v - v_null)


def integrate(velocity, x, sampler="sde", steps=250, noise=None):
    """Takes noise x (B,C,h,w) at t = 1 to data at t = 0 -> float64 latents. velocity(x float32, t float) -> v.
    SDE: `steps` times from 1 to 0.04, then one noiseless step to 0; noise(i) -> standard normal of x's shape for step i.
    """
    x = x.double()
    times = (
        [*np.linspace(1, 0.04, steps), 0.0] if sampler == "sde" else np.linspace(1, 0, steps + 1)
    )
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        t, dt = float(t), float(t_next - t)
        v = velocity(x.float(), t).double()
        if sampler == "ode":
            x = x + dt * v
        elif sampler == "heun":
            predicted = x + dt * v
            x = (
                predicted
                if t_next == 0
                else x + dt * (v + velocity(predicted.float(), float(t_next)).double()) / 2
            )
        else:
            score = -((1 - t) * v + x) / t
            x = x + dt * (v - t * score)  # w/2 = t
            if t_next > 0:
                x = x + (2 * t * -dt) ** 0.5 * noise(i).double()
    return x


@torch.no_grad()
def draw(
    sit, vae, ids, labels, seed, precision, sampler="sde", steps=250, cfg=2.5, interval=(0.0, 0.75)
):
    """Picture ids (B,) and labels (B,) on the device -> uint8 (B,3,H,W)."""
    shape = (sit.channels, sit.latent_size, sit.latent_size)
    with autocast(ids.device, precision):
        z = integrate(
            lambda x, t: guided_velocity(sit, x, t, labels, cfg, interval),
            normal(seed, "sample start", ids, shape),
            sampler,
            steps,
            lambda i: normal(seed, f"sample step {i}", ids, shape),
        )
        return to_uint8(vae.decode(vae.denormalize(z.float())))


# ----------------------------------------------------------------------------------------------------------------------
# Loading, labels, sets


def load_pair(sit_path, vae_path, device, ema=True):
    """-> SiT and the VAE it was trained on; another VAE is refused. A published SiT knows no VAE's hash, but may hold the
    latent statistics it was trained with, which then count."""
    sit = load_sit(sit_path, device, ema)
    where = vae_path or sit.info["vae_path"]
    if not where or not vae_path and not where.startswith("hf:") and not os.path.exists(where):
        raise UserError(
            f"{sit_path} was trained on the VAE {where or 'of its paper'}, which is not there; name it with --vae"
        )
    vae = load_vae(where, device)
    if sit.info["vae_hash"] is None:
        if sit.channels != vae.channels:
            raise UserError(
                f"{sit_path} needs latents of {sit.channels} channels, but {where} has {vae.channels}"
            )
        if sit.info["latent_mean"]:
            vae.latent_mean.copy_(torch.tensor(sit.info["latent_mean"]))
            vae.latent_std.copy_(torch.tensor(sit.info["latent_std"]))
        vae.set_resolution(sit.latent_size * vae.factor)
    elif vae.info["hash"] != sit.info["vae_hash"]:
        raise UserError(
            f"{where} (hash {vae.info['hash']}) is not the VAE that {sit_path} was trained on (hash "
            f"{sit.info['vae_hash']}, then at {sit.info['vae_path']}): its latents mean something else"
        )
    return sit, vae


def class_numbers(names, sit):
    """Class numbers or folder names -> list of ints."""
    known = sit.info.get("classes") or []
    numbers = {str(i): i for i in range(sit.num_classes)} | {
        name: i for i, name in enumerate(known)
    }
    for name in names:
        if name not in numbers:
            raise UserError(
                f"--classes {name}: the SiT knows the numbers 0 to {sit.num_classes - 1}"
                + (f" and names such as {', '.join(known[:4])}" if known else "")
            )
    return [numbers[name] for name in names]


def set_labels(kind, ids, num_classes, seed):
    """Labels (B,) of pictures ids (B,) of a set."""
    if kind == "equal":
        return ids % num_classes
    return (uniform(seed, "sample label", ids).double() * num_classes).long()


def refuse_other(path, old, settings):
    """A set is gone on with, or taken for done, only where it has the settings asked for."""
    differ = [
        f"{k} was {old.get(k)} and is now {v}"
        for k, v in settings.items()
        if k != "provenance" and old.get(k) != v
    ]
    if differ:
        raise UserError(
            f"{path} is already there, with other settings: {'; '.join(differ)}; use the same, name another --out, or "
            "replace it with --overwrite"
        )


def draw_set(sit, vae, args, device, precision, settings):
    """--num pictures into args.out: arr_0 uint8 (N,H,W,3), labels (N,), settings as JSON. The pictures grow in a folder
    beside it; blocks that are done are marked, so that a killed run loses at most one block a process."""
    parts, size = args.out + ".parts", vae.resolution
    if os.path.exists(args.out) and not args.overwrite:
        with (
            reading(args.out, "a set of ours (--overwrite replaces it)"),
            np.load(args.out, allow_pickle=False) as file,
        ):
            refuse_other(args.out, json.loads(str(file["settings"])), settings)
        shutil.rmtree(parts, ignore_errors=True)  # a kill may come when the set is written
        return say(f"done      {args.out} has its {args.num} pictures already")
    stop_at_signal()
    lock(parts)
    if rank() == 0:
        record = os.path.join(parts, "settings.json")
        if args.overwrite:
            for path in glob.glob(os.path.join(glob.escape(parts), "*")):
                os.remove(path)
        if os.path.exists(record):
            with (
                reading(record, "the settings of an interrupted set; remove its folder"),
                open(record) as file,
            ):
                refuse_other(parts, json.load(file), settings)
        else:
            write_json(record, settings)
    pictures, done, todo = resumable_array(
        parts, "pictures.npy", np.uint8, (args.num, size, size, 3), args.batch_size
    )
    if len(todo) < len(done):
        say(f"resuming {parts}: {len(done) - len(todo)} of {len(done)} blocks are done")
    bar = tqdm(todo[rank() :: world()], disable=rank() > 0, unit="batch")
    for block in bar:
        ids = torch.arange(
            block * args.batch_size, min((block + 1) * args.batch_size, args.num), device=device
        )
        labels = set_labels(args.labels, ids, sit.num_classes, args.seed)
        x = draw(
            sit,
            vae,
            ids,
            labels,
            args.seed,
            precision,
            args.sampler,
            args.steps,
            args.cfg,
            args.interval,
        )
        pictures[ids[0].item() : ids[-1].item() + 1] = x.permute(0, 2, 3, 1).cpu().numpy()
        mark_done(pictures, done, block)
    barrier()
    if rank() == 0:
        labels = set_labels(args.labels, torch.arange(args.num), sit.num_classes, args.seed).numpy()
        with writing(args.out) as file:
            np.savez(file, arr_0=pictures, labels=labels, settings=np.array(json.dumps(settings)))
        shutil.rmtree(parts)
        say(f"{args.num} pictures: {args.out}")


def main():
    args = parse_arguments()
    device = setup(args.device)
    precision = resolve_precision(args.precision, device)
    path = args.sit or os.path.dirname(
        newest_result("sit.safetensors", "SiT", "python train_sit.py")
    )
    sit, vae = load_pair(path, args.vae, device, ema=not args.raw)
    vae.to(memory_format=conv_memory_format(device, precision))
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    args.out = args.out or os.path.join(folder, "samples.npz" if args.num else "grid.png")
    if args.out.endswith(".npz") != bool(args.num) or not args.out.endswith((".npz", ".png")):
        raise UserError(
            f"--out {args.out}: a set (--num) is a .npz file, a grid (--classes, --n) a .png"
        )
    settings = dict(
        sampler=args.sampler,
        steps=args.steps,
        cfg=args.cfg,
        interval=args.interval,
        labels=args.labels,
        seed=args.seed,
        num=args.num,
        batch_size=args.batch_size,
        precision=precision,
        weights=sit.info["weights"],
        sit_step=sit.info["step"],
        sit_hash=sit.info["hash"],
        vae_hash=vae.info["hash"],
        resolution=vae.resolution,
        provenance=provenance(),
    )
    say(
        f"SiT       {path}, {settings['weights']} weights of step {sit.info['step']}; VAE {vae.info['path']}; {precision} on "
        f"{device}\nsampler   {args.sampler}, {args.steps} steps, cfg {args.cfg} for t in {args.interval}"
    )
    if args.compile if args.compile is not None else device.type == "cuda":
        sit.forward, vae.decode = torch.compile(sit.forward), torch.compile(vae.decode)
    if args.num:
        return draw_set(sit, vae, args, device, precision, settings)

    k = sit.num_classes
    classes = (
        class_numbers(args.classes, sit)
        if args.classes
        else [i * k // min(k, 8) for i in range(min(k, 8))]
    )
    if rank() == 0:
        ids = torch.arange(len(classes) * args.n, device=device)
        labels = torch.tensor(classes, device=device).repeat_interleave(args.n)
        chunks = tqdm(zip(ids.split(args.batch_size), labels.split(args.batch_size)), unit="batch")
        x = torch.cat(
            [
                draw(
                    sit,
                    vae,
                    i,
                    y,
                    args.seed,
                    precision,
                    args.sampler,
                    args.steps,
                    args.cfg,
                    args.interval,
                )
                for i, y in chunks
            ]
        )
        save_grid(args.out, x.split(args.n))
        names = sit.info.get("classes") or classes
        say(
            f"{len(x)} pictures: {args.out}, a row each of "
            + ", ".join(str(names[c]) for c in classes)
        )
    barrier()


if __name__ == "__main__":
    run_main(main)
