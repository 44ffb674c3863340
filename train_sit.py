"""Stage 2: train a flow transformer (SiT) on the latents of a VAE, with the REPA loss.

    x_t = (1-t) x + t eps,  v = eps - x;  t ~ U(0,1);  x = normalised sample of the posterior
    L = |SiT(x_t, t, y) - v|^2 - repa mean_n cos(projector(hidden)[n], f(image)[n])  (paper, eq. 4)

Images are in [-1,1], latents x are normalised by the VAE's statistics, and time t is 0 at data and
1 at noise; v is the velocity, y the label, f a frozen vision model.

    python train_sit.py --size B --steps 100000                # on the newest VAE under runs/
    python train_sit.py --repa 0                               # no vision model
    python train_sit.py --init runs/sit --data my_pictures     # fine-tune a SiT, ours or published
    torchrun --nproc_per_node=8 train_sit.py --vae runs/vae    # the paper's run: XL, 80 epochs

Latents (mean and std of the posterior, fp16, of each picture and its mirror image) are computed
once and kept in the VAE's folder; without REPA the pictures are not read again. Writes to --out
(runs/sit): sit.safetensors (EMA weights), sit_raw.safetensors, checkpoints/, metrics.jsonl,
samples/. Rerun a command to resume it.
"""

import argparse
import copy
import functools
import json
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.draws import normal, uniform
from common.files import UserError, load_strictly, network_hash, reading, write_json
from common.flags import (
    COMPILING,
    add_training_flags,
    parse_flags,
    positive,
    share_batch,
    wants_compile,
)
from common.pictures import (
    ImageSet,
    PictureBlocks,
    TrainingBatches,
    decode_all,
    from_uint8,
    load_batches,
    say_if_enlarged,
)
from common.processes import (
    Watch,
    autocast,
    barrier,
    conv_memory_format,
    parallel,
    progress,
    rank,
    resolve_precision,
    run_main,
    say,
    setup,
    stop_at_signal,
    sync_gradients,
    world,
)
from common.published import LDM_SOURCE, NO_STATISTICS, SIT_FORMATS
from common.runs import (
    RunLog,
    Saver,
    filling,
    mark_done,
    newest_checkpoint,
    newest_result,
    resume,
    training_state,
)
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
from common.weights import load_sit, load_vae
from models import VFM, SiT
from sample import check_channels, draw, set_labels, take_statistics

