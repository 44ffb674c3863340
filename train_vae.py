"""Stage 1, Send-VAE: tune a VAE so that a small mapper h can predict a frozen vision model f from its *noised* latents.

    L = lambda * mean_n(1 - cos(h(z_t)[n], f(x)[n])) + recon + lpips + kl + gan       (paper, eq. 3)
    z ~ posterior of x, z_t = (1-t) BN(z) + t eps inside the mapper, t ~ U(0,1): 0 is data, 1 is noise.

    python train_vae.py --data data/cifar10/train --resolution 32 ...      # small pictures on a CPU: see README.md
    python train_vae.py --init vavae.safetensors                           # the paper's run, on one GPU
    torchrun --nproc_per_node=8 train_vae.py --init vavae.safetensors      # the same run and the same curve, on eight

Writes --out (runs/vae): vae.safetensors (EMA weights and latent statistics), checkpoints/, metrics.jsonl, samples/.
The same command goes on where a run was stopped.
"""

import argparse
import copy
import functools
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.draws import normal, uniform
from common.files import UserError
from common.flags import add_training_flags, parse_flags, positive, share_batch, whole_number
from common.pictures import ImageSet, TrainingBatches, from_uint8, load_batches, to_uint8
from common.published import load_discriminator
from common.processes import (
    Watch,
    autocast,
    conv_memory_format,
    mean_over_processes,
    parallel,
    rank,
    resolve_precision,
    run_main,
    say,
    setup,
    sum_over_processes,
    sync_gradients,
    world,
)
from common.runs import RunLog, Saver, resume
from common.training import Guard, ema_update, learning_rate
from common.weights import load_vae
from models import LPIPS, Mapper, PatchDiscriminator, VAE, VFM

