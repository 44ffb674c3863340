"""Stage 2: a flow transformer (SiT) on the latents of a VAE, with the REPA loss.

    x_t = (1-t) x + t eps, v = eps - x; t ~ U(0,1): 0 is data, 1 is noise; x = normalised posterior sample
    L = |SiT(x_t, t, y) - v|^2 - repa * mean_n cos(projector(hidden)[n], f(picture)[n])          (paper, eq. 4; REPA)

    python train_sit.py --size B --steps 100000                 # on the newest VAE under runs/
    python train_sit.py --repa 0                                # no vision model, and no pictures once latents are cached
    torchrun --nproc_per_node=8 train_sit.py --vae runs/vae     # the paper's run: XL, 80 epochs, the same curve

Latents (mean and std of the posterior, fp16, of each picture and its mirror image) are computed once, in the VAE's
folder. Writes --out (runs/sit): sit.safetensors (EMA weights), sit_raw.safetensors, checkpoints/, metrics.jsonl, samples/.
The same command goes on where a run was stopped.
"""

import argparse
import copy
import functools
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.draws import normal, uniform
from common.files import UserError
from common.flags import add_training_flags, parse_flags, positive, share_batch
from common.pictures import ImageSet, PictureBlocks, TrainingBatches, from_uint8, load_batches
from common.processes import (
    Watch,
    autocast,
    barrier,
    conv_memory_format,
    mean_over_processes,
    parallel,
    rank,
    resolve_precision,
    run_main,
    say,
    setup,
    stop_at_signal,
    sync_gradients,
    world,
)
from common.runs import RunLog, Saver, lock, mark_done, newest_result, resumable_array, resume
from common.training import Guard, ema_update, learning_rate
from common.weights import load_vae
from models import SiT, VFM
from sample import draw, set_labels

# Flags that may change between a run and its resumption, beside FREE_FLAGS; all others must agree.
FREE = {"vae", "cache", "preview_n", "preview_steps", "preview_cfg"}


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    g = p.add_argument_group("latents")
    g.add_argument("--vae", help="vae.safetensors or run folder (default: the newest under runs/)")
    g.add_argument("--cache", help="folder for the latents (default: the VAE's)")
    g.add_argument("--no-flip", dest="flip", action="store_false", help="no mirror images")
    g = p.add_argument_group("SiT")
    g.add_argument("--size", choices=["S", "B", "L", "XL"], default="XL")
    g.add_argument("--patch", type=int, help="default: 16 / the VAE's factor, at least 1")
    g.add_argument("--depth", type=int, help="instead of the size's")
    g.add_argument("--width", type=int, help="instead of the size's")
    g.add_argument("--heads", type=int, help="instead of the size's")
    g.add_argument(
        "--label-dropout",
        type=float,
        default=0.1,
        help="share of labels replaced by the null label",
    )
    g = p.add_argument_group("REPA")
    g.add_argument("--repa", type=float, default=0.5, help="weight; 0: no vision model")
    g.add_argument(
        "--repa-block", type=int, default=8, help="block whose output is projected, from 1"
    )
    g = p.add_argument_group("previews")
    g.add_argument(
        "--preview-n", type=positive, default=8, help="pictures in each of a preview's 8 rows"
    )
    g.add_argument(
        "--preview-steps",
        type=positive,
        default=50,
        help="of the ODE sampler of previews and --fid-every",
    )
    g.add_argument("--preview-cfg", type=float, default=2.5, help="guidance scale of the previews")
    add_training_flags(
        p,
        "runs/sit",
        batch_size=256,
        epochs=80,
        lr=1e-4,
        ema=0.9999,
        log_every=100,
        sample_every=10000,
        save_every=5000,
        fid="FID of EMA samples without guidance",
        fid_ref="--data",
    )
    return parse_flags(p, argv)


# ----------------------------------------------------------------------------------------------------------------------
# Latent cache

BLOCK = 256  # pictures encoded and marked as done together


