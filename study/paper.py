"""The paper's own runs, for those who have the machines: `python -m study.run --paper TABLE` prints
for every line of a table the commands, the paper's numbers, GPU-hours, and what to download. Nobody
has run these commands in full.

GPU-hours are computed, not measured. The matrix products, convolutions and attention of each
network are counted at batch 1 on the meta device, which has shapes but no numbers, and divided by
the operations per second of an H100 and the share of them that is assumed to be used. Evaluation
and the reading of pictures are not counted.
"""

import contextlib
import functools
import os
import shlex
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

from common.training import weighted_sum
import fid
import models
import train_sit
import train_vae

# Dense bf16 operations per second of an H100, and the share of them that training is assumed to
# use.
H100_OPERATIONS = 989e12
UTILISATION = 0.4
# Pictures in ImageNet's training set, and classes.
IMAGENET_PICTURES = 1281167
IMAGENET_CLASSES = 1000
ADM_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
VARIANTS = (
    "hf download hustvl/va-vae-imagenet256-experimental-variants --include 'ldm-*' "
    "--local-dir pretrained"
)


class PublishedVAE(NamedTuple):
    spec: str
    path: str
    # The command that downloads it to `path`.
    download: str


# REPA-E's IN-VAE and VA-VAE have 32 channels; for the IN-VAEs of 16 and 64, LightningDiT's variants
# are taken.
PUBLISHED = {
    "vavae": PublishedVAE(
        "f16d32",
        "pretrained/vavae/vavae-f16d32.pt",
        "hf download REPA-E/vavae --local-dir pretrained/vavae",
    ),
    "invae": PublishedVAE(
        "f16d32",
        "pretrained/invae/invae-f16d32.pt",
        "hf download REPA-E/invae --local-dir pretrained/invae",
    ),
    "sdvae": PublishedVAE(
        "f8d4",
        "pretrained/sdvae/sdvae-f8d4.pt",
        "hf download REPA-E/sdvae --local-dir pretrained/sdvae",
    ),
    "e2e": PublishedVAE(
        "f16d32",
        "pretrained/e2e-vavae/e2e-vavae-400k.pt",
        "hf download REPA-E/e2e-vavae --local-dir pretrained/e2e-vavae",
    ),
    "d16": PublishedVAE("f16d16", "pretrained/ldm-imagenet256-f16d16-50ep.ckpt", VARIANTS),
    "d64": PublishedVAE("f16d64", "pretrained/ldm-imagenet256-f16d64-50ep.ckpt", VARIANTS),
}

# What REPA-E's code does, which the paper follows wherever it is silent, and our defaults do not.
# docs/differences.md lists why.
LETTER = "--disc-lr 1e-4 --lpips-rescale --mapper-norm running --no-flip --ema 0"
# --accum keeps a GPU's pass at 32 pictures of 256 pixels; the mapper's batch norm then sees 256
# pictures of 8 GPUs at a time.
TUNE = f"--epochs 80 --batch-size 1024 --accum 4 --lr 3e-4 {LETTER}"
TUNE_512 = f"--epochs 80 --batch-size 1024 --accum 16 --resolution 512 --lr 3e-4 {LETTER}"
# As in REPA's code, whose SiTs see no mirror images and whose EMA has no warm-up.
SIT_LETTER = "--no-flip --no-ema-warmup"
# As in REPA-E's code, which samples in fp32 with TF32 products.
SAMPLER_LETTER = "--precision fp32"
# Changes no weight (its learning rate is 0): it only measures the latents' statistics.
AS_IS = "--align none --lpips 0 --gan 0 --lr 0 --ema 0 --steps 1 --batch-size 64"


class Recipe(NamedTuple):
    """How a VAE is made: a key of PUBLISHED to start from, and flags of train_vae.py."""

    origin: str
    flags: str