# Flags that may change between a run and its resumption, beside FREE_FLAGS; all others must agree.
FREE = {
    "val",
    "val_images",
    "stats_images",
    "lpips_weights",
    "init",
    "init_disc",
    "probe_every",
    "probe_data",
}


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    g = p.add_argument_group("data")
    g.add_argument(
        "--val", help="folder of held-out pictures: PSNR and alignment loss at every save"
    )
    g.add_argument(
        "--val-images",
        type=positive,
        default=2000,
        help="how many of them, the first of a fixed shuffle",
    )
    g.add_argument(
        "--resolution", type=positive, default=256, help="side of the square picture, pixels"
    )
    g = p.add_argument_group("VAE")
    g.add_argument("--spec", default="f16d32", help="f<factor>d<channels>")
    g.add_argument("--ch", type=int, default=128, help="base width")
    g.add_argument(
        "--ch-mult",
        type=int,
        nargs="+",
        help="width multipliers, one a level (default: the spec's)",
    )
    g.add_argument(
        "--num-res-blocks", type=int, default=2, help="a level (the decoder has one more)"
    )
    g.add_argument(
        "--init",
        help="VAE to start from: ours, LDM's, diffusers' or hf:<owner>/<repository>; it decides the "
        "architecture",
    )
    g.add_argument("--init-disc", help="checkpoint whose discriminator to start from")
    g.add_argument(
        "--freeze",
        action="store_true",
        help="train the mapper only: what a VAE's latents give as they are",
    )
    g = p.add_argument_group("alignment")
    g.add_argument(
        "--align",
        choices=["mapper", "vavae", "none"],
        default="mapper",
        help="mapper: the paper's; vavae: VA-VAE's "
        "linear projection of clean latents, loss with margins; none: no vision model",
    )
    g.add_argument("--align-weight", type=float, default=1.0, help="lambda")
    g.add_argument(
        "--mapper-depth", type=int, default=1, help="ViT blocks; 0 is the paper's MLP-only ablation"
    )
    g.add_argument(
        "--mapper-width", type=int, help="width of its tokens (default: the vision model's)"
    )
    g.add_argument("--mapper-hidden", type=int, default=2048, help="width of its MLP")
    g.add_argument("--mapper-heads", type=int, help="default: one for every 64 of its width")
    g.add_argument("--mapper-patch", type=int, help="default: 16 / factor, at least 1")
    g.add_argument(
        "--no-noise",
        dest="noise",
        action="store_false",
        help="mapper sees clean latents (ablation)",
    )
    g.add_argument(
        "--noise-kind",
        choices=["flow", "constant"],
        default="flow",
        help="t uniform in (0,1), or 0.5 always (ablation)",
    )
    g.add_argument(
        "--shuffle-targets",
        action="store_true",
        help="control: align to the vision features of another picture, "
        "the same one in every epoch",
    )
    g = p.add_argument_group("loss weights (0 switches a term off and does not build its network)")
    g.add_argument(
        "--recon",
        choices=["mse", "l1"],
        default="mse",
        help="mean over pixels; paper: mse, REPA-E's code: l1",
    )
    g.add_argument("--lpips", type=float, default=1.0)
    g.add_argument(
        "--lpips-weights", nargs="+", default=(), help="local files of VGG16 and the linear layers"
    )
    g.add_argument("--kl", type=float, default=1e-6, help="of the sum over a latent")
    g.add_argument("--gan", type=float, default=0.1)
    g.add_argument(
        "--gan-start", type=int, default=0, help="step at which the adversarial term begins"
    )
    g = p.add_argument_group("measurements")
    g.add_argument(
        "--stats-images",
        type=whole_number,
        help="for the final latent statistics (default: all; 4000 at checkpoints)",
    )
    g.add_argument(
        "--probe-every",
        type=whole_number,
        default=0,
        help="steps between linear probes of --probe-data; 0: never",
    )
    g.add_argument(
        "--probe-data",
        help="folder of a benchmark (see probe.py): F1 of a small probe on its attributes",
    )
    add_training_flags(
        p,
        "runs/vae",
        batch_size=1024,
        epochs=80,
        lr=3e-4,
        ema=0.999,
        log_every=50,
        sample_every=1000,
        save_every=1000,
        fid="rFID of EMA reconstructions of --val",
        fid_ref="--val",
    )
    return parse_flags(p, argv)


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def align_loss(predicted, target):
    """mean over pictures and tokens of 1 - cosine; both (B,N,D). Paper, eq. 2; 0 is perfect, 1 is orthogonal."""
    return 1 - F.cosine_similarity(predicted.float(), target.float(), dim=-1).mean()


def vavae_loss(predicted, target, cos_margin=0.5, matrix_margin=0.25):
    """VA-VAE's (Yao, Yang, Wang 2025, eqs. 3 to 5) of projected latents and vision tokens, both (B,N,D): cosines of tokens,
    and of each picture's pairs of tokens, each with its margin. Theirs scales the sum by gradient norms; --align-weight is
    fixed."""
    predicted, target = F.normalize(predicted.float(), dim=-1), F.normalize(target.float(), dim=-1)
    cosine = F.relu(1 - cos_margin - (predicted * target).sum(-1)).mean()
    return (
        cosine
        + F.relu((predicted @ predicted.mT - target @ target.mT).abs() - matrix_margin).mean()
    )


class Projection(nn.Conv2d):
    """VA-VAE's in place of the mapper: latents (B,C,h,w) -> (B,N,D), linear, without noise."""

    def forward(self, z, t, noise):
        return super().forward(z).flatten(2).mT


def mapper_times(seed, position, kind):
    """t (B,) of the noise that the mapper sees; without a kind 0: none."""
    t = uniform(seed, "mapper time", position)
    return t if kind == "flow" else torch.full_like(t, 0.5 if kind else 0.0)


def kl_loss(mean, logvar):
    """KL(posterior || N(0,1)), summed over a latent (C,h,w), mean over the batch."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()


def hinge_loss(real, fake):
    """The discriminator's loss from its logits (B,1,h,w) on real and reconstructed pictures."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


