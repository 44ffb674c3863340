"""Draw pictures from a trained SiT: a grid to look at, or a set to compute FID on, as one .npz or
as a folder of PNG files.

    dx = [v - w/2 s] dt + sqrt(w) dW, run from t = 1 (noise) to 0 (data); score
    s = -((1-t) v + x) / t, w(t) = 2t (SDE, Euler-Maruyama, as REPA), or dx = v dt (ODE, Euler or
    Heun), on normalised latents, in float64 steps.
    Guidance: v <- v_null + cfg (v_class - v_null), while t is inside --interval.

    python sample.py --cfg 1.5          # a grid of 8 classes x 8, from the newest SiT under runs/
    python sample.py --classes 207 360 --n 16 --out grid.png    # numbers or folder names of classes
    torchrun --nproc_per_node=8 sample.py --num-images 50000 --cfg 1 --out samples.npz
    python sample.py --num-images 5000 --out samples            # samples/<class>/<id>.png

Picture i of a set depends on (--seed, i) alone, not on the batch size or the number of processes.
Rerun a command to resume an interrupted set.
"""

import argparse
import glob
import itertools
import json
import math
import os
import shutil
import unicodedata

import numpy as np
import torch
from PIL import Image

from common.draws import normal, uniform
from common.files import UserError, reading, refuse_unwritable, write_json, writing
from common.flags import (
    COMPILING,
    add_machine_flags,
    parse_flags,
    positive,
    two_or_more,
    wants_compile,
)
from common.pictures import save_grid, to_uint8
from common.processes import (
    autocast,
    barrier,
    conv_memory_format,
    progress,
    rank,
    resolve_precision,
    run_main,
    say,
    setup,
    stop_at_signal,
    world,
)
from common.published import SIT_FORMATS
from common.runs import lock, mark_done, newest_result, provenance, resumable_array
from common.weights import load_sit, load_vae
from models import compile_network


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    g = p.add_argument_group("networks and pictures")
    g.add_argument("--sit", help="sit.safetensors or run folder (default: the newest under runs/)")
    g.add_argument(
        "--vae", help="vae.safetensors or run folder (default: the one the SiT was trained on)"
    )
    g.add_argument(
        "--sit-format",
        choices=SIT_FORMATS,
        default="auto",
        help="convention of time and sign of a published SiT: the original SiT's, or REPA's",
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
        help="set: number of pictures (under torchrun write --num-images, "
        "because torchrun takes --num for an abbreviation of its own --numa-binding)",
    )
    g.add_argument(
        "--labels",
        choices=["equal", "random"],
        default="equal",
        help="set: every class equally often, or drawn at random; "
        "the choice moves FID and is recorded in the set",
    )
    g.add_argument(
        "--out",
        help="grid: .png; set: .npz, or a folder for <class>/<id>.png "
        "(default: grid.png or samples.npz in the SiT's folder)",
    )
    g.add_argument(
        "--overwrite",
        action="store_true",
        help="set: replace --out, and start an interrupted set anew",
    )
    g.add_argument(
        "--batch-size", type=positive, default=64, help="pictures a process draws at once"
    )
    g = p.add_argument_group("sampler")
    g.add_argument("--sampler", choices=["sde", "ode", "heun"], default="sde")
    g.add_argument(
        "--steps",
        type=two_or_more,
        default=250,
        help="steps of the integration (Heun: two evaluations each)",
    )
    g.add_argument("--cfg", type=float, default=2.5, help="guidance scale; 1: none")
    g.add_argument(
        "--interval",
        type=float,
        nargs=2,
        default=[0.0, 0.75],
        metavar=("LO", "HI"),
        help="times with guidance: 0 is data, 1 is noise",
    )
    add_machine_flags(p)
    return parse_flags(p, argv)


# --------------------------------------------------------------------------------------------------
# Samplers