# The flags of this stage that may change when a run is resumed, beside common.flags.FREE_FLAGS.
FREE = {"vae", "init", "sit_format", "cache", "preview_n", "preview_steps", "preview_cfg"}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("latents")
    group.add_argument(
        "--vae", help="vae.safetensors or run folder (default: the newest under runs/)"
    )
    group.add_argument(
        "--resolution",
        type=positive,
        help="side of the square picture, pixels (default: the VAE's)",
    )
    group.add_argument("--cache", help="folder for the latents (default: the VAE's)")
    group.add_argument("--no-flip", dest="flip", action="store_false", help="no mirror images")

    group = parser.add_argument_group("SiT")
    group.add_argument(
        "--init",
        help="a SiT to start from: file, run folder or hf:<owner>/<repository>/<file>; its "
        "architecture counts instead of --size",
    )
    group.add_argument(
        "--sit-format",
        choices=SIT_FORMATS,
        default="auto",
        help="convention of time and sign of a published --init: the original SiT's, or REPA's",
    )
    group.add_argument("--size", choices=["S", "B", "L", "XL"], default="XL")
    group.add_argument("--patch", type=int, help="default: 16 / the VAE's factor, at least 1")
    group.add_argument("--depth", type=int, help="instead of the size's")
    group.add_argument("--width", type=int, help="instead of the size's")
    group.add_argument("--heads", type=int, help="instead of the size's")
    group.add_argument(
        "--label-dropout",
        type=float,
        default=0.1,
        help="share of labels replaced by the null label",
    )

    group = parser.add_argument_group("REPA")
    group.add_argument("--repa", type=float, default=0.5, help="weight; 0: no vision model")
    group.add_argument(
        "--repa-block", type=int, default=8, help="block whose output is projected, from 1"
    )

    group = parser.add_argument_group("previews")
    group.add_argument(
        "--preview-n", type=positive, default=8, help="pictures in each of a preview's 8 rows"
    )
    group.add_argument(
        "--preview-steps",
        type=positive,
        default=50,
        help="of the ODE sampler of previews and --fid-every",
    )
    group.add_argument(
        "--preview-cfg", type=float, default=2.5, help="guidance scale of the previews"
    )
    add_training_flags(
        parser,
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
    return parse_flags(parser, argv)


def check_arguments(args):
    """Refuse a share of labels that leaves nothing to sample, and guidance that it makes void."""
    if not 0 <= args.label_dropout < 1:
        raise UserError(
            f"--label-dropout {args.label_dropout:g} is no share of the labels: give a number from "
            "0 to less than 1"
        )
    if args.label_dropout == 0 and args.preview_cfg != 1:
        raise UserError(
            f"--preview-cfg {args.preview_cfg:g} guides with the null label, which --label-dropout "
            "0 leaves untrained; add --preview-cfg 1"
        )


# --------------------------------------------------------------------------------------------------
# The science of a step


class Networks(NamedTuple):
    """What a step computes with."""

    net: nn.Module  # SiT, which is trained: x_t (B,C,h,w), t (B,), y (B,) -> velocity (B,C,h,w)
    vae: nn.Module  # frozen; only its latent statistics are used here
    vfm: nn.Module  # frozen vision model f: images (B,3,H,W) -> patch tokens (B,N,D); None: no REPA
    null_label: int  # stands for "no class"; it is the number of classes
    latent_shape: tuple  # (C,h,w)


def sit_losses(networks, batch, step, args):
    """The loss terms of a forward pass, unweighted, {term: scalar}. common.training.weighted_sum
    makes eq. 4 of them: the weight of a term is the flag --<term>-weight or --<term>, else 1.

    batch: latent fp16 (b,2,C,h,w), mean and std of the posterior; label int64 (b,); position int64
    (b,), the pictures' places in the run, of which every random draw is a function; with REPA also
    image uint8 (b,3,H,W).
    """
    position = batch["position"]
    mean, std = batch["latent"].float().unbind(1)  # (b,C,h,w) each
    posterior_noise = normal(args.seed, "posterior", position, networks.latent_shape)
    x = networks.vae.normalize(mean + std * posterior_noise)  # (b,C,h,w)
    t = uniform(args.seed, "time", position)  # (b,)
    eps = normal(args.seed, "noise", position, networks.latent_shape)  # (b,C,h,w)
    x_t, v = interpolate(x, eps, t)  # eq. 1
    u = uniform(args.seed, "label dropout", position)  # (b,)
    y = drop_labels(batch["label"], u, args.label_dropout, networks.null_label)

    losses = {}
    if args.repa:
        predicted, tokens = networks.net(x_t, t, y, tokens=True)
        with torch.no_grad():
            target = networks.vfm(from_uint8(batch["image"]))  # (b,N,D)
        losses["flow"] = F.mse_loss(predicted, v)
        losses["repa"] = repa_loss(tokens, target)
    else:
        losses["flow"] = F.mse_loss(networks.net(x_t, t, y), v)
    return losses


def interpolate(x, eps, t):
    """Data x and noise eps (B,C,h,w), times t (B,) -> x_t and its velocity, both (B,C,h,w). Paper,
    eq. 1, with alpha = 1 - t."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x + t * eps, eps - x


def repa_loss(predicted, target):
    """-cosine, mean over pictures and tokens; both (B,N,D). As REPA."""
    return -F.cosine_similarity(predicted.float(), target.float(), dim=-1).mean()


def drop_labels(y, u, share, null_label):
    """Labels y (B,), each replaced by the null label where its uniform draw u (B,) is below
    `share`: the network learns both velocities that classifier-free guidance needs.
    """
    return torch.where(u < share, null_label, y)


def backward_pass(networks, part, step, args, precision, last):
    """A forward and a backward pass on a part of this process's share of a batch; in the last pass
    of a step, gradients are averaged over the processes. Returns the loss terms, {term: scalar}.
    """
    device = part["position"].device
    with autocast(device, precision), sync_gradients((networks.net,), last):
        losses = sit_losses(networks, part, step, args)
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
# Latent cache

# Pictures that are encoded, written and marked as done together.
BLOCK = 256


@torch.no_grad()
def cache_latents(vae, data, args, device, precision):
    """Computes the posterior of every picture and of its mirror image, once; all processes share
    the work, and a rerun after a kill continues with the blocks that are missing. Returns the
    folder with latents.npy: fp16 (N,S,2,C,h,w), S = 2 sides (1 with --no-flip), then mean and std.

    The folder's name holds the VAE's hash, the pictures' fingerprint, their resolution and the
    precision, so another VAE, list of pictures, resolution or precision has another cache.
    """
    sides = 2 if args.flip else 1
    folder = cache_folder(vae, data, args, precision)
    shape = (len(data), sides, 2, vae.channels, vae.latent_size, vae.latent_size)
    stop_at_signal()
    with filling(folder, "latents.npy", np.float16, shape, BLOCK) as unfinished:
        if unfinished:
            encode_pictures(*unfinished, vae, data, folder, args, device, precision)
    return folder


def encode_pictures(latents, done, todo, vae, data, folder, args, device, precision):
    """Fills the blocks `todo` of cache_latents' array; all processes share the work."""
    if len(todo):
        say(f"caching   latents of {len(data)} pictures in {folder}, {latents.nbytes / 1e9:.2f} GB")
    todo = todo[rank() :: world()]
    blocks = PictureBlocks(data.stack, vae.resolution, len(data), BLOCK)
    loader = load_batches(blocks, todo.tolist(), args.workers, device)
    bar = progress(loader, "latents", len(todo), unit="block")
    for block, batch in zip(todo, bar, strict=True):
        x = from_uint8(batch["image"])  # (b,3,H,W), b up to BLOCK
        begin = block * BLOCK
        for side in range(latents.shape[1]):
            seen = x.flip(3) if side == 1 else x
            latents[begin : begin + len(x), side] = encode_block(vae, seen, device, precision)
        mark_done(latents, done, block)


def cache_folder(vae, data, args, precision):
    """The folder for the latents of these pictures by this VAE."""
    hashes = f"{vae.info['hash'][:8]}-{data.fingerprint[:8]}"
    name = f"latents-{hashes}-{vae.resolution}-{precision}"
    if not args.flip:
        name += "-noflip"
    return os.path.join(args.cache or os.path.dirname(vae.info["path"]), name)


# So many latents give the mean and std of all.
STATISTICS_COUNT = 10000


def measure_statistics(vae, folder):
    """Sets the statistics of a VAE whose file has none: mean and std of samples of the posterior,
    over the cached latents of up to 10,000 pictures. They are measured once, on the first process,
    and kept in the cache, folder/statistics.json."""
    path = os.path.join(folder, "statistics.json")
    if rank() == 0 and not os.path.exists(path):
        mean, std, count = cached_statistics(folder, STATISTICS_COUNT)
        write_json(path, dict(mean=mean.tolist(), std=std.tolist(), pictures=count))
    barrier()
    with reading(path, "statistics of latents; remove it"), open(path) as file:
        statistics = json.load(file)
        vae.set_statistics(statistics["mean"], statistics["std"])
    say(
        f"note: {vae.info['path']} has no statistics of its latents: measured over "
        f"{statistics['pictures']} pictures, std {vae.latent_std.min():.3g} to "
        f"{vae.latent_std.max():.3g}; kept in {path} and in the SiT's file"
    )


def cached_statistics(folder, largest_count):
    """Mean and std, each float64 (C,), of samples of the posterior over the cached latents of up to
    `largest_count` pictures, evenly spaced; and the number of these."""
    latents = np.load(os.path.join(folder, "latents.npy"), mmap_mode="r")
    count = min(len(latents), largest_count)
    total = 0
    total_of_squares = 0
    for i in np.linspace(0, len(latents) - 1, count).astype(int):
        mean, std = latents[i, 0].astype(np.float64)  # (C,h,w) each, of the picture itself
        total = total + mean.mean((1, 2))
        total_of_squares = total_of_squares + (mean**2 + std**2).mean((1, 2))
    mean = total / count
    std = np.sqrt(np.maximum(total_of_squares / count - mean**2, 1e-12))
    return mean, std, count


def say_if_far_from_one(vae, folder):
    """Says whether LDM's scale factor, which is assumed of a VAE without statistics, leaves latents
    with a std below 0.5 or above 2 in some channel."""
    if rank() != 0:
        return
    _, std, count = cached_statistics(folder, 1000)
    std = std / vae.latent_std.double().cpu().numpy()
    if std.min() < 0.5 or std.max() > 2:
        say(
            f"note: {vae.info['path']} has no statistics of its latents, and {LDM_SOURCE} leaves "
            f"them with a std of {std.min():.3g} to {std.max():.3g} over {count} pictures, where "
            "a SiT wants 1; a file beside it says otherwise, see docs/weights.md"
        )


def encode_block(vae, x, device, precision):
    """Images (b,3,H,W) -> NumPy fp16 (b,2,C,h,w), mean and std of the posterior. Raises a UserError
    where they leave fp16's range."""
    encoded = []
    for part in x.split(64):
        with autocast(device, precision):
            mean, logvar = vae.encode(part)
        pair = torch.stack([mean, (0.5 * logvar).exp()], 1).to(torch.float16).cpu().numpy()
        if not np.isfinite(pair).all():
            raise UserError(
                f"latents of {vae.info['path']} leave fp16's range (largest mean "
                f"{mean.abs().max():.3g})"
            )
        encoded.append(pair)
    return np.concatenate(encoded)


class LatentCache:
    """Reads a folder that cache_latents filled."""

    def __init__(self, folder):
        self.folder = folder

    @functools.cached_property
    def latents(self):
        # Opened at the first batch of each loader process, since a memory map cannot be handed on.
        return np.load(os.path.join(self.folder, "latents.npy"), mmap_mode="r")

    def read(self, index, flip):
        """Indices int64 (b,) and flips bool (b,), both NumPy -> {"latent": fp16 tensor
        (b,2,C,h,w)}, mean and std.
        """
        return dict(latent=torch.from_numpy(self.latents[index, flip.astype(np.int64)]))


# --------------------------------------------------------------------------------------------------
# Measurements and pictures


def show_pictures(log, step, sit, vae, args, precision):
    """Writes samples/<step>.png: 8 rows of --preview-n samples, each row of one class, with the
    same noise and labels every time.
    """
    if rank() != 0:
        return
    ids = torch.arange(8 * args.preview_n, device=vae.latent_mean.device)
    row = ids // args.preview_n
    classes = sit.num_classes
    # The rows are spread over all classes; with fewer than 8 they repeat.
    labels = row * max(classes, 8) // 8 % classes
    pictures = draw(
        sit, vae, ids, labels, args.seed, precision, "ode", args.preview_steps, args.preview_cfg
    )
    log.pictures(step, pictures.split(args.preview_n))


def build_measurements(args, vae, device, precision):
    """The measurement of --fid-every: [(every so many steps, function)], the function from a SiT to
    {name: float}, which is empty on all processes but the first."""
    if args.fid_every:
        return [(args.fid_every, sample_fid(args, vae, device, precision))]
    return []


def sample_fid(args, vae, device, precision):
    """FID, sFID and Inception Score of --fid-num unguided samples, as many of each class."""
    # Imported here because most runs do without Inception.
    from fid import training_measure

    measure = training_measure(
        args.fid_ref or args.data, device, args.inception_weights, vae.resolution, args.workers
    )

    def samples(sit, size=64):
        """This process's share: ids (b,) and samples uint8 (b,3,H,W)."""
        for begin in range(rank() * size, args.fid_num, world() * size):
            ids = torch.arange(begin, min(begin + size, args.fid_num), device=device)
            labels = set_labels("equal", ids, sit.num_classes, args.seed)
            steps = args.preview_steps
            yield ids, draw(sit, vae, ids, labels, args.seed, precision, "ode", steps, cfg=1.0)

    return lambda sit: measure(samples(sit), args.fid_num)


def published_weights(parts, config, vae, step, data, args, log):
    """What Saver.save publishes, {file name: (kind, state, config, info)}: EMA and raw weights."""
    info = dict(
        arguments=vars(args),
        step=step,
        epoch=step / log.steps_per_epoch,
        classes=data.classes,
        null_label_trained=args.label_dropout > 0,
        vae_hash=args.vae_hash,
        vae_path=args.vae,
        # Those of the VAE's file, measured ones, or those of --init.
        latent_mean=vae.latent_mean.tolist(),
        latent_std=vae.latent_std.tolist(),
        latent_decode_std=None if vae.decode_std is None else vae.decode_std.tolist(),
    )
    return {
        "sit.safetensors": ("sit", parts["ema"].state_dict(), config, info),
        "sit_raw.safetensors": ("sit", parts["net"].state_dict(), config, info),
    }


# --------------------------------------------------------------------------------------------------
# Networks


def build_networks(args, vae, num_classes, device):
    """The SiT for these latents, and the vision model where REPA needs it. The global random
    generator is for initial weights only; all other draws are common.draws'."""
    # Another network to start from is another setting, which `resume` refuses.
    args.init_hash = None
    start = None
    if args.init:
        start = load_start(args, vae)
    config = sit_config(args, vae, num_classes, start)
    vfm = None
    if args.repa:
        grid = vae.latent_size // config["patch"]
        vfm = VFM(
            args.vfm, args.vfm_weights, vae.resolution, grid, args.vfm_stride, args.vfm_norm
        ).to(device)
        # Checkpoints record what came of the flags.
        args.vfm_norm = vfm.norm
        args.vfm_weights_hash = network_hash(vfm)
        config["vfm_dim"] = vfm.dim
    torch.manual_seed(args.seed)
    net = SiT(**config)
    if start is not None:
        start_from(net, start, args.init)
    net = net.to(device)
    net.grad_checkpoint = args.grad_checkpoint
    latent_shape = (vae.channels, vae.latent_size, vae.latent_size)
    return Networks(net, vae, vfm, net.num_classes, latent_shape)


def sit_config(args, vae, num_classes, start):
    """The arguments of models.SiT, but for vfm_dim. start: the SiT of --init, whose architecture
    counts, or None."""
    config = dict(
        size=args.size,
        patch=args.patch or max(1, 16 // vae.factor),
        channels=vae.channels,
        latent_size=vae.latent_size,
        num_classes=num_classes,
        repa_block=args.repa_block,
        depth=args.depth,
        width=args.width,
        heads=args.heads,
    )
    if start is None:
        return config
    for name in ("patch", "depth", "width", "heads"):
        asked = getattr(args, name)
        if asked not in (None, start.config[name]):
            raise UserError(
                f"--{name} {asked}: the SiT of --init {args.init} has {start.config[name]}; leave "
                f"out --{name}, or train without --init"
            )
        config[name] = start.config[name]
    return config


def load_start(args, vae):
    """The SiT of --init, EMA weights. The statistics that it normalises latents by become the
    VAE's, if this is the VAE that it was trained on. Raises UserError if it cannot take the VAE's
    latents."""
    start = load_sit(args.init, form=args.sit_format)
    args.init_hash = start.info["hash"]
    check_channels(start, vae, f"--init {args.init}", args.vae)
    if start.info["vae_hash"] is None:
        # A published SiT names no VAE. One of ours is not the one that it was trained on.
        is_same_vae = "format" in vae.info
    else:
        is_same_vae = start.info["vae_hash"] == vae.info["hash"]
    if not is_same_vae:
        say(f"note: --init {args.init} was trained on the latents of another VAE than {args.vae}")
    else:
        take_statistics(vae, start)
    return start


def start_from(net, start, path):
    """Copies the weights of the SiT `start`, loaded from `path`, into net, and prints what begins
    anew: the table of labels for another number of classes, the positions for another size of
    latents, and REPA's projector for other tokens or another block."""
    anew = {}
    if net.num_classes != start.num_classes:
        classes = f"{net.num_classes} classes instead of {start.num_classes}"
        anew["y_embedder."] = f"the table of labels ({classes})"
    if net.grid != start.grid:
        anew["pos_embed"] = (
            f"the positions ({net.grid}x{net.grid} tokens, not {start.grid}x{start.grid})"
        )
    wanted = [net.config[name] for name in ("vfm_dim", "repa_block")]
    if net.projectors and wanted != [start.config[name] for name in ("vfm_dim", "repa_block")]:
        anew["projectors."] = "REPA's projector"
    state = net.state_dict()
    for name, value in start.state_dict().items():
        if name in state and not name.startswith(tuple(anew)):
            state[name] = value
    load_strictly(net, state, path)
    say(f"start     from {path}; new: {', '.join(anew.values()) or 'nothing'}")


def compiled_and_parallel(networks, args, device):
    """The networks as they run: compiled where asked for, which happens in place, and the SiT
    wrapped for several processes. The modules inside are the ones that are saved.
    """
    if wants_compile(args, device):
        say(COMPILING)
        # As wholes: block by block (models.compile_network), the step of a SiT-XL/1 with 32
        # pictures took 1.33 times as long on an H200. The first step took 93 s instead of 21 s.
        networks.net.compile(dynamic=False)
        if networks.vfm is not None:
            networks.vfm.compile(dynamic=False)
    return networks._replace(net=parallel(networks.net))


# --------------------------------------------------------------------------------------------------


def load_data(args, device, precision):
    """The VAE and the pictures."""
    args.vae = args.vae or os.path.dirname(
        newest_result("vae.safetensors", "VAE", "python train_vae.py")
    )
    vae = load_vae(args.vae, device).to(memory_format=conv_memory_format(device, precision))
    vae.set_resolution(args.resolution or vae.resolution)
    args.resolution = vae.resolution
    # Another VAE is another setting, which `resume` refuses.
    args.vae_hash = vae.info["hash"]
    data = ImageSet(args.data, skip_bad=args.skip_bad)
    say(
        f"data      {len(data)} pictures in {len(data.classes)} classes, {args.data}; "
        f"VAE {args.vae}, hash {args.vae_hash}"
    )
    say_if_enlarged(data, vae.resolution)
    return vae, data


def load_latents(vae, data, args, device, precision):
    """The cache of the pictures' latents, which is filled first, after --check-data."""
    decode_all(data, args.check_data)
    folder = cache_latents(vae, data, args, device, precision)
    if vae.info.get("latent_statistics") == NO_STATISTICS:
        measure_statistics(vae, folder)
    elif vae.info.get("latent_statistics") == LDM_SOURCE:
        say_if_far_from_one(vae, folder)
    return LatentCache(folder)


def main():
    args = parse_arguments()
    check_arguments(args)
    device = setup(args.device, args.timeout)
    precision = resolve_precision(args.precision, device)
    # Refuses a batch that the processes and passes cannot share.
    share_batch(args.batch_size, args.accum)

    # Data
    vae, data = load_data(args, device, precision)
    total, steps_per_epoch = count_steps(args, len(data))

    # Networks and optimiser
    plain = build_networks(args, vae, len(data.classes), device)
    net = plain.net
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = build_optimizer([net], args)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    say(f"model     SiT {millions:.2f}M, {net.grid**2} tokens; {precision} on {device}")

    # Resume. A checkpoint holds these parts, which are loaded in this order.
    parts = dict(net=net, ema=ema, optimizer=optimizer)
    start, running = resume(args, FREE, parts, total, device, data, labelled=True)
    if start is None:
        return

    # What the loop needs. `plain` holds the modules that are saved, `networks` those that run.
    # Caching takes hours on ImageNet, so it waits until the checkpoint is known to fit.
    latents = load_latents(vae, data, args, device, precision)
    networks = compiled_and_parallel(plain, args, device)
    measurements = build_measurements(args, vae, device, precision)
    image_size = vae.resolution if args.repa else None
    batches = TrainingBatches(
        data, args.batch_size, args.seed, image_size, args.flip, extra=latents.read
    )
    trial = functools.partial(
        backward_pass, networks, step=total, args=args, precision=precision, last=False
    )
    settle_passes(args, device, lambda: batches[start], trial, net, optimizer)
    log = RunLog(args, running, start, total, steps_per_epoch)
    stream = iter(load_batches(batches, range(start, total), args.workers, device))
    watch = Watch(args.timeout)
    saver = Saver(args.out, args.keep_every)
    guard = Guard(net, optimizer, args.clip)

    # The last turn of the loop trains no more: it only logs, measures and saves.
    for step in range(start, total + 1):
        # Log?
        if log.due(args.log_every, step):
            guard.check(args, newest_checkpoint, final=step == total)
            log.line(step)

        # Picture?
        if log.due(args.sample_every, step):
            show_pictures(log, step, ema, vae, args, precision)

        # Measure?
        log.measure(step, measurements, ema)

        # Save? Not after a bad step, so that the last checkpoint is from before a series of them.
        save_due = log.due(args.save_every, step) or watch.stop
        if save_due:
            guard.check(args, newest_checkpoint, final=step == total)
        if save_due and guard.good:
            weights = published_weights(parts, net.config, vae, step, data, args, log)
            saver.save(step, weights, training_state(parts, step, args, log, data))

        # Done?
        if step == total or watch.stop:
            break

        # Train
        watch.begin_step()
        batch = next(stream)
        set_learning_rates(optimizer, [args.lr], schedule(args, step, total))
        losses = train_step(networks, batch, step, args, precision, guard)
        ema_update(ema, net, ema_decay(args, step))
        watch.end_step()
        log.add(losses, guard.finite)

    saver.close()
    log.close(
        step,
        f"done      {args.out}/sit.safetensors; previews in {args.out}/samples; "
        f"pictures: python sample.py --sit {args.out}",
    )


if __name__ == "__main__":
    run_main(main, FOR_LESS_MEMORY)