VAES = {
    "vavae-as-is": Recipe("vavae", AS_IS),
    "invae-as-is": Recipe("invae", AS_IS),
    "sdvae-as-is": Recipe("sdvae", AS_IS),
    "e2e-as-is": Recipe("e2e", AS_IS),
    "d16-as-is": Recipe("d16", AS_IS),
    "d64-as-is": Recipe("d64", AS_IS),
    "sdvae-512-as-is": Recipe("sdvae", f"{AS_IS} --resolution 512"),
    "sendvae": Recipe("vavae", TUNE),
    "sendvae-clean": Recipe("vavae", f"{TUNE} --no-noise"),
    "sendvae-clean-depth0": Recipe("vavae", f"{TUNE} --no-noise --mapper-depth 0"),
    "sendvae-clean-depth2": Recipe("vavae", f"{TUNE} --no-noise --mapper-depth 2"),
    "sendvae-dinov3-b": Recipe("vavae", f"{TUNE} --vfm dinov3-b"),
    "sendvae-mae-l": Recipe("vavae", f"{TUNE} --vfm mae-l"),
    "sendvae-clip-l": Recipe("vavae", f"{TUNE} --vfm clip-l"),
    "sendvae-siglip-b": Recipe("vavae", f"{TUNE} --vfm siglip-b"),
    "sendvae-ijepa-h": Recipe("vavae", f"{TUNE} --vfm ijepa-h"),
    "sendvae-on-invae": Recipe("invae", TUNE),
    "sendvae-on-sdvae": Recipe("sdvae", TUNE),
    "sendvae-on-d16": Recipe("d16", TUNE),
    "sendvae-on-d64": Recipe("d64", TUNE),
    "sendvae-on-sdvae-512": Recipe("sdvae", TUNE_512),
}


class Entry(NamedTuple):
    """A line of one of the paper's tables."""

    title: str
    paper_numbers: str
    # Keys of VAES, separated by spaces; several only in the last line of `probe`.
    vaes: str
    # Flags of train_sit.py; in the table `probe`, of probe.py.
    flags: str


B = "--size B"
TABLES = {
    "system": [
        Entry(
            "Send-VAE, 80 epochs, gFID without / with guidance",
            "2.88 / 1.41",
            "sendvae",
            "--size XL --epochs 80",
        ),
        Entry("Send-VAE, 800 epochs", "1.75 / 1.21", "sendvae", "--size XL --epochs 800"),
        Entry("E2E-VAE, 80 epochs", "3.46 / 1.67", "e2e-as-is", "--size XL --epochs 80"),
        Entry("E2E-VAE, 800 epochs", "1.83 / 1.26", "e2e-as-is", "--size XL --epochs 800"),
        Entry("SD-VAE, 800 epochs", "5.90 / 1.42", "sdvae-as-is", "--size XL --epochs 800"),
    ],
    "depth": [
        Entry("depth 0", "9.20", "sendvae-clean-depth0", B),
        Entry("depth 1", "8.42", "sendvae-clean", B),
        Entry("depth 2", "9.47", "sendvae-clean-depth2", B),
    ],
    "noise": [
        Entry("off", "8.42", "sendvae-clean", B),
        Entry("on", "7.57", "sendvae", B),
    ],
    "vfm": [
        Entry("none", "11.40", "vavae-as-is", B),
        Entry("MAE", "10.01", "sendvae-mae-l", B),
        Entry("CLIP", "9.85", "sendvae-clip-l", B),
        Entry("I-JEPA", "9.70", "sendvae-ijepa-h", B),
        Entry("SigLIP", "9.10", "sendvae-siglip-b", B),
        Entry("DINOv2", "7.57", "sendvae", B),
        Entry("DINOv3", "7.16", "sendvae-dinov3-b", B),
    ],
    "channels": [
        Entry("f16d16", "13.85", "d16-as-is", B),
        Entry("f16d16 aligned", "7.02", "sendvae-on-d16", B),
        Entry("f16d32", "17.43", "invae-as-is", B),
        Entry("f16d32 aligned", "8.25", "sendvae-on-invae", B),
        Entry("f16d64", "26.27", "d64-as-is", B),
        Entry("f16d64 aligned", "10.99", "sendvae-on-d64", B),
    ],
    "init": [
        Entry("SD-VAE, 256", "21.41", "sdvae-as-is", B),
        Entry("SD-VAE, 256, aligned", "11.86", "sendvae-on-sdvae", B),
        Entry("SD-VAE, 512", "23.59", "sdvae-512-as-is", B),
        Entry("SD-VAE, 512, aligned", "13.32", "sendvae-on-sdvae-512", B),
        Entry("IN-VAE", "17.43", "invae-as-is", B),
        Entry("IN-VAE aligned", "8.25", "sendvae-on-invae", B),
        Entry("VA-VAE", "11.40", "vavae-as-is", B),
        Entry("VA-VAE aligned", "7.57", "sendvae", B),
    ],
    "probe": [
        Entry(
            "IN-VAE, F1 of CelebA / DeepFashion / AwA", ".6222 / .0786 / .5567", "invae-as-is", ""
        ),
        Entry("VA-VAE", ".6347 / .1094 / .5948", "vavae-as-is", ""),
        Entry("E2E-VAE", ".6439 / .1177 / .6441", "e2e-as-is", ""),
        Entry("Send-VAE", ".6647 / .1385 / .6623", "sendvae", ""),
        Entry(
            "all against gFID; runs/paper/gfid.csv: a line <VAE>,<gFID> for each (17.43, 11.40, "
            "8.96, 7.57 in the paper)",
            "r = -0.957 of DeepFashion's top-5 recall, over six VAEs",
            "invae-as-is vavae-as-is e2e-as-is sendvae",
            "--gfid runs/paper/gfid.csv",
        ),
    ],
    "reconstruction": [
        Entry("IN-VAE, rFID / PSNR / LPIPS / SSIM", ".26 / 28.59 / .089 / .80", "invae-as-is", ""),
        Entry("VA-VAE", ".28 / 27.96 / .096 / .79", "vavae-as-is", ""),
        Entry("E2E-VAE", ".28 / 27.63 / .110 / .77", "e2e-as-is", ""),
        Entry("Send-VAE", ".31 / 27.62 / .101 / .77", "sendvae", ""),
    ],
}
# Tables whose lines train no SiT.
WITHOUT_SIT = ("probe", "reconstruction")

