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
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import common
from common import normal, say, uniform
from models import LPIPS, VAE, VFM, Mapper, PatchDiscriminator, UserError, load_discriminator, load_vae

# Flags that may change between a run and its resumption; all others must agree.
FREE = {"out", "overwrite", "workers", "compile", "device", "steps", "epochs", "log_every", "save_every", "sample_every",
        "accum", "grad_checkpoint", "val", "val_images", "stats_images", "vfm_weights", "lpips_weights", "init", "init_disc",
        "resume", "probe_every", "probe_data", "fid_every", "fid_num", "fid_ref", "inception_weights", "keep_every", "max_bad_steps",
        "timeout", "check_data", "skip_bad"}


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("data")
    g.add_argument("--data", default="data/imagenet/train", help="folder of <class>/<picture>")
    g.add_argument("--check-data", action="store_true", help="decode every picture before training, once for each list of files")
    g.add_argument("--skip-bad", action="store_true", help="another picture of the class for one that cannot be read; else an error")
    g.add_argument("--val", help="folder of held-out pictures: PSNR and alignment loss at every save")
    g.add_argument("--val-images", type=int, default=2000, help="how many of them, the first of a fixed shuffle")
    g.add_argument("--resolution", type=int, default=256, help="side of the square picture, pixels")
    g = p.add_argument_group("VAE")
    g.add_argument("--spec", default="f16d32", help="f<factor>d<channels>")
    g.add_argument("--ch", type=int, default=128, help="base width")
    g.add_argument("--ch-mult", type=int, nargs="+", help="width multipliers, one a level (default: the spec's)")
    g.add_argument("--num-res-blocks", type=int, default=2, help="a level (the decoder has one more)")
    g.add_argument("--init", help="VAE to start from: ours, LDM's, diffusers' or hf:<owner>/<repository>; it decides the "
                   "architecture")
    g.add_argument("--init-disc", help="checkpoint whose discriminator to start from")
    g.add_argument("--freeze", action="store_true", help="train the mapper only: what a VAE's latents give as they are")
    g = p.add_argument_group("alignment")
    g.add_argument("--align", choices=["mapper", "vavae", "none"], default="mapper", help="mapper: the paper's; vavae: VA-VAE's "
                   "linear projection of clean latents, loss with margins; none: no vision model")
    g.add_argument("--align-weight", type=float, default=1.0, help="lambda")
    g.add_argument("--vfm", default="vit_base_patch14_dinov2.lvd142m", help="any timm model")
    g.add_argument("--vfm-weights", help="local file of its weights (default: timm's, from the hub)")
    g.add_argument("--vfm-stride", type=int, help="for a CNN: stride of the feature map (default: its last)")
    g.add_argument("--mapper-depth", type=int, default=1, help="ViT blocks; 0 is the paper's MLP-only ablation")
    g.add_argument("--mapper-width", type=int, help="width of its tokens (default: the vision model's)")
    g.add_argument("--mapper-hidden", type=int, default=2048, help="width of its MLP")
    g.add_argument("--mapper-heads", type=int, help="default: one for every 64 of its width")
    g.add_argument("--mapper-patch", type=int, help="default: 16 / factor, at least 1")
    g.add_argument("--no-noise", dest="noise", action="store_false", help="mapper sees clean latents (ablation)")
    g.add_argument("--shuffle-targets", action="store_true", help="control: align to the vision features of another picture, "
                   "the same one in every epoch")
    g = p.add_argument_group("loss weights (0 switches a term off and does not build its network)")
    g.add_argument("--recon", choices=["mse", "l1"], default="mse", help="mean over pixels; paper: mse, REPA-E's code: l1")
    g.add_argument("--lpips", type=float, default=1.0)
    g.add_argument("--lpips-weights", nargs="+", default=(), help="local files of VGG16 and the linear layers")
    g.add_argument("--kl", type=float, default=1e-6, help="of the sum over a latent")
    g.add_argument("--gan", type=float, default=0.1)
    g.add_argument("--gan-start", type=int, default=0, help="step at which the adversarial term begins")
    g = p.add_argument_group("optimisation")
    g.add_argument("--batch-size", type=int, default=1024, help="global, pictures a step")
    g.add_argument("--accum", type=int, default=1, help="forward passes a step; the mapper's batch norm sees one at a time")
    g.add_argument("--epochs", type=float, default=80)
    g.add_argument("--steps", type=int, help="instead of --epochs")
    g.add_argument("--lr", type=float, default=3e-4)
    g.add_argument("--lr-schedule", choices=["constant", "cosine"], default="constant")
    g.add_argument("--warmup", type=int, default=0, help="steps")
    g.add_argument("--clip", type=float, default=1.0, help="gradient norm")
    g.add_argument("--ema", type=float, default=0.999, help="decay of the weights that are published; 0: none")
    g.add_argument("--grad-checkpoint", action="store_true", help="less memory, about a third more time")
    g = p.add_argument_group("run")
    g.add_argument("--out", default="runs/vae")
    g.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a run")
    g.add_argument("--resume", action="store_true", help="fail if there is nothing to resume (resuming is the default)")
    g.add_argument("--log-every", type=int, default=50, help="steps")
    g.add_argument("--sample-every", type=int, default=1000, help="steps between pictures")
    g.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints; the last two are kept")
    g.add_argument("--keep-every", type=int, default=0, help="steps between checkpoints that stay for good; 0: none")
    g.add_argument("--max-bad-steps", type=int, default=10, help="stop after more steps in a row whose loss is not finite")
    g.add_argument("--stats-images", type=int, help="for the final latent statistics (default: all; 4000 at checkpoints)")
    g.add_argument("--probe-every", type=int, default=0, help="steps between linear probes of --probe-data; 0: never")
    g.add_argument("--probe-data", help="folder of a benchmark (see probe.py): F1 of a small probe on its attributes")
    g = p.add_argument_group("rFID during training, of EMA reconstructions of --val")
    g.add_argument("--fid-every", type=int, default=0, help="steps; 0: never")
    g.add_argument("--fid-num", type=int, default=5000, help="pictures; few pictures give a higher rFID than 50,000")
    g.add_argument("--fid-ref", help="reference as for fid.py (default: --val)")
    g.add_argument("--inception-weights", help="local file (default: downloaded once)")
    common.add_run_arguments(p)
    return p.parse_args(argv)


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
    return cosine + F.relu((predicted @ predicted.mT - target @ target.mT).abs() - matrix_margin).mean()


