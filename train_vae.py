"""Stage 1, Send-VAE: tune a VAE so that a small mapper h can predict the tokens of a frozen vision
model f from the VAE's *noised* latents.

    L = lambda mean_n(1 - cos(h(z_t)[n], f(x)[n])) + recon + lpips + kl + gan        (paper, eq. 3)
    z ~ posterior of x;  z_t = (1-t) BN(z) + t eps, inside the mapper;  t ~ U(0,1)

Images are in [-1,1], latents z in the VAE's raw units, and time t is 0 at data and 1 at noise.

    python train_vae.py --data data/cifar10/train --resolution 32 ...    # small pictures on a CPU
    python train_vae.py --init vavae.safetensors                         # the paper's run on a GPU
    torchrun --nproc_per_node=8 train_vae.py --init vavae.safetensors    # the same curve on eight

docs/images.md has the first command in full. Writes to --out (runs/vae): vae.safetensors (EMA
weights and latent statistics), checkpoints/, metrics.jsonl, samples/. Rerun a command to resume it.
"""

import argparse
import contextlib
import copy
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.draws import normal, uniform
from common.files import UserError, network_hash
from common.flags import (
    COMPILING,
    add_training_flags,
    parse_flags,
    positive,
    share_batch,
    wants_compile,
    whole_number,
)
from common.pictures import (
    ImageSet,
    TrainingBatches,
    decode_all,
    from_uint8,
    load_batches,
    say_if_enlarged,
    to_uint8,
)
from common.processes import (
    Watch,
    autocast,
    conv_memory_format,
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
from common.published import load_discriminator
from common.runs import RunLog, Saver, newest_checkpoint, resume, training_state
from common.training import (
    FOR_LESS_MEMORY,
    Guard,
    add_mean,
    build_optimizer,
    count_steps,
    ema_decay,
    ema_update,
    passes,
    schedule,
    set_learning_rates,
    settle_passes,
    weighted_sum,
)
from common.weights import load_vae
from models import LPIPS, VAE, VFM, Mapper, PatchDiscriminator, compile_network

# The flags of this stage that may change when a run is resumed, beside common.flags.FREE_FLAGS.
FREE = {
    "val",
    "val_images",
    "stats_images",
    "lpips_weights",
    "init",
    "init_disc",
    "ifid_every",
    "ifid_train",
    "mapper_init",
    "probe_every",
    "probe_data",
}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--val", help="folder of held-out pictures: PSNR and alignment loss at every save"
    )
    group.add_argument(
        "--val-images",
        type=positive,
        default=2000,
        help="how many of them, the first of a fixed shuffle",
    )
    group.add_argument(
        "--resolution", type=positive, default=256, help="side of the square picture, pixels"
    )
    group.add_argument("--no-flip", dest="flip", action="store_false", help="no mirror images")

    group = parser.add_argument_group("VAE")
    group.add_argument("--spec", default="f16d32", help="f<factor>d<channels>")
    group.add_argument("--ch", type=int, default=128, help="base width")
    group.add_argument(
        "--ch-mult",
        type=int,
        nargs="+",
        help="width multipliers, one a level (default: the spec's)",
    )
    group.add_argument(
        "--num-res-blocks", type=int, default=2, help="a level (the decoder has one more)"
    )
    group.add_argument(
        "--init",
        help="VAE to start from: ours, LDM's, diffusers' or hf:<owner>/<repository>; it decides "
        "the architecture",
    )
    group.add_argument("--init-disc", help="checkpoint whose discriminator to start from")
    group.add_argument(
        "--freeze",
        action="store_true",
        help="train the mapper only: what a VAE's latents give as they are",
    )

    group = parser.add_argument_group("alignment")
    group.add_argument(
        "--align",
        choices=["mapper", "vavae", "none"],
        default="mapper",
        help="mapper: the paper's; vavae: VA-VAE's linear projection of clean latents, loss with "
        "margins; none: no vision model",
    )
    group.add_argument("--align-weight", type=float, default=1.0, help="lambda")
    group.add_argument(
        "--mapper-depth",
        type=int,
        default=1,
        help="ViT blocks; 0 is the paper's MLP-only ablation",
    )
    group.add_argument(
        "--mapper-width", type=int, help="width of its tokens (default: the vision model's)"
    )
    group.add_argument("--mapper-hidden", type=int, default=2048, help="width of its MLP")
    group.add_argument("--mapper-heads", type=int, help="default: one for every 64 of its width")
    group.add_argument("--mapper-patch", type=int, help="default: 16 / factor, at least 1")
    group.add_argument(
        "--mapper-init",
        choices=["xavier", "torch"],
        default="xavier",
        help="its initial weights: REPA-E's, or PyTorch's defaults",
    )
    group.add_argument(
        "--mapper-norm",
        choices=["batch", "running"],
        default="batch",
        help="its batch norm trains on the batch's statistics, or on their running averages as in "
        "REPA-E's alignment of the VAE",
    )
    group.add_argument(
        "--no-noise",
        dest="noise",
        action="store_false",
        help="mapper sees clean latents (ablation)",
    )
    group.add_argument(
        "--noise-kind",
        choices=["flow", "constant"],
        default="flow",
        help="t uniform in (0,1), or 0.5 always (ablation)",
    )
    group.add_argument(
        "--shuffle-targets",
        action="store_true",
        help="control: align to the vision features of another picture, the same one in every "
        "epoch",
    )

    group = parser.add_argument_group(
        "loss weights (0 switches a term off and does not build its network)"
    )
    group.add_argument(
        "--recon",
        choices=["mse", "l1"],
        default="mse",
        help="mean over pixels; paper: mse, REPA-E's code: l1",
    )
    group.add_argument("--recon-weight", type=float, default=1.0)
    group.add_argument("--lpips", type=float, default=1.0)
    group.add_argument(
        "--lpips-weights", nargs="+", default=(), help="local files of VGG16 and the linear layers"
    )
    group.add_argument(
        "--lpips-rescale",
        action="store_true",
        help="scale pictures for LPIPS from [0,1] to [-1,1] once more, as in REPA-E's loss",
    )
    group.add_argument("--kl", type=float, default=1e-6, help="of the sum over a latent")
    group.add_argument("--gan", type=float, default=0.1)
    group.add_argument(
        "--gan-start", type=int, default=0, help="step at which the adversarial term begins"
    )
    group.add_argument("--disc-lr", type=float, default=1e-4, help="the discriminator's --lr")
    group.add_argument(
        "--autocast-losses",
        action="store_true",
        help="LPIPS and discriminator in --precision, which saves time; else in fp32, as in REPA-E",
    )
    group.add_argument(
        "--clip-together",
        action="store_true",
        help="clip the gradients of VAE and mapper by their common norm; else each by its own",
    )

    group = parser.add_argument_group("measurements")
    group.add_argument(
        "--stats-images",
        type=whole_number,
        help="for the final latent statistics (default: all; 4000 at checkpoints)",
    )
    group.add_argument(
        "--ifid-every",
        type=whole_number,
        default=0,
        help="steps between iFIDs of --fid-num pictures of --val (see fid.py); 0: never",
    )
    group.add_argument(
        "--ifid-train",
        type=positive,
        default=50000,
        help="pictures of --data, evenly spaced, whose latents are their neighbours",
    )
    group.add_argument(
        "--probe-every",
        type=whole_number,
        default=0,
        help="steps between linear probes of --probe-data; 0: never",
    )
    group.add_argument(
        "--probe-data",
        help="folder of a benchmark (see probe.py): F1 of a small probe on its attributes",
    )
    add_training_flags(
        parser,
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
    return parse_flags(parser, argv)


def check_arguments(args):
    """Refuses flags that contradict each other, and settles those that others decide."""
    if args.freeze and args.align == "none":
        raise UserError("--freeze trains the mapper only, but --align none builds none")
    if (args.fid_every or args.ifid_every) and not args.val:
        raise UserError(
            "--fid-every and --ifid-every measure reconstructions of held-out pictures: name their "
            "folder with --val"
        )
    if args.probe_every and not args.probe_data:
        raise UserError("--probe-every needs --probe-data, a benchmark's folder")
    if args.freeze:
        args.lpips = args.kl = args.gan = 0
    args.noise = args.noise and args.align == "mapper"
    clear_flags_without_effect(args)


def clear_flags_without_effect(args):
    """Sets them to None, as which they are not compared when a run is resumed."""
    if not args.gan:
        args.disc_lr = None
    if not args.gan and not args.lpips:
        args.autocast_losses = None
    if args.freeze or args.align == "none":
        args.clip_together = None
    if args.align != "mapper":
        args.mapper_norm = None


# --------------------------------------------------------------------------------------------------
# The science of a step


class Networks(NamedTuple):
    """What a step computes with. vfm, lpips and discriminator are None where their loss is off."""

    net: nn.Module  # SendVAE: what is trained besides the discriminator
    vfm: nn.Module  # frozen vision model f: images (B,3,H,W) -> patch tokens (B,N,D)
    lpips: nn.Module  # frozen perceptual distance: two images (B,3,H,W) -> (B,)
    discriminator: nn.Module  # images (B,3,H,W) -> logits (B,1,h',w')
    latent_shape: tuple  # (C,h,w)


def vae_losses(networks, batch, step, args):
    """The loss terms of a forward pass, unweighted, {term: scalar}. common.training.weighted_sum
    makes eq. 3 of them: the weight of a term is the flag --<term>-weight or --<term>.

    batch: image uint8 (b,3,H,W) and position int64 (b,), the pictures' places in the run, of which
    every random draw is a function; with --shuffle-targets also other, uint8 (b,3,H,W).
    """
    x = from_uint8(batch["image"])  # (b,3,H,W)
    noise = draw_noise(networks.latent_shape, batch["position"], args.seed, args)
    y, mean, logvar, tokens = networks.net(x, *noise)

    losses = {}
    if args.align != "none":
        with torch.no_grad():
            seen = from_uint8(batch["other"]) if args.shuffle_targets else x
            target = networks.vfm(seen)  # (b,N,D)
        align = vavae_loss if args.align == "vavae" else align_loss
        losses["align"] = align(tokens, target)  # eq. 2
    if not args.freeze:
        losses["recon"] = F.mse_loss(y, x) if args.recon == "mse" else F.l1_loss(y, x)
    with losses_precision(x.device, args):
        if args.lpips:
            losses["lpips"] = networks.lpips(y, x).mean()
        if args.kl:
            losses["kl"] = kl_loss(mean, logvar)
        if args.gan and step >= args.gan_start:
            # The VAE learns from a discriminator whose weights are fixed ...
            networks.discriminator.requires_grad_(False)
            losses["gan"] = -networks.discriminator(y).mean()
            # ... and the discriminator from reconstructions that are fixed.
            networks.discriminator.requires_grad_(True)
            real = networks.discriminator(x)
            fake = networks.discriminator(y.detach())
            losses["disc"] = hinge_loss(real, fake)
    return losses


def losses_precision(device, args):
    """The context of LPIPS and discriminator: fp32, or what surrounds it (--autocast-losses)."""
    if args.autocast_losses:
        return contextlib.nullcontext()
    return autocast(device, "fp32")


def align_loss(predicted, target):
    """1 - cosine, mean over pictures and tokens; both (B,N,D). Paper, eq. 2: 0 is perfect, 1 is
    orthogonal."""
    return 1 - F.cosine_similarity(predicted.float(), target.float(), dim=-1).mean()


def vavae_loss(predicted, target, cos_margin=0.5, matrix_margin=0.25):
    """VA-VAE's loss (Yao, Yang, Wang 2025, eqs. 3 to 5) of projected latents and vision tokens,
    both (B,N,D): the cosines of tokens, and those of each picture's pairs of tokens, each with its
    margin. VA-VAE scales the sum by gradient norms; here --align-weight is fixed.
    """
    predicted = F.normalize(predicted.float(), dim=-1)
    target = F.normalize(target.float(), dim=-1)
    cosine = F.relu(1 - cos_margin - (predicted * target).sum(-1)).mean()
    difference = (predicted @ predicted.mT - target @ target.mT).abs()  # (B,N,N)
    return cosine + F.relu(difference - matrix_margin).mean()


def kl_loss(mean, logvar):
    """KL(posterior || N(0,1)) of mean and logvar (B,C,h,w): summed over a latent, mean over the
    batch."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()


def hinge_loss(real, fake):
    """The discriminator's loss, of its logits (B,1,h',w') on real and reconstructed pictures."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def draw_noise(shape, position, seed, args):
    """The random draws of a pass, for latents of shape (C,h,w) and pictures at positions (B,):
    noise of the posterior (B,C,h,w), the mapper's times t (B,), and the mapper's noise (B,C,h,w).
    """
    noise = normal(seed, "posterior", position, shape)
    t = uniform(seed, "mapper time", position)
    if not args.noise:
        t = torch.zeros_like(t)
    elif args.noise_kind == "constant":
        t = torch.full_like(t, 0.5)
    return noise, t, normal(seed, "mapper noise", position, shape)


class SendVAE(nn.Module):
    """VAE and mapper as one module, so that one DistributedDataParallel wraps both."""

    def __init__(self, vae, mapper, decode=True):
        super().__init__()
        self.vae = vae
        self.mapper = mapper
        self.decode = decode

    def forward(self, x, noise, t, mapper_noise):
        """Images (B,3,H,W), posterior noise (B,C,h,w), the mapper's times (B,) and noise (B,C,h,w)
        -> reconstructions (B,3,H,W), or None without `decode`; mean and logvar of the posterior
        (B,C,h,w); predicted tokens (B,N,D), or None without a mapper."""
        mean, logvar = self.vae.encode(x)
        z = self.vae.sample(mean, logvar, noise)  # (B,C,h,w)
        tokens = None
        if self.mapper is not None:
            tokens = self.mapper(z, t, mapper_noise)
        y = self.vae.decode(z) if self.decode else None
        return y, mean, logvar, tokens


class Projection(nn.Conv2d):
    """VA-VAE's linear projection, in place of the mapper: latents (B,C,h,w) -> (B,N,D). It has no
    bias, as published."""

    def __init__(self, channels, dim, patch):
        super().__init__(channels, dim, patch, patch, bias=False)

    def forward(self, z, t, noise):
        return super().forward(z).flatten(2).mT


def backward_pass(networks, part, step, args, precision, last):
    """A forward and a backward pass on a part of this process's share of a batch; in the last pass
    of a step, gradients are averaged over the processes. Returns the loss terms, {term: scalar}.
    """
    device = part["position"].device
    with autocast(device, precision), sync_gradients((networks.net, networks.discriminator), last):
        losses = vae_losses(networks, part, step, args)
        loss = weighted_sum(losses, args) / args.accum
        loss.backward()
    return losses


def train_step(networks, batch, step, args, precision, guard):
    """One step on this process's share of the batch: --accum passes, then the optimiser. Returns
    the mean of each loss term over the passes and the norm of the gradient, {term: scalar}.
    """
    means = {}
    for i, part in enumerate(passes(batch, args.accum)):
        last = i == args.accum - 1
        losses = backward_pass(networks, part, step, args, precision, last)
        add_mean(means, losses, args.accum)
    grad_norm = guard.step(means, step)
    return dict(means, grad_norm=grad_norm)


# --------------------------------------------------------------------------------------------------
# Measurements and pictures


def first_pictures(data, count, size, args, device):
    """Yields this process's share of the first `count` pictures of a fixed shuffle, unflipped:
    images (b,3,size,size) and their positions (b,)."""
    order = TrainingBatches(data, world() * 32, seed=0, size=size, flip=False)
    items = range(math.ceil(count / order.batch_size))
    for batch in load_batches(order, items, args.workers, device):
        wanted = batch["position"] < count
        if wanted.any():
            yield from_uint8(batch["image"][wanted]), batch["position"][wanted]


@torch.no_grad()
def latent_statistics(vae, data, size, count, args, device, precision):
    """Mean and std (C,) of posterior samples over the first `count` pictures, in float64. The
    posterior's own variance enters in closed form. Several processes share the work."""
    sums = torch.zeros(3, vae.channels, dtype=torch.float64, device=device)
    for x, _ in first_pictures(data, count, size, args, device):
        with autocast(device, precision):
            mean, logvar = vae.encode(x)  # (b,C,h,w)
        mean = mean.double()
        variance = logvar.double().exp()
        sums[0] += mean.sum((0, 2, 3))
        sums[1] += (mean.square() + variance).sum((0, 2, 3))
        sums[2] += mean[:, 0].numel()
    total, total_of_squares, number = sum_over_processes(sums)
    mean = total / number
    variance = (total_of_squares / number - mean.square()).clamp(min=1e-12)
    return mean.float(), variance.sqrt().float()


@torch.no_grad()
def validate(networks, data, args, device, precision):
    """Over the first --val-images held-out pictures: PSNR of reconstructions from the posterior
    mean (dB, of 8-bit pictures, mean over pictures), and the cosine alignment loss with the noise
    of training, for either kind of alignment. Returns {name: float}.
    """
    vae = networks.net.vae
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    count = min(args.val_images, len(data))
    for x, position in first_pictures(data, count, vae.resolution, args, device):
        with autocast(device, precision):
            mean, logvar = vae.encode(x)
            y = to_uint8(vae.decode(mean)).float()
            if networks.vfm is not None:
                noise, t, mapper_noise = draw_noise(networks.latent_shape, position, 1, args)
                z = vae.sample(mean, logvar, noise)
                tokens = networks.net.mapper(z, t, mapper_noise)
                sums[1] += align_loss(tokens, networks.vfm(x)) * len(x)
        error = (y - to_uint8(x).float()).square().mean((1, 2, 3)).clamp(min=1e-10)
        sums[0] += (10 * torch.log10(255**2 / error)).sum()
        sums[2] += len(x)
    psnr, align, count = sum_over_processes(sums).tolist()
    values = dict(val_psnr=psnr / count)
    if networks.vfm is not None:
        values["val_align"] = align / count
    return values


def principal_components(z):
    """Latents (B,C,h,w) -> uint8 (B,3,h,w): their first three principal components over the batch,
    shown as red, green and blue."""
    B, C, h, w = z.shape
    flat = z.float().nan_to_num().permute(0, 2, 3, 1).reshape(-1, C)
    flat = flat - flat.mean(0)
    axes = torch.linalg.svd(flat.cpu().double(), full_matrices=False)[2][:3].to(flat)  # (3,C)
    # An axis has no sign of its own. Without this one the colours would flip between pictures.
    axes = axes * axes.sum(1, keepdim=True).sign()
    values = F.pad(flat @ axes.T, (0, 3 - len(axes)))  # (B h w, 3)
    values = values / (2 * values.std(0).clamp(min=1e-6))
    return to_uint8(values).view(B, h, w, 3).permute(0, 3, 1, 2)


@torch.no_grad()
def show_pictures(log, step, vae, data, val_data, device, precision):
    """Writes samples/<step>.png: a row of eight held-out pictures (of the training pictures where
    there are none), their reconstructions, and the principal components of their latents."""
    if rank() != 0:
        return
    shown = data if val_data is None else val_data
    order = TrainingBatches(shown, 8, seed=0)
    index = np.array([order.index_at(position) for position in range(8)])
    x = from_uint8(shown.stack(index, vae.resolution).to(device))
    with autocast(device, precision):
        z = vae.encode(x)[0]
        y = vae.decode(z)
    colours = F.interpolate(principal_components(z).float(), x.shape[2:], mode="nearest")
    log.pictures(step, [to_uint8(x), to_uint8(y), colours.to(torch.uint8)])


def other_pictures(data, partner, size, index, flip):
    """For --shuffle-targets: the pictures, uint8 (b,3,size,size), that stand in for those at
    `index`. partner (N,) is a fixed permutation of all pictures.
    """
    return dict(other=data.stack(partner[index], size))


def build_measurements(args, data, val_data, device, precision):
    """The measurements of --probe-every, --fid-every and --ifid-every: [(every so many steps,
    function)], each function from a VAE to {name: float}, which is empty on all processes but the
    first."""
    measurements = []
    if args.probe_every:
        measurements.append((args.probe_every, attribute_probe(args, precision)))
    if args.fid_every or args.ifid_every:
        measure, held_out = held_out_measure(args, len(val_data), device)
    if args.fid_every:
        rfid = reconstruction_fid(measure, held_out, args, device, precision)
        measurements.append((args.fid_every, rfid))
    if args.ifid_every:
        ifid = interpolation_fid(measure, held_out, data, args, device, precision)
        measurements.append((args.ifid_every, ifid))
    return measurements


def attribute_probe(args, precision):
    """F1 of a linear probe on the latents of --probe-data."""
    if rank() != 0:
        return lambda vae: {}
    # Imported here because most runs do without it.
    from probe import training_probe

    return training_probe(args.probe_data, args.resolution, precision)


def held_out_measure(args, available, device):
    """fid.training_measure against --fid-ref; and the held-out pictures that are measured: all the
    `available` ones, or --fid-num of them."""
    # Imported here because most runs do without Inception.
    from fid import Pictures, training_measure

    measure = training_measure(
        args.fid_ref or args.val, device, args.inception_weights, args.resolution, args.workers
    )
    return measure, Pictures(args.val, min(args.fid_num, available), args.resolution)


def reconstruction_fid(measure, held_out, args, device, precision):
    """rFID of the held-out pictures."""

    def reconstructions(vae):
        """This process's share: indices (b,) and reconstructions uint8 (b,3,H,W)."""
        for index, pictures in held_out.batches(device, args.workers):
            with torch.no_grad(), autocast(device, precision):
                latents = vae.encode(from_uint8(pictures))[0]
                yield index, to_uint8(vae.decode(latents))

    def rfid(vae):
        values = measure(reconstructions(vae), held_out.count)
        return {f"r{name}": value for name, value in values.items() if name == "fid"}

    return rfid


def interpolation_fid(measure, held_out, data, args, device, precision):
    """iFID of the held-out pictures, each joined with a neighbour among --ifid-train pictures."""
    from fid import Interpolations, Pictures, TrainingLatents

    training = Pictures(args.data, min(args.ifid_train, len(data)), args.resolution)

    def ifid(vae):
        count = min(4000, len(data))
        mean, std = latent_statistics(vae, data, args.resolution, count, args, device, precision)
        # The next step overwrites these buffers with those of the trained network.
        vae.latent_mean.copy_(mean)
        vae.latent_std.copy_(std)
        latents = TrainingLatents(vae, training, device, args.workers, precision)
        between = Interpolations(vae, held_out, latents)
        values = measure(between.batches(), held_out.count)
        return {f"i{name}": value for name, value in values.items() if name == "fid"}

    return ifid


@torch.no_grad()
def measured_weights(networks, data, val_data, step, total, args, device, precision, log):
    """Measures the statistics of the latents, and validates where there are held-out pictures.
    Returns what Saver.save publishes of the EMA networks: {file name: (kind, state, config, info)}.
    """
    vae = networks.net.vae
    count = min(4000, len(data))
    if step == total:
        count = min(args.stats_images or len(data), len(data))
    mean, std = latent_statistics(vae, data, args.resolution, count, args, device, precision)
    # The next step overwrites these buffers with those of the trained network.
    vae.latent_mean.copy_(mean)
    vae.latent_std.copy_(std)
    if val_data is not None:
        log.note(step, validate(networks, val_data, args, device, precision))
    epoch = step / log.steps_per_epoch
    info = dict(arguments=vars(args), step=step, epoch=epoch, stats_images=count)
    return {"vae.safetensors": ("vae", vae.state_dict(), vae.config, info)}


# --------------------------------------------------------------------------------------------------
# Networks


def build_networks(args, device, precision):
    """Builds the networks that the flags ask for. The global random generator is for initial
    weights only, so it is seeded before each network; all other draws are common.draws'.
    """
    layout = conv_memory_format(device, precision, training=True)
    torch.manual_seed(args.seed)
    vae = build_vae(args)
    vfm = mapper = lpips = discriminator = None
    if args.align != "none":
        patch = args.mapper_patch or max(1, 16 // vae.factor)
        grid = vae.latent_size // patch
        vfm = VFM(
            args.vfm, args.vfm_weights, args.resolution, grid, args.vfm_stride, args.vfm_norm
        ).to(device)
        # Checkpoints record what came of the flags.
        args.vfm_norm = vfm.norm
        args.vfm_weights_hash = network_hash(vfm)
        torch.manual_seed(args.seed + 1)
        mapper = build_mapper(args, vae, vfm.dim, patch)
    if args.lpips:
        lpips = LPIPS(args.lpips_weights, args.lpips_rescale).to(device, memory_format=layout)
        args.lpips_weights_hash = network_hash(lpips)
    if args.gan:
        torch.manual_seed(args.seed + 2)
        args.init_disc_hash = None
        if args.init_disc:
            discriminator = load_discriminator(args.init_disc).train()
            args.init_disc_hash = network_hash(discriminator)
        else:
            discriminator = PatchDiscriminator()
        discriminator.to(device, memory_format=layout)
    net = SendVAE(vae, mapper, decode=not args.freeze).to(device, memory_format=layout)
    latent_shape = (vae.channels, vae.latent_size, vae.latent_size)
    return Networks(net, vfm, lpips, discriminator, latent_shape)


def build_vae(args):
    args.init_hash = None
    if args.init:
        vae = load_vae(args.init).train()
        args.init_hash = vae.info["hash"]
        vae.set_resolution(args.resolution)
    else:
        vae = VAE(args.spec, args.resolution, args.ch, args.ch_mult, args.num_res_blocks)
    vae.grad_checkpoint = args.grad_checkpoint
    vae.requires_grad_(not args.freeze)
    return vae


def build_mapper(args, vae, dim, patch):
    """The mapper from latents to tokens of width `dim`, with patches of `patch` latents."""
    if args.align == "vavae":
        return Projection(vae.channels, dim, patch)
    width = args.mapper_width or dim
    heads = args.mapper_heads or max(1, width // 64)
    mapper = Mapper(
        vae.channels,
        vae.latent_size,
        patch,
        dim,
        heads,
        args.mapper_depth,
        width,
        args.mapper_hidden,
        args.mapper_init,
        args.mapper_norm,
    )
    # The averages start as the statistics that a VAE's file brings, as in REPA-E, or as 0 and 1.
    mapper.norm.running_mean.copy_(vae.latent_mean)
    mapper.norm.running_var.copy_(vae.latent_std.square())
    return mapper


def trained_networks(networks):
    """The networks with an optimiser, under their names in a checkpoint."""
    trained = nn.ModuleDict(dict(net=networks.net))
    if networks.discriminator is not None:
        trained["disc"] = networks.discriminator
    return trained


def parameter_groups(networks, args):
    """-> [network or networks whose gradients are clipped by one norm], [their learning rates]."""
    if args.clip_together or networks.net.mapper is None:
        groups = [networks.net]
    else:
        groups = [networks.net.vae, networks.net.mapper]
    if args.freeze:
        groups = [networks.net.mapper]
    rates = [args.lr] * len(groups)
    if networks.discriminator is not None:
        groups.append(networks.discriminator)
        rates.append(args.disc_lr)
    return groups, rates


def describe(networks):
    """Their numbers of parameters, for the terminal."""
    named = {
        "VAE": networks.net.vae,
        "mapper": networks.net.mapper,
        "VFM": networks.vfm,
        "discriminator": networks.discriminator,
    }
    sizes = []
    for name, network in named.items():
        if network is not None:
            millions = sum(p.numel() for p in network.parameters()) / 1e6
            sizes.append(f"{name} {millions:.2f}M")
    return ", ".join(sizes)


def compiled_and_parallel(networks, args, device):
    """The networks as they run: compiled where asked for, which happens in place, and those that
    are trained wrapped for several processes. The modules inside are the ones that are saved.
    """
    net, vfm, lpips, discriminator, _ = networks
    if wants_compile(args, device):
        say(COMPILING)
        for network in (net, vfm, lpips, discriminator):
            if network is not None:
                compile_network(network)
    if discriminator is not None:
        discriminator = parallel(discriminator)
    return networks._replace(net=parallel(net), discriminator=discriminator)


# --------------------------------------------------------------------------------------------------


def load_data(args):
    """The pictures to train on; the held-out ones or None; and what TrainingBatches adds to a batch
    for --shuffle-targets, or None."""
    data = ImageSet(args.data, skip_bad=args.skip_bad)
    val_data = ImageSet(args.val) if args.val else None
    say(f"data      {len(data)} pictures in {len(data.classes)} classes, {args.data}")
    say_if_enlarged(data, args.resolution)
    args.val_hash = None if val_data is None else val_data.fingerprint
    others = None
    if args.shuffle_targets:
        partner = np.random.default_rng(args.seed).permutation(len(data))
        others = functools.partial(other_pictures, data, partner, args.resolution)
    return data, val_data, others


def main():
    args = parse_arguments()
    check_arguments(args)
    device = setup(args.device, args.timeout)
    precision = resolve_precision(args.precision, device)
    # Refuses a batch that the processes and passes cannot share.
    share_batch(args.batch_size, args.accum)

    # Data
    data, val_data, others = load_data(args)
    total, steps_per_epoch = count_steps(args, len(data))

    # Networks and optimiser
    plain = build_networks(args, device, precision)
    trained = trained_networks(plain)
    ema = copy.deepcopy(plain.net).eval().requires_grad_(False)
    groups, rates = parameter_groups(plain, args)
    optimizer = build_optimizer(groups, args)
    shape = "x".join(map(str, plain.latent_shape))
    say(f"model     {describe(plain)}; latents {shape}; {precision} on {device}")

    # Resume. A checkpoint holds these parts, which are loaded in this order.
    parts = dict(trained, ema=ema, optimizer=optimizer)
    start, running = resume(args, FREE, parts, total, device, data)
    if start is None:
        return

    # What the loop needs. `plain` holds the modules that are saved, `networks` those that run.
    # Decoding takes hours on ImageNet, so it waits until the checkpoint is known to fit.
    decode_all(data, args.check_data)
    networks = compiled_and_parallel(plain, args, device)
    ema_networks = networks._replace(net=ema)
    measurements = build_measurements(args, data, val_data, device, precision)
    batches = TrainingBatches(
        data, args.batch_size, args.seed, args.resolution, args.flip, extra=others
    )
    trial = functools.partial(
        backward_pass, networks, step=total, args=args, precision=precision, last=False
    )
    settle_passes(args, device, lambda: batches[start], trial, trained, optimizer)
    log = RunLog(args, running, start, total, steps_per_epoch)
    stream = iter(load_batches(batches, range(start, total), args.workers, device))
    watch = Watch(args.timeout)
    saver = Saver(args.out, args.keep_every)
    guard = Guard(trained, optimizer, args.clip)

    # The last turn of the loop trains no more: it only logs, measures and saves.
    for step in range(start, total + 1):
        save_due = log.due(args.save_every, step)

        # Log?
        if log.due(args.log_every, step):
            guard.check(args, newest_checkpoint, final=step == total)
            log.line(step)

        # Picture?
        if save_due or step % args.sample_every == 0:
            show_pictures(log, step, ema.vae, data, val_data, device, precision)

        # Measure?
        log.measure(step, measurements, ema.vae)

        # Save? Not after a bad step, so that the last checkpoint is from before a series of them.
        if save_due or watch.stop:
            guard.check(args, newest_checkpoint, final=step == total)
        weights = {}
        if save_due and guard.good:
            weights = measured_weights(
                ema_networks, data, val_data, step, total, args, device, precision, log
            )
        if (save_due or watch.stop) and guard.good:
            saver.save(step, weights, training_state(parts, step, args, log, data))

        # Done?
        if step == total or watch.stop:
            break

        # Train
        watch.begin_step()
        batch = next(stream)
        set_learning_rates(optimizer, rates, schedule(args, step, total))
        losses = train_step(networks, batch, step, args, precision, guard)
        ema_update(ema, plain.net, ema_decay(args, step))
        watch.end_step()
        log.add(losses, guard.finite)

    saver.close()
    log.close(step, f"done      {args.out}/vae.safetensors; pictures in {args.out}/samples")


if __name__ == "__main__":
    run_main(main, FOR_LESS_MEMORY)