# --------------------------------------------------------------------------------------------------
# Commands


def commands(table, entry):
    """The command lines of one Entry of a table, on 8 GPUs.

    Lines share runs of the same name; the command of a finished run ends at once.
    """
    torchrun = "torchrun --nproc_per_node=8"
    lines = []
    for vae in entry.vaes.split():
        origin, flags = VAES[vae]
        start = starting_weights(PUBLISHED[origin].path, flags)
        lines.append(f"{torchrun} train_vae.py {start} {flags} --out runs/paper/{vae}")
    if table == "probe":
        folders = [f"runs/paper/{vae}" for vae in entry.vaes.split()]
        data = "--data data/celeba data/deepfashion data/awa2"
        words = ["python probe.py --vae", *folders, data, *entry.flags.split()]
        return [*lines, " ".join(words)]
    if table == "reconstruction":
        return [*lines, f"python fid.py --vae runs/paper/{entry.vaes} --data data/imagenet/val"]

    setting = "-".join(entry.flags.split()[1::2])
    sit = f"runs/paper/sit-{setting}-{entry.vaes}"
    lines.append(
        f"{torchrun} train_sit.py --vae runs/paper/{entry.vaes} {entry.flags} {SIT_LETTER} "
        f"--out {sit}"
    )
    reference = "VIRTUAL_imagenet256_labeled.npz"
    if "512" in entry.vaes:
        reference = "VIRTUAL_imagenet512.npz"
    sets = {f"{sit}.npz": "--cfg 1"}
    if table == "system":
        sets[f"{sit}-guided.npz"] = "--cfg 2.5"
    for path, guidance in sets.items():
        drawing = f"--num-images 50000 {guidance} {SAMPLER_LETTER}"
        lines.append(f"{torchrun} sample.py --sit {sit} {drawing} --out {path}")
        lines.append(f"python fid.py {path} --ref {reference}")
    return lines