@torch.no_grad()
def cache_latents(vae, data, flip, args, device, precision):
    """-> folder with latents.npy, fp16 (N, 2 if flip else 1, 2, C, h, w): posterior mean and std of every picture and
    of its mirror image. Computed once by all processes together; blocks that are done are marked, so that a killed run
    goes on. The folder's name holds the VAE's hash, the pictures' fingerprint and the precision: another VAE, list or precision
    is another cache."""
    name = f"latents-{vae.info['hash'][:8]}-{data.fingerprint[:8]}-{precision}{'' if flip else '-noflip'}"
    folder = os.path.join(args.cache or os.path.dirname(vae.info["path"]), name)
    shape = (len(data), 2 if flip else 1, 2, vae.channels, vae.latent_size, vae.latent_size)
    stop_at_signal()
    held = lock(folder, wait=True)
    latents, done, todo = resumable_array(folder, "latents.npy", np.float16, shape, BLOCK)
    if len(todo):
        say(
            f"caching   latents of {len(data)} pictures in {folder}, {np.prod(shape) * 2 / 1e9:.2f} GB"
        )
    todo = todo[rank() :: world()]
    pictures = PictureBlocks(data.stack, vae.resolution, len(data), BLOCK)
    loader = load_batches(pictures, todo.tolist(), args.workers, device)
    for block, batch in zip(
        todo, tqdm(loader, "latents", len(todo), unit="block", disable=rank() > 0, leave=False)
    ):
        x = from_uint8(batch["image"])
        for side in range(shape[1]):
            for i, part in enumerate(x.flip(3).split(64) if side else x.split(64)):
                with autocast(device, precision):
                    mean, logvar = vae.encode(part)
                pair = torch.stack([mean, (0.5 * logvar).exp()], 1).to(torch.float16).cpu().numpy()
                if not np.isfinite(pair).all():
                    raise UserError(
                        f"latents of {vae.info['path']} leave fp16's range (largest mean {mean.abs().max():.3g})"
                    )
                begin = block * BLOCK + i * 64
                latents[begin : begin + len(pair), side] = pair
        mark_done(latents, done, block)
    barrier()
    if held is not None:
        os.close(held)  # training needs no lock of it
    return folder