class Projection(nn.Conv2d):
    """VA-VAE's in place of the mapper: latents (B,C,h,w) -> (B,N,D), linear, without noise."""

    def forward(self, z, t=None, noise=None):
        return super().forward(z).flatten(2).mT


def kl_loss(mean, logvar):
    """KL(posterior || N(0,1)), summed over a latent (C,h,w), mean over the batch."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()


def hinge_loss(real, fake):
    """The discriminator's loss from its logits (B,1,h,w) on real and reconstructed pictures."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


class SendVAE(nn.Module):
    """VAE and mapper as one module, so that one DDP wraps all that the first optimiser trains."""

    def __init__(self, vae, mapper, decode=True):
        super().__init__()
        self.vae, self.mapper, self.decode = vae, mapper, decode

    def forward(self, x, noise, t=None, mapper_noise=None):
        """Images (B,3,H,W), posterior noise (B,C,h,w), and the mapper's times (B,) and noise (B,C,h,w) or neither
        -> reconstructions (B,3,H,W), mean, logvar (B,C,h,w), predicted tokens (B,N,D) or None without a mapper."""
        mean, logvar = self.vae.encode(x)
        z = self.vae.sample(mean, logvar, noise)
        tokens = self.mapper(z, t, mapper_noise) if self.mapper is not None else None
        return self.vae.decode(z) if self.decode else None, mean, logvar, tokens


# ----------------------------------------------------------------------------------------------------------------------
# Measurements and pictures