class SendVAE(nn.Module):
    """VAE and mapper as one module, so that one DDP wraps all that is trained beside the discriminator."""

    def __init__(self, vae, mapper, decode=True):
        super().__init__()
        self.vae, self.mapper, self.decode = vae, mapper, decode

    def forward(self, x, noise, t, mapper_noise):
        """Images (B,3,H,W), posterior noise (B,C,h,w), the mapper's times (B,) and noise (B,C,h,w) -> reconstructions
        (B,3,H,W), mean, logvar (B,C,h,w), predicted tokens (B,N,D) or None without a mapper."""
        mean, logvar = self.vae.encode(x)
        z = self.vae.sample(mean, logvar, noise)
        tokens = self.mapper(z, t, mapper_noise) if self.mapper is not None else None
        return self.vae.decode(z) if self.decode else None, mean, logvar, tokens


# ----------------------------------------------------------------------------------------------------------------------
# Measurements and pictures


def first_pictures(data, count, size, args, device):
    """The first `count` pictures of a fixed shuffle, unflipped, this process's share: yields images (b,3,size,size) and their
    positions (b,)."""
    order = TrainingBatches(data, world() * 32, seed=0, size=size, flip=False)
    for batch in load_batches(order, range(-(-count // order.batch_size)), args.workers, device):
        here = batch["position"] < count
        if here.any():
            yield from_uint8(batch["image"][here]), batch["position"][here]


@torch.no_grad()
def latent_statistics(vae, data, size, count, args, device, precision):
    """Mean and std (C,) of posterior samples over the first `count` pictures, in float64; the posterior's variance enters in
    closed form. Several processes share the work."""
    sums = torch.zeros(3, vae.channels, dtype=torch.float64, device=device)
    for x, _ in first_pictures(data, count, size, args, device):
        with autocast(device, precision):
            mean, logvar = vae.encode(x)
        mean, var = mean.double(), logvar.double().exp()
        sums += torch.stack(
            [
                mean.sum((0, 2, 3)),
                (mean.square() + var).sum((0, 2, 3)),
                torch.full_like(sums[0], mean[:, 0].numel()),
            ]
        )
    sums = sum_over_processes(sums)
    mean = sums[0] / sums[2]
    return mean.float(), (sums[1] / sums[2] - mean.square()).clamp(min=1e-12).sqrt().float()


@torch.no_grad()
def validate(net, vfm, data, args, device, precision):
    """PSNR (dB, of 8-bit pictures, mean over pictures) of reconstructions from the posterior mean, and the alignment
    loss (with the training's noise), over the first --val-images held-out pictures."""
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for x, position in first_pictures(
        data, min(args.val_images, len(data)), net.vae.resolution, args, device
    ):
        with autocast(device, precision):
            mean, logvar = net.vae.encode(x)
            y = to_uint8(net.vae.decode(mean)).float()
            if vfm is not None:
                z = net.vae.sample(mean, logvar, normal(1, "posterior", position, mean.shape[1:]))
                t = mapper_times(1, position, args.noise and args.noise_kind)
                tokens = net.mapper(z, t, normal(1, "mapper noise", position, z.shape[1:]))
                sums[1] += align_loss(tokens, vfm(x)) * len(x)  # of either kind of alignment
        error = (y - to_uint8(x).float()).square().mean((1, 2, 3)).clamp(min=1e-10)
        sums[0] += (10 * torch.log10(255**2 / error)).sum()
        sums[2] += len(x)
    psnr, align, count = sum_over_processes(sums).tolist()
    return (
        dict(val_psnr=psnr / count)
        if vfm is None
        else dict(val_psnr=psnr / count, val_align=align / count)
    )


def principal_components(z):
    """Latents (B,C,h,w) -> uint8 (B,3,h,w): their first three principal components over the batch, as RGB."""
    B, C, h, w = z.shape
    flat = z.float().nan_to_num().permute(0, 2, 3, 1).reshape(-1, C)
    flat = flat - flat.mean(0)
    axes = torch.linalg.svd(flat.cpu().double(), full_matrices=False)[2][:3].to(flat)  # (3,C)
    axes = (
        axes * axes.sum(1, keepdim=True).sign()
    )  # an axis has no sign of its own: fix it, or colours flicker
    values = F.pad(flat @ axes.T, (0, 3 - len(axes)))
    values = values / (2 * values.std(0).clamp(min=1e-6))
    return to_uint8(values).view(B, h, w, 3).permute(0, 3, 1, 2)


@torch.no_grad()
def draw_pictures(vae, data, device, precision):
    """-> rows of pictures, their reconstructions, and the principal components of their latents, uint8 (b,3,H,W)."""
    batch = TrainingBatches(data, world() * 8, seed=0, size=vae.resolution, flip=False)[0]
    x = from_uint8(batch["image"].to(device))
    with autocast(device, precision):
        z = vae.encode(x)[0]
        y = vae.decode(z)
    colours = F.interpolate(principal_components(z).float(), x.shape[2:], mode="nearest").to(
        torch.uint8
    )
    return to_uint8(x), to_uint8(y), colours


def other_pictures(data, partner, size, index, flip):
    """For --shuffle-targets: uint8 (b,3,size,size) of the pictures that stand in for `index`, permuted by `partner` (N,)."""
    return dict(other=data.stack(partner[index], size))


# ----------------------------------------------------------------------------------------------------------------------


def build_networks(args, device, precision):
    """-> SendVAE, vision model, LPIPS, discriminator, the last three None where they are not needed. The global generator is
    for initial weights only, so it is seeded before each network: all other draws are normal's."""
    torch.manual_seed(args.seed)
    if args.init:
        vae = load_vae(args.init).train()
        vae.set_resolution(args.resolution)
    else:
        vae = VAE(args.spec, args.resolution, args.ch, args.ch_mult, args.num_res_blocks)
    vae.grad_checkpoint = args.grad_checkpoint
    vae.requires_grad_(not args.freeze)
    vfm = mapper = lpips = disc = None
    if args.align != "none":
        patch = args.mapper_patch or max(1, 16 // vae.factor)
        vfm = VFM(
            args.vfm, args.vfm_weights, args.resolution, vae.latent_size // patch, args.vfm_stride
        ).to(device)
        width = args.mapper_width or vfm.dim
        torch.manual_seed(args.seed + 1)
        if args.align == "vavae":
            mapper = Projection(vae.channels, vfm.dim, patch, patch)
        else:
            mapper = Mapper(
                vae.channels,
                vae.latent_size,
                patch,
                vfm.dim,
                args.mapper_heads or max(1, width // 64),
                args.mapper_depth,
                width,
                args.mapper_hidden,
            )
    if args.lpips:
        lpips = LPIPS(args.lpips_weights).to(
            device, memory_format=conv_memory_format(device, precision)
        )
    if args.gan:
        torch.manual_seed(args.seed + 2)
        disc = PatchDiscriminator()
        if args.init_disc:
            disc = load_discriminator(args.init_disc).train()
        disc.to(device, memory_format=conv_memory_format(device, precision))
    net = SendVAE(vae, mapper, not args.freeze).to(
        device, memory_format=conv_memory_format(device, precision)
    )
    return net, vfm, lpips, disc


def main():
    args = parse_arguments()
    if args.freeze and args.align == "none":
        raise UserError("--freeze trains the mapper only, but --align none builds none")
    if args.fid_every and not args.val:
        raise UserError(
            "--fid-every measures reconstructions of held-out pictures: name their folder with --val"
        )
    if args.probe_every and not args.probe_data:
        raise UserError("--probe-every needs --probe-data, a benchmark's folder")
    if args.freeze:
        args.lpips = args.kl = args.gan = 0
    args.noise = args.noise and args.align == "mapper"
    device = setup(args.device, args.timeout)
    precision = resolve_precision(args.precision, device)
    micro_batch = share_batch(args.batch_size, args.accum)

    # Data
    data = ImageSet(args.data, args.check_data, args.skip_bad)
    val_data = ImageSet(args.val) if args.val else None
    total = args.steps or math.ceil(args.epochs * len(data) / args.batch_size)
    steps_per_epoch = len(data) / args.batch_size
    say(f"data      {len(data)} pictures in {len(data.classes)} classes, {args.data}")
    if data.smallest < args.resolution:
        say(
            f"note: some pictures are smaller than {args.resolution} pixels (the smallest {data.smallest}) and are enlarged"
        )

    # Networks and optimisers
    net, vfm, lpips, disc = build_networks(args, device, precision)
    vae, mapper = net.vae, net.mapper
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    sizes = [
        f"{name} {sum(p.numel() for p in m.parameters()) / 1e6:.2f}M"
        for name, m in dict(VAE=vae, mapper=mapper, VFM=vfm, discriminator=disc).items()
        if m is not None
    ]
    say(
        f"model     {', '.join(sizes)}; latents {vae.channels}x{vae.latent_size}x{vae.latent_size}; {precision} on {device}"
    )
    trained = nn.ModuleDict(dict(net=net) if disc is None else dict(net=net, disc=disc))
    groups = [
        dict(params=[p for p in m.parameters() if p.requires_grad]) for m in trained.values()
    ]  # clipped one by one
    optimizer = torch.optim.AdamW(
        groups, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )
    names = ["align", "recon", "lpips", "kl", "gan", "disc", "grad_norm"]
    parts = dict(
        trained, ema=ema, optimizer=optimizer
    )  # what a checkpoint holds, loaded in this order

    # Resume
    start, running = resume(args, FREE, parts, total, device)
    if start is None:
        return

    # Parallel and compiled forms; `net` and `disc` stay the plain modules that are saved
    forward, critic = net, disc
    if args.compile if args.compile is not None else device.type == "cuda":
        forward, critic, vfm, lpips = (
            None if m is None else torch.compile(m) for m in (net, disc, vfm, lpips)
        )
    forward = parallel(forward)
    judge = None if critic is None else parallel(critic)  # critic: without gradients of its own

    # What is looked at now and then
    if args.fid_every:
        from fid import Pictures, training_measure  # only here: most runs do without Inception

        measure = training_measure(
            args.fid_ref or args.val, device, args.inception_weights, args.resolution, args.workers
        )
        held_out = Pictures(args.val, min(args.fid_num, len(val_data)), args.resolution)
    if args.probe_every and rank() == 0:
        from probe import training_probe

        probe = training_probe(args.probe_data, args.resolution, precision)

    def reconstructed():
        """This process's share of the pictures to measure, reconstructed: (indices (b,), uint8 (b,3,H,W))."""
        for index, x in held_out.batches(device, args.workers):
            with torch.no_grad(), autocast(device, precision):
                yield index, to_uint8(ema.vae.decode(ema.vae.encode(from_uint8(x))[0]))

    log = RunLog(args, names, running, start, total, steps_per_epoch, device)
    partner = np.random.default_rng(args.seed).permutation(len(data))
    others = (
        functools.partial(other_pictures, data, partner, args.resolution)
        if args.shuffle_targets
        else None
    )
    dataset = TrainingBatches(data, args.batch_size, args.seed, args.resolution, extra=others)
    stream = iter(load_batches(dataset, range(start, total), args.workers, device))
    shape = (vae.channels, vae.latent_size, vae.latent_size)
    watch, saver = Watch(args.timeout), Saver(args.out, args.keep_every)
    guard = Guard(trained, optimizer, args.clip)
    for step in range(start, total + 1):  # the last turn only measures and saves
        due = log.every(args.save_every, step)
        bad = (due or watch.stop or log.every(args.log_every, step)) and guard.look(
            args, names, step == total
        )
        due = due and not bad
        if step > start and log.every(args.log_every, step):
            log.line(step, active)
        if (due or step % args.sample_every == 0) and rank() == 0:
            log.pictures(step, draw_pictures(ema.vae, val_data or data, device, precision))
        if due:
            stats_images = min(4000 if step < total else args.stats_images or len(data), len(data))
            mean, std = latent_statistics(
                ema.vae, data, args.resolution, stats_images, args, device, precision
            )
            (
                ema.vae.latent_mean.copy_(mean),
                ema.vae.latent_std.copy_(std),
            )  # until the next step only
            if val_data is not None:
                log.note(step, validate(ema, vfm, val_data, args, device, precision))
        if log.every(args.probe_every, step) and rank() == 0:
            log.note(step, probe(ema.vae))
        if log.every(args.fid_every, step):
            log.note(step, dict(rfid=measure(reconstructed(), held_out.count)["fid"]))
        if (
            due or watch.stop and not bad
        ):  # last, so that nothing of this step is missing after a resume
            info = dict(
                arguments=vars(args),
                step=step,
                epoch=step / steps_per_epoch,
                stats_images=stats_images if due else None,
            )
            weights = (
                {"vae.safetensors": ("vae", ema.vae.state_dict(), vae.config, info)} if due else {}
            )
            state = {name: part.state_dict() for name, part in parts.items()}
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
        gan = args.gan if step >= args.gan_start else 0.0
        factors = dict(align=args.align_weight, recon=1.0, lpips=args.lpips, kl=args.kl, gan=gan)
        losses = torch.zeros(len(names), device=device)
        fakes = []
        for i in range(args.accum):
            part = slice(i * micro_batch, (i + 1) * micro_batch)
            x, position = from_uint8(batch["image"][part]), batch["position"][part]
            noise, mapper_noise = (
                normal(args.seed, name, position, shape) for name in ("posterior", "mapper noise")
            )
            t = mapper_times(args.seed, position, args.noise and args.noise_kind)
            with autocast(device, precision), sync_gradients(forward, i == args.accum - 1):
                y, mean, logvar, tokens = forward(x, noise, t, mapper_noise)
                terms = {}
                if mapper is not None:
                    with torch.no_grad():
                        target = vfm(
                            from_uint8(batch["other"][part]) if args.shuffle_targets else x
                        )  # (b,N,D)
                    terms["align"] = (vavae_loss if args.align == "vavae" else align_loss)(
                        tokens, target
                    )
                if not args.freeze:
                    terms["recon"] = F.mse_loss(y, x) if args.recon == "mse" else F.l1_loss(y, x)
                if args.lpips:
                    terms["lpips"] = lpips(y, x).mean()
                if args.kl:
                    terms["kl"] = kl_loss(mean, logvar)
                if gan:
                    disc.requires_grad_(False)
                    terms["gan"] = -critic(y).mean()
                    disc.requires_grad_(True)
                    fakes.append((x, y.detach()))
                loss = sum(factors[k] * term for k, term in terms.items())
                (loss / args.accum).backward()
            for k, term in terms.items():
                losses[names.index(k)] += term.detach() / args.accum
        for i, (x, y) in enumerate(fakes):
            with autocast(device, precision), sync_gradients(judge, i == args.accum - 1):
                loss = hinge_loss(judge(x), judge(y))
                (loss / args.accum).backward()
            losses[5] += loss.detach() / args.accum
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, total)
        watch.end_step()
        losses[6] = guard.step(losses[:6], step)
        ema_update(ema, net, args.ema)
        active = [*terms, *["disc"] * (gan > 0), "grad_norm"]
        log.add(losses, guard.finite)
        # --------------------------------------------------------------------------------------------------------------
    saver.close()
    log.close(step, f"done      {args.out}/vae.safetensors; pictures in {args.out}/samples")


if __name__ == "__main__":
    run_main(main)