def starting_weights(path, flags):
    """The flags of train_vae.py that name the initial weights, of the VAE in a file `path` and,
    unless `flags` switch it off, of its discriminator."""
    start = f"--init {path}"
    if "--gan 0" in flags:
        return start
    stem, ending = os.path.splitext(path)
    # REPA-E has its discriminators in files of their own. An LDM checkpoint holds the loss.
    discriminator = path if ending == ".ckpt" else f"{stem}-discriminator-ckpt.pt"
    return f"{start} --init-disc {discriminator}"


# --------------------------------------------------------------------------------------------------
# Networks on the meta device, built by the stages themselves

META = torch.device("meta")


class VGGDistance(nn.Module):
    """Stands in for models.LPIPS, whose weights would be downloaded: the same network, and the mean
    difference of its features."""

    def __init__(self, weights=(), rescale=False):
        super().__init__()
        self.features = vgg16().features.requires_grad_(False)

    def forward(self, a, b):
        return (self.features(a) - self.features(b)).mean((1, 2, 3))


@contextlib.contextmanager
def without_weights():
    """Inside, networks are built on the meta device, and none downloads its weights."""
    import timm

    create_model = timm.create_model

    def create_without_weights(name, pretrained=False, **options):
        return create_model(name, **options)

    with (
        META,
        mock.patch.object(timm, "create_model", create_without_weights),
        mock.patch.object(train_vae, "LPIPS", VGGDistance),
        # Networks without numbers have no hash.
        mock.patch.object(train_vae, "network_hash", lambda network: None),
        mock.patch.object(train_sit, "network_hash", lambda network: None),
    ):
        yield


def make_vae(name):
    """train_vae.py's arguments and Networks for a VAE of VAES."""
    origin, flags = VAES[name]
    args = train_vae.parse_arguments(shlex.split(flags))
    train_vae.check_arguments(args)
    # The meta device has no autocast that could be switched off.
    args.autocast_losses = True
    args.spec = PUBLISHED[origin].spec
    with without_weights():
        return args, train_vae.build_networks(args, META, "fp32")


def make_sit(vae, flags):
    """train_sit.py's arguments and Networks for these flags, on the latents of a VAE."""
    args = train_sit.parse_arguments(shlex.split(flags))
    with without_weights():
        return args, train_sit.build_networks(args, vae, IMAGENET_CLASSES, META)


# --------------------------------------------------------------------------------------------------
# Operations


def operations(function, *inputs):
    """Floating-point operations of a call; a multiplication and its addition are two."""
    with META, FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


@torch.no_grad()
def forward_operations(function, *inputs):
    return operations(function, *inputs)


def empty_images(vae, dtype=torch.float32):
    """Images (1,3,H,W)."""
    return torch.zeros(1, 3, vae.resolution, vae.resolution, dtype=dtype, device=META)


def empty_latents(vae):
    """Latents (1,C,h,w)."""
    return torch.zeros(1, vae.channels, vae.latent_size, vae.latent_size, device=META)


def empty_labels():
    """Labels, or positions in the run, int64 (1,)."""
    return torch.zeros(1, dtype=torch.long, device=META)


def vae_step(networks, args):
    """train_vae.py's forward and backward pass for one picture."""
    batch = {
        "image": empty_images(networks.net.vae, torch.uint8),
        "position": empty_labels(),
    }
    losses = train_vae.vae_losses(networks, batch, args.gan_start, args)
    weighted_sum(losses, args).backward()


def sit_step(networks, args):
    """train_sit.py's forward and backward pass for one picture."""
    latents = empty_latents(networks.vae)
    batch = {
        "latent": torch.stack([latents, latents], 1),
        "label": empty_labels(),
        "position": empty_labels(),
        "image": empty_images(networks.vae, torch.uint8),
    }
    losses = train_sit.sit_losses(networks, batch, 0, args)
    weighted_sum(losses, args).backward()


@functools.cache
def vae_operations(name):
    """Operations for one picture, of a VAE of VAES: encoding, decoding, and all of its training
    together with the latents' statistics at its end."""
    args, networks = make_vae(name)
    vae = networks.net.vae
    encoding = forward_operations(vae.encode, empty_images(vae))
    decoding = forward_operations(vae.decode, empty_latents(vae))
    training = encoding
    if args.align != "none":
        training += args.epochs * operations(vae_step, networks, args)
    return encoding, decoding, training