def guided_velocity(sit, x, t, y, cfg=1.0, interval=(0.0, 1.0), step_time=None):
    """Velocity v, of x's shape, at x (B,C,h,w), time t (a float) and labels y (B,).

    step_time: the time that must be inside the interval for guidance, where it is not t.

    The null half is computed only inside the interval. Guiding v is guiding the SDE's drift: at
    fixed x and t the drift is affine in v, and the weights sum to 1.
    """
    if step_time is None:
        step_time = t
    times = torch.full((len(x),), t, device=x.device)
    if cfg == 1.0 or not is_inside(step_time, interval):
        return sit(x, times, y)
    null = torch.full_like(y, sit.num_classes)
    v, v_null = sit(torch.cat([x, x]), torch.cat([times, times]), torch.cat([y, null])).chunk(2)
    return v_null + cfg * (v - v_null)


def is_inside(t, interval):
    """Whether a time is in the interval (lo, hi), whose ends belong to it."""
    return interval[0] <= t <= interval[1]


def step_times(sampler, steps):
    """The times between which a sampler steps, a list of floats from 1 to 0.

    The SDE takes `steps` times from 1 to 0.04, and then a step to 0. The published samplers have
    these numbers from torch.linspace in float64. NumPy's differ from them in the last bit, which
    decides whether a step at an end of the guidance interval is guided.
    """
    if sampler == "sde":
        return [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()


def count_guided_steps(sampler, steps, interval):
    """How many of a sampler's steps begin inside the guidance interval, and so are guided."""
    return sum(is_inside(t, interval) for t in step_times(sampler, steps)[:-1])


def integrate(velocity, x, sampler="sde", steps=250, noise=None):
    """Integrate from noise x (B,C,h,w) at t = 1 to data at t = 0 -> float64 latents (B,C,h,w).

    velocity(x float32, t float) -> v (B,C,h,w). Heun calls it a second time in a step, with the
    time at which the step began as a third argument: it decides about guidance, as published.
    The last step of the SDE, from 0.04 to 0, has no noise; noise(i) -> standard normal of x's shape
    for its step i.
    """
    x = x.double()
    for i, (t, t_next) in enumerate(itertools.pairwise(step_times(sampler, steps))):
        dt = t_next - t  # negative
        v = velocity(x.float(), t).double()
        if sampler == "ode":
            x = x + dt * v
        elif sampler == "heun":
            predicted = x + dt * v
            if t_next > 0:
                v_next = velocity(predicted.float(), t_next, t).double()
                x = x + dt * (v + v_next) / 2
            else:
                x = predicted
        elif sampler == "sde":
            score = -((1 - t) * v + x) / t
            x = x + dt * (v - t * score)  # w/2 = t
            if t_next > 0:
                x = x + (2 * t * -dt) ** 0.5 * noise(i).double()
        else:
            raise ValueError(f"integrate knows no sampler '{sampler}'")
    return x


@torch.no_grad()
def draw(
    sit, vae, ids, labels, seed, precision, sampler="sde", steps=250, cfg=2.5, interval=(0.0, 0.75)
):
    """Draw the pictures ids (B,) with labels (B,), both on the networks' device -> uint8 (B,3,H,W).

    All noise of a picture belongs to (seed, its id). precision: "bf16" or "fp32".
    """
    shape = (sit.channels, sit.latent_size, sit.latent_size)

    def velocity(x, t, step_time=None):
        return guided_velocity(sit, x, t, labels, cfg, interval, step_time)

    def noise(i):
        return normal(seed, f"sample step {i}", ids, shape)

    with autocast(ids.device, precision):
        start = normal(seed, "sample start", ids, shape)
        z = integrate(velocity, start, sampler, steps, noise)
        return to_uint8(vae.decode(vae.denormalize(z.float())))


def check_guidance(args, sit, sit_path):
    """Raise UserError unless --cfg and --interval guide at least one step, and the SiT can do it.

    cfg 1 is no guidance; the interval is checked all the same.
    """
    low, high = args.interval
    if not 0 <= low <= high <= 1:
        raise UserError(
            f"--interval {low:g} {high:g}: give two times from 0 (data) to 1 (noise), the smaller "
            "one first"
        )
    if not math.isfinite(args.cfg):
        raise UserError(f"--cfg {args.cfg} is no scale of guidance; give a number, 1 for none")
    if args.cfg == 1:
        return
    if not null_label_is_trained(sit):
        raise UserError(
            f"--cfg {args.cfg:g}: {sit_path} was trained without its null label, so it cannot be "
            "guided; draw with --cfg 1, or train a SiT with --label-dropout above 0"
        )
    if count_guided_steps(args.sampler, args.steps, args.interval) == 0:
        raise UserError(
            f"--cfg {args.cfg:g}: none of the {args.steps} steps begins inside --interval {low:g} "
            f"{high:g}; widen it, or draw without guidance (--cfg 1)"
        )


def null_label_is_trained(sit):
    """Whether a loaded SiT has learned the velocity without a class, which guidance needs."""
    if "null_label_trained" in sit.info:
        return sit.info["null_label_trained"]
    # Files of older versions of this code have the flags of their training. Others do not tell.
    return sit.info.get("arguments", {}).get("label_dropout", 0.1) > 0


# --------------------------------------------------------------------------------------------------
# Networks and labels


def load_pair(sit_path, vae_path, device, ema=True, form="auto"):
    """Load a SiT, and the VAE at vae_path or, without a path, the one the SiT was trained on.

    A SiT of ours records the hash of its VAE, and another VAE is refused. A published SiT records
    none. Any SiT may hold the latent statistics it was trained with; these replace the VAE's.
    form: as for load_sit.
    Raises UserError if the VAE cannot be found or does not belong to the SiT.
    """
    sit = load_sit(sit_path, device, ema, form)
    if not vae_path:
        vae_path = sit.info["vae_path"]
        if not vae_path:
            raise UserError(f"{sit_path} does not record the VAE of its paper; name it with --vae")
        if not vae_path.startswith("hf:") and not os.path.exists(vae_path):
            raise UserError(
                f"{sit_path} was trained on the VAE {vae_path}, which does not exist; "
                "name it with --vae"
            )
    vae = load_vae(vae_path, device)
    if sit.info["vae_hash"] is None:
        check_channels(sit, vae, sit_path, vae_path)
    elif vae.info["hash"] != sit.info["vae_hash"]:
        raise UserError(
            f"{vae_path} (hash {vae.info['hash']}) is not the VAE that {sit_path} was trained on "
            f"(hash {sit.info['vae_hash']}, then at {sit.info['vae_path']}): "
            "its latents mean something else; name the right one with --vae"
        )
    # It may have been trained at another resolution than the VAE.
    vae.set_resolution(sit.latent_size * vae.factor)
    take_statistics(vae, sit)
    return sit, vae


def check_channels(sit, vae, sit_path, vae_path):
    """Raise UserError if a SiT needs latents of another number of channels than the VAE's."""
    if sit.channels != vae.channels:
        raise UserError(
            f"{sit_path} needs latents of {sit.channels} channels, "
            f"but {vae_path} has {vae.channels}; name another with --vae"
        )


def take_statistics(vae, sit):
    """Give the VAE the latent statistics that the SiT was trained with, if its file holds any."""
    if sit.info.get("latent_mean"):
        decode_std = sit.info.get("latent_decode_std")
        vae.set_statistics(sit.info["latent_mean"], sit.info["latent_std"], decode_std)
        vae.info["latent_statistics"] = "those of the SiT"


def class_numbers(names, sit):
    """Class numbers or folder names, as strings -> class numbers. Raises UserError for others."""
    known = sit.info.get("classes") or []
    numbers = {str(i): i for i in range(sit.num_classes)}
    for i, name in enumerate(known):
        numbers[one_spelling(name)] = i
    for name in names:
        if one_spelling(name) not in numbers:
            message = f"--classes {name}: the SiT knows the numbers 0 to {sit.num_classes - 1}"
            if known:
                message += f" and names such as {', '.join(known[:4])}"
            raise UserError(message)
    return [numbers[one_spelling(name)] for name in names]


def one_spelling(name):
    """A name in Unicode's composed form: macOS may write an accent as a letter of its own."""
    return unicodedata.normalize("NFC", str(name))


def spread_classes(num_classes, count=8):
    """Numbers of at most `count` classes, evenly spaced over all."""
    count = min(count, num_classes)
    return [i * num_classes // count for i in range(count)]


def set_labels(kind, ids, num_classes, seed):
    """Labels (B,) of the pictures ids (B,) of a set. kind: "equal" or "random"."""
    if kind == "equal":
        return ids % num_classes
    return (uniform(seed, "sample label", ids).double() * num_classes).long()


# --------------------------------------------------------------------------------------------------
# Grids and sets


def draw_batch(sit, vae, ids, labels, args, precision, size):
    """draw with the seed and the sampler of the command line -> uint8 (B,3,H,W).

    size: the number of pictures in a full batch. A smaller batch would have the networks compiled
    anew, so it is filled up with copies of its last picture, which are not returned.
    """
    count = len(ids)
    if args.compile:
        chosen = torch.arange(size, device=ids.device).clamp(max=count - 1)
        ids = ids[chosen]
        labels = labels[chosen]
    pictures = draw(
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
    return pictures[:count]


def draw_grid(sit, vae, args, device, precision):
    """Draw --n pictures of each class into args.out, one line of the grid a class."""
    classes = spread_classes(sit.num_classes)
    if args.classes:
        classes = class_numbers(args.classes, sit)
    # A grid is small: the first process draws it alone.
    if rank() == 0:
        ids = torch.arange(len(classes) * args.n, device=device)
        labels = torch.tensor(classes, device=device).repeat_interleave(args.n)
        size = min(args.batch_size, len(ids))
        batches = list(zip(ids.split(size), labels.split(size), strict=True))
        pictures = torch.cat(
            [
                draw_batch(sit, vae, batch_ids, batch_labels, args, precision, size)
                for batch_ids, batch_labels in progress(batches, unit="batch", leave=True)
            ]
        )
        save_grid(args.out, pictures.split(args.n))
        known = sit.info.get("classes") or list(range(sit.num_classes))
        names = ", ".join(str(known[number]) for number in classes)
        say(f"{len(pictures)} pictures: {args.out}, a row each of {names}")
    barrier()


def check_settings(path, recorded, settings):
    """Raise UserError if a set at `path` was drawn with other settings than those asked for."""
    changes = []
    for name, value in settings.items():
        if name != "provenance" and recorded.get(name) != value:
            changes.append(f"{name} was {recorded.get(name)} and is now {value}")
    if changes:
        raise UserError(
            f"{path} is already there, with other settings: {'; '.join(changes)}; "
            "use the same settings, name another --out, or replace it with --overwrite"
        )


def check_settings_file(folder, settings):
    """Raise UserError unless folder/settings.json has these settings."""
    path = os.path.join(folder, "settings.json")
    with (
        reading(path, "the settings of an interrupted set; remove its folder"),
        open(path) as file,
    ):
        check_settings(folder, json.load(file), settings)


def prepare_parts(folder, settings, overwrite):
    """Make `folder` the place where this set grows. Rank 0 only.

    It is emptied with `overwrite`. Raises UserError if it holds pictures of other settings.
    """
    path = os.path.join(folder, "settings.json")
    if overwrite:
        # The pattern leaves the hidden lock file alone.
        for old in glob.glob(os.path.join(glob.escape(folder), "*")):
            os.remove(old)
    if os.path.exists(path):
        check_settings_file(folder, settings)
    else:
        write_json(path, settings)


def draw_blocks(sit, vae, blocks, args, device, precision):
    """Draw this process's share of the blocks, of --batch-size pictures each, of a set.

    Yield the number of each block, the ids of its pictures, a range, and the pictures, NumPy uint8
    (b,H,W,3).
    """
    size = min(args.batch_size, args.num)
    for block in progress(blocks[rank() :: world()], unit="batch", leave=True):
        first = block * args.batch_size
        end = min(first + args.batch_size, args.num)
        ids = torch.arange(first, end, device=device)
        labels = set_labels(args.labels, ids, sit.num_classes, args.seed)
        images = draw_batch(sit, vae, ids, labels, args, precision, size)  # (b,3,H,W)
        pictures = images.permute(0, 2, 3, 1).cpu().numpy()
        yield block, range(first, end), pictures


def draw_npz(sit, vae, args, device, precision, settings):
    """Draw --num pictures into args.out: arr_0 uint8 (N,H,W,3), labels (N,), settings as JSON,
    and the names of the classes where they are known.

    The pictures are collected in the folder <out>.parts. Each finished block of --batch-size
    pictures is marked there, so that a killed process loses at most the block it was drawing.
    """
    parts = args.out + ".parts"
    if os.path.exists(args.out) and not args.overwrite:
        with (
            reading(args.out, "a set of ours (--overwrite replaces it)"),
            np.load(args.out, allow_pickle=False) as file,
        ):
            check_settings(args.out, json.loads(str(file["settings"])), settings)
        # A process killed between writing the set and removing its parts left these behind.
        shutil.rmtree(parts, ignore_errors=True)
        say(f"done      {args.out} already has its {args.num} pictures")
        return

    stop_at_signal()
    lock(parts)
    if rank() == 0:
        prepare_parts(parts, settings, args.overwrite)
    shape = (args.num, vae.resolution, vae.resolution, 3)
    pictures, done, todo = resumable_array(
        parts, "pictures.npy", np.uint8, shape, block=args.batch_size
    )
    if len(todo) < len(done):
        say(f"resuming {parts}: {len(done) - len(todo)} of {len(done)} blocks are done")

    for block, ids, images in draw_blocks(sit, vae, todo, args, device, precision):
        pictures[ids.start : ids.stop] = images
        mark_done(pictures, done, block)

    barrier()
    if rank() == 0:
        labels = set_labels(args.labels, torch.arange(args.num), sit.num_classes, args.seed).numpy()
        with writing(args.out) as file:
            np.savez(
                file,
                arr_0=pictures,
                labels=labels,
                settings=np.array(json.dumps(settings)),
                **class_names(sit),
            )
        shutil.rmtree(parts)
        say(f"{args.num} pictures: {args.out}")


def class_names(sit):
    """{"classes": array of a name for each label} where the SiT's file has them, else {}."""
    names = [str(name) for name in sit.info.get("classes") or []]
    if len(names) != sit.num_classes:
        return {}
    return {"classes": np.array(names)}


def class_folders(sit):
    """A folder's name for each class: the class's own where the SiT's file has them, or its number.

    A file may be of anybody, and a class of it must not lead out of the set's folder or into a
    hidden one.
    """
    names = sit.info.get("classes") or []
    usable = {
        name for name in names if name == os.path.basename(name) and name[:1] not in ("", ".")
    }
    if len(usable) == sit.num_classes:
        return names
    return [str(number) for number in range(sit.num_classes)]


def prepare_folder(folder, settings, overwrite):
    """Make `folder` the place where a set of PNG files grows. Rank 0 only.

    With `overwrite` the pictures of an earlier set are removed. Raises UserError if it holds
    pictures of other settings, or files that are not a set of ours.
    """
    path = os.path.join(folder, "settings.json")
    others = [name for name in os.listdir(folder) if not name.startswith(".")]
    if not os.path.exists(path):
        if others:
            raise UserError(
                f"{folder} holds files that are not a set of ours, such as {sorted(others)[0]!r}; "
                "name a new or an empty folder with --out"
            )
    elif not overwrite:
        check_settings_file(folder, settings)
        return
    else:
        for old in glob.glob(os.path.join(glob.escape(folder), "*", "[0-9]*.png")):
            os.remove(old)
    write_json(path, settings)


def draw_folder(sit, vae, args, device, precision, settings):
    """Draw --num pictures into the folder args.out: <class>/<id>.png, and settings.json.

    A rerun draws the blocks of --batch-size pictures in which one is missing.
    """
    stop_at_signal()
    lock(args.out)
    if rank() == 0:
        prepare_folder(args.out, settings, args.overwrite)
    barrier()
    folders = class_folders(sit)
    labels = set_labels(args.labels, torch.arange(args.num), sit.num_classes, args.seed).tolist()
    paths = [
        os.path.join(args.out, folders[label], f"{i:06d}.png") for i, label in enumerate(labels)
    ]
    exists = np.array([os.path.exists(path) for path in paths])
    first_of_blocks = np.arange(0, args.num, args.batch_size)
    complete = np.logical_and.reduceat(exists, first_of_blocks)
    # No process may write a picture before all of them have looked.
    barrier()
    if complete.all():
        say(f"done      {args.out} already has its {args.num} pictures")
        return
    if complete.any():
        say(f"resuming {args.out}: {complete.sum()} of {len(complete)} blocks are done")

    todo = np.flatnonzero(~complete)
    for _, ids, images in draw_blocks(sit, vae, todo, args, device, precision):
        for i, image in zip(ids, images, strict=True):
            with writing(paths[i]) as file:
                Image.fromarray(image).save(file, "png")
    barrier()
    say(f"{args.num} pictures: {args.out}, in a folder for each class")


def draw_set(sit, vae, args, device, precision, settings):
    """Draw --num pictures into args.out, an .npz file or a folder."""
    draw_as = draw_npz if args.out.lower().endswith(".npz") else draw_folder
    draw_as(sit, vae, args, device, precision, settings)


def output_path(args, sit_path):
    """--out, or its default beside the SiT. Raises UserError if it fits neither grid nor set."""
    out = args.out
    if not out:
        folder = sit_path if os.path.isdir(sit_path) else os.path.dirname(sit_path)
        out = os.path.join(folder, "samples.npz" if args.num else "grid.png")
    ending = os.path.splitext(out)[1].lower()
    if not args.num and ending != ".png":
        raise UserError(
            f"--out {out}: a grid (--classes, --n) is a .png file; for a set give --num"
        )
    if args.num and (ending == ".png" or (os.path.isfile(out) and ending != ".npz")):
        raise UserError(
            f"--out {out}: a set (--num) is an .npz file or a folder; for a grid leave out --num"
        )
    if ending in (".png", ".npz"):
        refuse_unwritable(out)
    return out


def main():
    args = parse_arguments()
    device = setup(args.device)
    precision = resolve_precision(args.precision, device)

    # Networks
    sit_path = args.sit
    if not sit_path:
        newest = newest_result("sit.safetensors", "SiT", "python train_sit.py")
        sit_path = os.path.dirname(newest)
    sit, vae = load_pair(sit_path, args.vae, device, not args.raw, args.sit_format)
    check_guidance(args, sit, sit_path)
    vae.to(memory_format=conv_memory_format(device, precision))
    args.out = output_path(args, sit_path)

    # Settings: all that moves FID. They are recorded in a set, and tell whether it may be resumed.
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
        f"SiT       {sit_path}, {settings['weights']} weights of step {sit.info['step']}; "
        f"VAE {vae.info['path']}; {precision} on {device}"
    )
    guidance = "no guidance"
    if args.cfg != 1:
        guided = count_guided_steps(args.sampler, args.steps, args.interval)
        guidance = f"cfg {args.cfg} for t in {args.interval}: {guided} of them"
    say(f"sampler   {args.sampler}, {args.steps} steps, {guidance}")

    # Pictures
    args.compile = wants_compile(args, device)
    if args.compile:
        say(COMPILING)
        # The SiT's blocks are compiled once for a batch and once, with guidance, for a doubled one.
        # With the null half in all steps once would do, but sampling with the default flags would
        # then take a seventh longer.
        compile_network(sit)
        compile_network(vae)
    if args.num:
        draw_set(sit, vae, args, device, precision, settings)
    else:
        draw_grid(sit, vae, args, device, precision)


if __name__ == "__main__":
    run_main(main)