@torch.no_grad()
def latent_statistics(vae, data, size, count, args, device, precision):
    """Mean and std (C,) of posterior samples over the first `count` pictures of a fixed shuffle, unflipped, in float64;
    the posterior's variance enters in closed form. Several processes share the work."""
    order = common.Batches(data, common.world() * 32, seed=0, size=size, flip=False)
    sums = torch.zeros(3, vae.channels, dtype=torch.float64, device=device)
    for batch in common.batches(order, range(-(-count // order.batch_size)), args.workers, device):
        x = common.from_uint8(batch["image"][batch["position"] < count])
        if len(x):
            with common.autocast(device, precision):
                mean, logvar = vae.encode(x)
            mean, var = mean.double(), logvar.double().exp()
            sums += torch.stack([mean.sum((0, 2, 3)), (mean.square() + var).sum((0, 2, 3)),
                                 torch.full_like(sums[0], mean[:, 0].numel())])
    if common.world() > 1:
        torch.distributed.all_reduce(sums)
    mean = sums[0] / sums[2]
    return mean.float(), (sums[1] / sums[2] - mean.square()).clamp(min=1e-12).sqrt().float()


@torch.no_grad()
def validate(net, vfm, data, args, device, precision):
    """PSNR (dB, of 8-bit pictures, mean over pictures) of reconstructions from the posterior mean, and the alignment
    loss (with the training's noise), over the first --val-images held-out pictures of a fixed shuffle."""
    count = min(args.val_images, len(data))
    order = common.Batches(data, common.world() * 32, seed=0, size=net.vae.resolution, flip=False)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in common.batches(order, range(-(-count // order.batch_size)), args.workers, device):
        keep = batch["position"] < count
        x, position = common.from_uint8(batch["image"][keep]), batch["position"][keep]
        if not len(x):
            continue
        with common.autocast(device, precision):
            mean, logvar = net.vae.encode(x)
            y = common.to_uint8(net.vae.decode(mean)).float()
            if vfm is not None:
                z = net.vae.sample(mean, logvar, normal(1, "posterior", position, mean.shape[1:]))
                t = uniform(1, "mapper time", position) if args.noise else None
                tokens = net.mapper(z, t, normal(1, "mapper noise", position, z.shape[1:]) if args.noise else None)
                sums[1] += align_loss(tokens, vfm(x)) * len(x)         # of either kind of alignment
        error = (y - common.to_uint8(x).float()).square().mean((1, 2, 3)).clamp(min=1e-10)
        sums += torch.stack([(10 * torch.log10(255 ** 2 / error)).sum(), sums[1] * 0, error.new_tensor(len(x))])
    if common.world() > 1:
        torch.distributed.all_reduce(sums)
    values = dict(val_psnr=(sums[0] / sums[2]).item())
    return values if vfm is None else dict(values, val_align=(sums[1] / sums[2]).item())


def principal_components(z):
    """Latents (B,C,h,w) -> uint8 (B,3,h,w): their first three principal components over the batch, as RGB."""
    B, C, h, w = z.shape
    flat = z.float().nan_to_num().permute(0, 2, 3, 1).reshape(-1, C)
    flat = flat - flat.mean(0)
    axes = torch.linalg.svd(flat.cpu().double(), full_matrices=False)[2][:3].to(flat)        # (3,C)
    axes = axes * axes.sum(1, keepdim=True).sign()           # an axis has no sign of its own: fix it, or colours flicker
    values = F.pad(flat @ axes.T, (0, 3 - len(axes)))
    values = values / (2 * values.std(0).clamp(min=1e-6))
    return common.to_uint8(values).view(B, h, w, 3).permute(0, 3, 1, 2)


@torch.no_grad()
def draw_pictures(vae, data, step, args, device, precision):
    """samples/<step>.png: pictures, their reconstructions, and the principal components of their latents."""
    batch = common.Batches(data, common.world() * 8, seed=0, size=vae.resolution, flip=False)[0]
    if isinstance(batch, UserError):
        raise batch
    x = common.from_uint8(batch["image"].to(device))
    with common.autocast(device, precision):
        z = vae.encode(x)[0]
        y = vae.decode(z)
    colours = F.interpolate(principal_components(z).float(), x.shape[2:], mode="nearest").to(torch.uint8)
    common.save_grid(os.path.join(args.out, "samples", f"{step:07d}.png"), [common.to_uint8(x), common.to_uint8(y), colours])


def other_pictures(data, partner, size, index, flip):
    """For --shuffle-targets: uint8 (b,3,size,size) of the pictures that stand in for `index`, permuted by `partner` (N,)."""
    return dict(other=data.stack(partner[index], size))


# ----------------------------------------------------------------------------------------------------------------------

def main():
    args = parse_arguments()
    if args.freeze:
        args.lpips = args.kl = args.gan = 0
    args.noise = args.noise and args.align == "mapper"
    device = common.setup(args.device, args.timeout)
    precision = common.resolve_precision(args.precision, device)
    micro_batch = common.share_batch(args.batch_size, args.accum)

    # Data
    data = common.ImageSet(args.data, args.check_data, args.skip_bad)
    val_data = common.ImageSet(args.val) if args.val else None
    total = args.steps or math.ceil(args.epochs * len(data) / args.batch_size)
    steps_per_epoch = len(data) / args.batch_size
    say(f"data      {len(data)} pictures in {len(data.classes)} classes, {args.data}")
    if data.smallest < args.resolution:
        say(f"note: some pictures are smaller than {args.resolution} pixels (the smallest {data.smallest}) and are enlarged")

    # Models. The global generator is for initial weights only, so it is seeded before each network: all other draws are
    # common.normal's
    torch.manual_seed(args.seed)
    if args.init:
        vae = load_vae(args.init).train()
        vae.set_resolution(args.resolution)
    else:
        vae = VAE(args.spec, args.resolution, args.ch, args.ch_mult, args.num_res_blocks)
    vae.set_grad_checkpoint(args.grad_checkpoint)
    vfm = mapper = lpips = disc = None
    if args.align != "none":
        patch = args.mapper_patch or max(1, 16 // vae.factor)
        vfm = VFM(args.vfm, args.vfm_weights, args.resolution, vae.latent_size // patch, args.vfm_stride)
        width = args.mapper_width or vfm.dim
        torch.manual_seed(args.seed + 1)
        mapper = (Projection(vae.channels, vfm.dim, patch, patch) if args.align == "vavae" else
                  Mapper(vae.channels, vae.latent_size, patch, vfm.dim, args.mapper_heads or max(1, width // 64),
                         args.mapper_depth, width, args.mapper_hidden))
        vfm = vfm.to(device)
    if args.lpips:
        lpips = LPIPS(args.lpips_weights).to(device, memory_format=common.layout(device, precision))
    if args.gan:
        torch.manual_seed(args.seed + 2)
        disc = load_discriminator(args.init_disc).train() if args.init_disc else PatchDiscriminator()
        disc = common.sync_batch_norms(disc).to(device, memory_format=common.layout(device, precision))
    if args.freeze and mapper is None:
        raise UserError("--freeze trains the mapper only, but --align none builds none")
    net = common.sync_batch_norms(SendVAE(vae, mapper, not args.freeze)).to(device, memory_format=common.layout(device, precision))
    net.vae.requires_grad_(not args.freeze)
    ema = copy.deepcopy(net).eval().requires_grad_(False) if args.ema else net
    count = {k: sum(p.numel() for p in m.parameters()) / 1e6 for k, m in
             dict(VAE=vae, mapper=mapper, VFM=vfm, discriminator=disc).items() if m is not None}
    say("model     " + ", ".join(f"{k} {v:.2f}M" for k, v in count.items()) + f"; latents {vae.channels}x"
        f"{vae.latent_size}x{vae.latent_size}; {precision} on {device}")

    # Optimisers
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    guard, disc_guard, disc_optimizer = common.Guard(net, optimizer, args.clip), None, None
    if disc is not None:
        disc_optimizer = torch.optim.AdamW(disc.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
        disc_guard = common.Guard(disc, disc_optimizer, args.clip)

    # Resume
    names = ["align", "recon", "lpips", "kl", "gan", "disc", "grad_norm"]
    running = torch.zeros(len(names) + 2, device=device)    # since the last log line: sums of these, bad steps, good steps
    start = 0
    common.lock(args.out)
    state = None if args.overwrite else common.load_checkpoint(args.out, device)
    if state is None and args.resume:
        raise UserError(f"--resume: {args.out} holds no checkpoint")
    if state is not None:
        saved = state["arguments"]
        if not isinstance(saved["align"], str):             # older runs: --align was the weight
            saved.update(align="mapper" if saved["align"] else "none", align_weight=saved["align"] or args.align_weight)
        common.compare_flags(saved, args, FREE, args.out)
        start = state["step"]
        if start >= total:
            return say(f"done      {args.out} has its {start} steps already")
        net.load_state_dict(state["net"])
        if args.ema:
            ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        if disc is not None:
            disc.load_state_dict(state["disc"])
            disc_optimizer.load_state_dict(state["disc_optimizer"])
            disc_guard.load(state.get("disc_bad", disc_guard.bad))
        running[:len(state["running"]) - 1] = state["running"][:-1]        # older runs counted no bad steps
        running[-1] = state["running"][-1]
        guard.load(state.get("bad", guard.bad))
        say(f"resuming  {args.out} at step {start}")
        del state
    elif common.rank() == 0:
        for path in common.list_checkpoints(args.out):
            os.remove(path)

    # Parallel and compiled forms; `net` and `disc` stay the plain modules that are saved
    forward, critic = net, disc
    if args.compile if args.compile is not None else device.type == "cuda":
        forward, critic, vfm, lpips = (m and torch.compile(m) for m in (net, disc, vfm, lpips))
    judge = critic
    if common.world() > 1:
        forward, judge = (m and DistributedDataParallel(m, broadcast_buffers=False, gradient_as_bucket_view=True)
                          for m in (forward, critic))
    log = common.RunLog(args.out, args, start, total, steps_per_epoch)
    partner = np.random.default_rng(args.seed).permutation(len(data))
    others = functools.partial(other_pictures, data, partner, args.resolution) if args.shuffle_targets else None
    dataset = common.Batches(data, args.batch_size, args.seed, args.resolution, extra=others)
    stream = iter(common.batches(dataset, range(start, total), args.workers, device))
    say(f"training  steps {start} to {total}, {total / steps_per_epoch:.1f} epochs of {steps_per_epoch:.1f} steps; batch "
        f"{args.batch_size} = {common.world()} processes x {args.accum} passes x {micro_batch}")

    measure = None
    if args.fid_every:
        if val_data is None:
            raise UserError("--fid-every measures reconstructions of held-out pictures: name their folder with --val")
        from fid import Pictures, training_measure          # only here: most runs do without Inception
        measure = training_measure(args.fid_ref or args.val, device, args.inception_weights, args.resolution, args.workers)
        held_out = Pictures(args.val, min(args.fid_num, len(val_data)), args.resolution)

    probed = None
    if args.probe_every:
        if not args.probe_data:
            raise UserError("--probe-every needs --probe-data, a benchmark's folder")
        from probe import training_probe
        probed = training_probe(args.probe_data, args.resolution, precision) if common.rank() == 0 else None

    def reconstructed():
        """This process's share of the pictures to measure, reconstructed: (indices (b,), uint8 (b,3,H,W))."""
        for index, x in held_out.batches(device, args.workers):
            with torch.no_grad(), common.autocast(device, precision):
                yield index, common.to_uint8(ema.vae.decode(ema.vae.encode(common.from_uint8(x))[0]))

    def take_statistics(step, final):
        """Latent statistics into net and ema; PSNR and alignment loss of held-out pictures."""
        module = ema.eval()
        stats_images = (args.stats_images or len(data)) if final else 4000
        mean, std = latent_statistics(module.vae, data, args.resolution, min(stats_images, len(data)), args, device, precision)
        for owner in (net, ema):
            owner.vae.latent_mean.copy_(mean)
            owner.vae.latent_std.copy_(std)
        if val_data is not None:
            log.note(step, validate(module, vfm, val_data, args, device, precision))
        ema.train(ema is net)
        return stats_images

    watch, saver = common.Watch(args.timeout), common.Saver(args.out, args.keep_every)
    for step in range(start, total + 1):                    # the last turn only measures and saves
        stop = watch.stop()
        due = step == total or step % args.save_every == 0 and step > start
        if due or stop or step % args.log_every == 0:
            limit = args.max_bad_steps if step < total else 0
            found = [guard.look(names[:5], limit, args.out)]
            if disc is not None:
                found.append(disc_guard.look(names[5:6], limit, args.out))
            count, bad = map(max, zip(*found))
            running[-2] += count
            due = due and not bad
        if step > start and (step % args.log_every == 0 or step == total):
            *values, skipped, count = common.gather_mean(running.clone()).tolist()
            losses = {k: v / count for k, v in zip(names, values) if k in active and count}
            log.log(step, dict(losses, bad_steps=round(skipped)) if skipped else losses, args.batch_size)
            running.zero_()
        if (due or step % args.sample_every == 0) and common.rank() == 0:
            draw_pictures(ema.vae, val_data or data, step, args, device, precision)
        stats_images = take_statistics(step, final=step == total) if due else None
        if probed and (step == total or step % args.probe_every == 0 and step > start):
            log.note(step, probed(ema.vae))
        if measure and (step == total or step % args.fid_every == 0 and step > start):
            log.note(step, {f"r{k}": v for k, v in measure(reconstructed(), held_out.count).items() if k == "fid"})
        if due or stop and step > start and not bad:        # last, so that nothing of this step is missing after a resume
            common.gather_mean(running)
            info = dict(arguments=vars(args), step=step, epoch=step / steps_per_epoch, ema=args.ema, stats_images=stats_images)
            weights = {"vae.safetensors": ("vae", "ema", "vae.", vae.config, info)} if due else {}
            saver.save(step, weights, dict(
                step=step, arguments=vars(args), net=net.state_dict(), ema=ema.state_dict(), running=running,
                optimizer=optimizer.state_dict(), bad=guard.bad, disc=disc and disc.state_dict(),
                disc_optimizer=disc_optimizer and disc_optimizer.state_dict(), disc_bad=disc_guard and disc_guard.bad))
        if step == total or stop:
            break

        # ---- one step ------------------------------------------------------------------------------------------------
        watch.begin_step()
        batch = next(stream)
        gan = args.gan if step >= args.gan_start else 0.0
        active = [k for k, on in zip(names, (mapper, not args.freeze, args.lpips, args.kl, gan, gan, True)) if on]
        losses = torch.zeros(len(names) + 2, device=device)
        fakes = []
        for i in range(args.accum):
            part = slice(i * micro_batch, (i + 1) * micro_batch)
            x, position = common.from_uint8(batch["image"][part]), batch["position"][part]
            shape = (vae.channels, vae.latent_size, vae.latent_size)
            t = mapper_noise = None
            if mapper is not None and args.noise:
                t = uniform(args.seed, "mapper time", position)
                mapper_noise = normal(args.seed, "mapper noise", position, shape)
            last = i == args.accum - 1
            with common.autocast(device, precision), common.sync_gradients(forward, last):
                y, mean, logvar, tokens = forward(x, normal(args.seed, "posterior", position, shape), t, mapper_noise)
                terms = [x.new_zeros(()) for _ in names[:5]]
                if mapper is not None:
                    with torch.no_grad():
                        target = vfm(common.from_uint8(batch["other"][part]) if args.shuffle_targets else x)       # (b,N,D)
                    terms[0] = (vavae_loss if args.align == "vavae" else align_loss)(tokens, target)
                if not args.freeze:
                    terms[1] = F.mse_loss(y, x) if args.recon == "mse" else F.l1_loss(y, x)
                    if lpips is not None:
                        terms[2] = lpips(y, x).mean()
                    terms[3] = kl_loss(mean, logvar)
                    if gan:
                        disc.requires_grad_(False)
                        terms[4] = -critic(y).mean()
                        disc.requires_grad_(True)
                        fakes.append(y.detach())
                loss = sum(w * term for w, term in zip((args.align_weight, 1.0, args.lpips, args.kl, gan), terms))
                (loss / args.accum).backward()
            losses[:5] += torch.stack([term.detach() for term in terms]) / args.accum
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(args, step, total)
        losses[6] = guard.step(losses[:5], step)
        if gan:
            for i, y in enumerate(fakes):
                x = common.from_uint8(batch["image"][i * micro_batch:(i + 1) * micro_batch])
                with common.autocast(device, precision), common.sync_gradients(judge, i == args.accum - 1):
                    loss = hinge_loss(judge(x), judge(y))
                    (loss / args.accum).backward()
                losses[5] += loss.detach() / args.accum
            disc_optimizer.param_groups[0]["lr"] = common.learning_rate(args, step, total)
            disc_guard.step(losses[5:6], step)
        if args.ema:
            common.ema_update(ema, net, args.ema)
        losses[-1] = 1
        running += torch.where(torch.isfinite(losses).all(), losses, 0)
        log.bar.update()
        # --------------------------------------------------------------------------------------------------------------
    log.bar.close()
    saver.close()
    if stop and step < total:
        return say(f"stopped   by a signal; {args.out} is saved at step {step}, the same command goes on")
    say(f"done      {args.out}/vae.safetensors; pictures in {args.out}/samples")


if __name__ == "__main__":
    common.run(main)