def sit_operations(entry, guided):
    """{stage: operations} of stage 2 of an Entry. guided: a second set is drawn, with guidance."""
    encoding, decoding, _ = vae_operations(entry.vaes)
    _, vae_networks = make_vae(entry.vaes)
    vae = vae_networks.net.vae
    args, networks = make_sit(vae, entry.flags)
    t = torch.zeros(1, device=META)
    evaluation = forward_operations(networks.net, empty_latents(vae), t, empty_labels())
    drawing = 250 * evaluation + decoding
    if guided:
        # Guidance doubles the evaluations at t < 0.75.
        drawing += 250 * 1.75 * evaluation + decoding
    return {
        # The latents of every picture and of its mirror image.
        "caching": 2 * IMAGENET_PICTURES * encoding,
        "SiT": args.epochs * IMAGENET_PICTURES * operations(sit_step, networks, args),
        "sampling": 50000 * drawing,
    }


def hours(table, entry):
    """{stage: GPU-hours} of one Entry of a table."""
    training = sum(vae_operations(vae)[2] for vae in entry.vaes.split())
    counts = {"VAE": IMAGENET_PICTURES * training}
    if table not in WITHOUT_SIT:
        counts.update(sit_operations(entry, guided=table == "system"))
    operations_per_hour = H100_OPERATIONS * UTILISATION * 3600
    spent = {stage: count / operations_per_hour for stage, count in counts.items()}
    if "sampling" in spent:
        # TF32, in which the sets are drawn, has half of bf16's operations per second.
        spent["sampling"] *= 2
    return spent


# --------------------------------------------------------------------------------------------------
# Text


def downloads(table):
    """A list of what a table's commands need."""
    vaes = [vae for entry in TABLES[table] for vae in entry.vaes.split()]
    has_sit = table not in WITHOUT_SIT
    lines = [
        "ImageNet-1k (image-net.org), train/ and val/ as folders of classes under data/imagenet",
        *sorted({PUBLISHED[VAES[vae].origin].download for vae in vaes}),
    ]
    vfms = vision_models(vaes)
    if has_sit:
        vfms.add(models.VFM_NAMES["dinov2-b"])
    if vfms:
        lines.append(
            f"automatic: timm's weights of {', '.join(sorted(vfms))}; LPIPS: torchvision's VGG16 "
            f"and {models.LPIPS_URL}"
        )
    if table == "probe":
        lines.append("CelebA, DeepFashion, AwA2: see docs/probing.md")
    else:
        lines.append(f"automatic: {fid.WEIGHTS_URL}")
    if has_sit:
        lines.append(f"{ADM_URL}/256/VIRTUAL_imagenet256_labeled.npz")
    if any("512" in vae for vae in vaes):
        lines.append(f"{ADM_URL}/512/VIRTUAL_imagenet512.npz")
    return lines


def vision_models(vaes):
    """timm's names of the vision models that VAEs are aligned to."""
    names = set()
    for vae in vaes:
        args = train_vae.parse_arguments(shlex.split(VAES[vae].flags))
        if args.align != "none":
            names.add(models.VFM_NAMES.get(args.vfm, args.vfm))
    return names


def describe(table):
    """The lines that --paper prints."""
    for line in downloads(table):
        yield f"# download: {line}"
    yield (
        f"# GPU-hours are computed at {UTILISATION:.0%} of {H100_OPERATIONS / 1e12:.0f} TFLOP/s, "
        "not measured. Lines share runs of the same name, which are done once."
    )
    for entry in TABLES[table]:
        spent = hours(table, entry)
        stages = ", ".join(f"{stage} {count:.3g}" for stage, count in spent.items())
        yield f"\n# {table}, {entry.title}. Paper: {entry.paper_numbers}"
        yield f"# {sum(spent.values()):.3g} GPU-hours: {stages}"
        yield from commands(table, entry)