class LatentCache:
    """Reads a folder that cache_latents filled."""

    def __init__(self, folder):
        self.folder = folder

    @functools.cached_property
    def latents(self):  # at the first batch of each loader process: it cannot be handed on
        return np.load(os.path.join(self.folder, "latents.npy"), mmap_mode="r")

    def read(self, index, flip):
        """Indices and flips, int64 and bool arrays (b,) -> dict(latent=fp16 tensor (b,2,C,h,w): mean and std)."""
        return dict(latent=torch.from_numpy(self.latents[index, flip.astype(np.int64)]))


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def interpolate(x, eps, t):
    """Data x and noise eps (B,C,h,w), times t (B,) -> x_t and its velocity. Paper, eq. 1, with alpha = 1 - t."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x + t * eps, eps - x


def repa_loss(predicted, target):
    """-mean cosine over pictures and tokens, both (B,N,D), as REPA."""
    return -F.cosine_similarity(predicted.float(), target.float(), dim=-1).mean()


def drop_labels(y, u, share, null):
    """Labels y (B,), each replaced by the null label where its uniform u (B,) is below `share`."""
    return torch.where(u < share, null, y)


# ----------------------------------------------------------------------------------------------------------------------


def main():
    args = parse_arguments()
    device = setup(args.device, args.timeout)
    precision = resolve_precision(args.precision, device)
    micro_batch = share_batch(args.batch_size, args.accum)

    # Data and latents
    args.vae = args.vae or os.path.dirname(
        newest_result("vae.safetensors", "VAE", "python train_vae.py")
    )
    vae = load_vae(args.vae, device).to(memory_format=conv_memory_format(device, precision))
    data = ImageSet(args.data, args.check_data, args.skip_bad)
    say(
        f"data      {len(data)} pictures in {len(data.classes)} classes, {args.data}; VAE {args.vae}, hash {vae.info['hash']}"
    )
    cache = LatentCache(cache_latents(vae, data, args.flip, args, device, precision))

    # Models
    patch = args.patch or max(1, 16 // vae.factor)
    vfm = None
    if args.repa:
        vfm = VFM(
            args.vfm, args.vfm_weights, vae.resolution, vae.latent_size // patch, args.vfm_stride
        ).to(device)
    torch.manual_seed(args.seed)  # initial weights only: all other draws are normal's
    net = SiT(
        args.size,
        patch,
        vae.channels,
        vae.latent_size,
        len(data.classes),
        None if vfm is None else vfm.dim,
        args.repa_block,
        args.depth,
        args.width,
        args.heads,
    ).to(device)
    net.grad_checkpoint = args.grad_checkpoint
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    total = args.steps or math.ceil(args.epochs * len(data) / args.batch_size)
    steps_per_epoch = len(data) / args.batch_size
    say(
        f"model     SiT {sum(p.numel() for p in net.parameters()) / 1e6:.2f}M, {net.grid**2} tokens; {precision} on {device}"
    )
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )
    parts = dict(
        net=net, ema=ema, optimizer=optimizer
    )  # what a checkpoint holds, loaded in this order

    # Resume
    args.vae_hash = vae.info["hash"]  # another VAE is another setting
    names = ["flow", "repa", "grad_norm"]
    start, running = resume(args, FREE, parts, total, device)
    if start is None:
        return

    # Parallel and compiled form; `net` stays the plain module that is saved
    forward = net
    if args.compile if args.compile is not None else device.type == "cuda":
        forward, vfm = torch.compile(net), None if vfm is None else torch.compile(vfm)
    forward = parallel(forward)

    # What is looked at now and then
    if args.fid_every:
        from fid import training_measure  # only here: most runs do without Inception

        measure = training_measure(
            args.fid_ref or args.data, device, args.inception_weights, vae.resolution, args.workers
        )

    def set_batches(count, size=64):
        """This process's share of `count` pictures, as many of each class: (ids (b,), uint8 (b,3,H,W))."""
        for k in range(rank() * size, count, world() * size):
            ids = torch.arange(k, min(k + size, count), device=device)
            labels = set_labels("equal", ids, net.num_classes, args.seed)
            yield (
                ids,
                draw(
                    ema, vae, ids, labels, args.seed, precision, "ode", args.preview_steps, cfg=1.0
                ),
            )

    log = RunLog(args, names, running, start, total, steps_per_epoch, device)
    dataset = TrainingBatches(
        data,
        args.batch_size,
        args.seed,
        vae.resolution if args.repa else None,
        args.flip,
        cache.read,
    )
    stream = iter(load_batches(dataset, range(start, total), args.workers, device))
    shape = (vae.channels, vae.latent_size, vae.latent_size)
    watch, saver = Watch(args.timeout), Saver(args.out, args.keep_every)
    guard = Guard(net, optimizer, args.clip)
    for step in range(start, total + 1):  # the last turn only measures and saves
        due = log.every(args.save_every, step)
        bad = (due or watch.stop or log.every(args.log_every, step)) and guard.look(
            args, names, step == total
        )
        due = due and not bad
        if step > start and log.every(args.log_every, step):
            log.line(step, names if args.repa else ["flow", "grad_norm"])
        if log.every(args.sample_every, step) and rank() == 0:
            ids = torch.arange(
                8 * args.preview_n, device=device
            )  # 8 rows, the same noise and labels every time
            labels = ids // args.preview_n * max(len(data.classes), 8) // 8 % len(data.classes)
            pictures = draw(
                ema,
                vae,
                ids,
                labels,
                args.seed,
                precision,
                "ode",
                args.preview_steps,
                args.preview_cfg,
            )
            log.pictures(step, pictures.split(args.preview_n))
        if log.every(args.fid_every, step):
            log.note(step, measure(set_batches(args.fid_num), args.fid_num))
        if (
            due or watch.stop and not bad
        ):  # last, so that nothing of this step is missing after a resume
            info = dict(
                arguments=vars(args),
                step=step,
                epoch=step / steps_per_epoch,
                classes=data.classes,
                vae_hash=args.vae_hash,
                vae_path=args.vae,
            )
            state = {name: part.state_dict() for name, part in parts.items()}
            weights = {
                "sit.safetensors": ("sit", state["ema"], net.config, info),
                "sit_raw.safetensors": ("sit", state["net"], net.config, info),
            }
            saver.save(
                step,
                weights,
                dict(
                    state, step=step, arguments=vars(args), running=mean_over_processes(log.running)
                ),
            )
        if step == total or watch.stop:
            break

        # ---- one step ------------------------------------------------------------------------------------------------
        watch.begin_step()
        batch = next(stream)
        losses = torch.zeros(len(names), device=device)
        for i in range(args.accum):
            part = slice(i * micro_batch, (i + 1) * micro_batch)
            position = batch["position"][part]
            mean, std = batch["latent"][part].float().unbind(1)  # each (b,C,h,w)
            x = vae.normalize(mean + std * normal(args.seed, "posterior", position, shape))
            t = uniform(args.seed, "time", position)
            x_t, v = interpolate(x, normal(args.seed, "noise", position, shape), t)
            y = drop_labels(
                batch["label"][part],
                uniform(args.seed, "label dropout", position),
                args.label_dropout,
                net.num_classes,
            )
            with autocast(device, precision), sync_gradients(forward, i == args.accum - 1):
                if args.repa:
                    predicted, tokens = forward(x_t, t, y, tokens=True)
                    with torch.no_grad():
                        target = vfm(from_uint8(batch["image"][part]))
                    repa = repa_loss(tokens, target)
                else:
                    predicted, repa = forward(x_t, t, y), x.new_zeros(())
                flow = F.mse_loss(predicted, v)
                ((flow + args.repa * repa) / args.accum).backward()
            losses[:2] += torch.stack([flow.detach(), repa.detach()]) / args.accum
        optimizer.param_groups[0]["lr"] = learning_rate(args, step, total)
        watch.end_step()
        losses[2] = guard.step(losses[:2], step)
        ema_update(ema, net, args.ema)
        log.add(losses, guard.finite)
        # --------------------------------------------------------------------------------------------------------------
    saver.close()
    log.close(
        step,
        f"done      {args.out}/sit.safetensors; previews in {args.out}/samples; "
        f"pictures: python sample.py --sit {args.out}",
    )


if __name__ == "__main__":
    run_main(main)
