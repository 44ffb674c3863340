"""The paper's own runs, for those who have the machines: `python -m study.run --paper TABLE` prints for every row of a table
the command lines, the paper's numbers, GPU-hours, and what to download. Nobody has run these commands in full.

GPU-hours are computed, not measured: matrix products, convolutions and attention of each network are counted at batch 1 on the
meta device, which has shapes and no numbers, and divided by CARD * SHARE. Evaluation and reading of pictures are not in them.
"""

import functools
import shlex
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

import fid
import models
import train_sit
import train_vae

CARD, SHARE = 989e12, 0.4  # an H100's dense bf16 operations/s; the share assumed to be used
PICTURES = 1281167  # of ImageNet's training set
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"

# published VAE: (spec, file, where it is from). REPA-E's IN-VAE and VA-VAE have 32 channels; LightningDiT's variants are taken
# for the IN-VAEs of 16 and 64
VARIANTS = "hf download hustvl/va-vae-imagenet256-experimental-variants --include 'ldm-*' --local-dir pretrained"
PUBLISHED = dict(
    vavae=(
        "f16d32",
        "pretrained/vavae/vavae-f16d32.pt",
        "hf download REPA-E/vavae --local-dir pretrained/vavae",
    ),
    invae=(
        "f16d32",
        "pretrained/invae/invae-f16d32.pt",
        "hf download REPA-E/invae --local-dir pretrained/invae",
    ),
    sdvae=(
        "f8d4",
        "pretrained/sdvae/sdvae-f8d4.pt",
        "hf download REPA-E/sdvae --local-dir pretrained/sdvae",
    ),
    e2e=(
        "f16d32",
        "pretrained/e2e-vavae/e2e-vavae-400k.pt",
        "hf download REPA-E/e2e-vavae --local-dir pretrained/e2e-vavae",
    ),
    d16=("f16d16", "pretrained/ldm-imagenet256-f16d16-50ep.ckpt", VARIANTS),
    d64=("f16d64", "pretrained/ldm-imagenet256-f16d64-50ep.ckpt", VARIANTS),
)

# VAE: (published one to start from, train_vae's flags). AS_IS changes no weight (rate 0): it measures the latents' statistics.
# --accum keeps a GPU's pass at 32 pictures of 256 pixels; the mapper's batch norm then sees 256 of 8 GPUs at a time
TUNE = "--epochs 80 --batch-size 1024 --accum 4 --lr 3e-4"
AS_IS = "--align none --lpips 0 --gan 0 --lr 0 --ema 0 --steps 1 --batch-size 64"
VAES = {
    **{f"{name}-as-is": (name, AS_IS) for name in PUBLISHED},
    "sdvae-512-as-is": ("sdvae", f"{AS_IS} --resolution 512"),
    "sendvae": ("vavae", TUNE),
    "sendvae-clean": ("vavae", f"{TUNE} --no-noise"),
    "sendvae-clean-depth0": ("vavae", f"{TUNE} --no-noise --mapper-depth 0"),
    "sendvae-clean-depth2": ("vavae", f"{TUNE} --no-noise --mapper-depth 2"),
    **{
        f"sendvae-{vfm}": ("vavae", f"{TUNE} --vfm {vfm}")
        for vfm in models.VFM_NAMES
        if vfm != "dinov2-b"
    },
    **{f"sendvae-on-{name}": (name, TUNE) for name in ("invae", "sdvae", "d16", "d64")},
    "sendvae-on-sdvae-512": ("sdvae", TUNE.replace("--accum 4", "--accum 16 --resolution 512")),
}

# table: [(row, the paper's numbers, VAE, flags of train_sit.py; in `probe` of probe.py)]
B = "--size B"
TABLES = dict(
    system=[
        (
            "Send-VAE, 80 epochs, gFID without / with guidance",
            "2.88 / 1.41",
            "sendvae",
            "--size XL --epochs 80",
        ),
        ("Send-VAE, 800 epochs", "1.75 / 1.21", "sendvae", "--size XL --epochs 800"),
        ("E2E-VAE, 80 epochs", "3.46 / 1.67", "e2e-as-is", "--size XL --epochs 80"),
        ("E2E-VAE, 800 epochs", "1.83 / 1.26", "e2e-as-is", "--size XL --epochs 800"),
        ("SD-VAE, 800 epochs", "5.90 / 1.42", "sdvae-as-is", "--size XL --epochs 800"),
    ],
    depth=[
        ("depth 0", "9.20", "sendvae-clean-depth0", B),
        ("depth 1", "8.42", "sendvae-clean", B),
        ("depth 2", "9.47", "sendvae-clean-depth2", B),
    ],
    noise=[("off", "8.42", "sendvae-clean", B), ("on", "7.57", "sendvae", B)],
    vfm=[
        ("none", "11.40", "vavae-as-is", B),
        ("MAE", "10.01", "sendvae-mae-l", B),
        ("CLIP", "9.85", "sendvae-clip-l", B),
        ("I-JEPA", "9.70", "sendvae-ijepa-h", B),
        ("SigLIP", "9.10", "sendvae-siglip-b", B),
        ("DINOv2", "7.57", "sendvae", B),
        ("DINOv3", "7.16", "sendvae-dinov3-b", B),
    ],
    channels=[
        ("f16d16", "13.85", "d16-as-is", B),
        ("f16d16 aligned", "7.02", "sendvae-on-d16", B),
        ("f16d32", "17.43", "invae-as-is", B),
        ("f16d32 aligned", "8.25", "sendvae-on-invae", B),
        ("f16d64", "26.27", "d64-as-is", B),
        ("f16d64 aligned", "10.99", "sendvae-on-d64", B),
    ],
    init=[
        ("SD-VAE, 256", "21.41", "sdvae-as-is", B),
        ("SD-VAE, 256, aligned", "11.86", "sendvae-on-sdvae", B),
        ("SD-VAE, 512", "23.59", "sdvae-512-as-is", B),
        ("SD-VAE, 512, aligned", "13.32", "sendvae-on-sdvae-512", B),
        ("IN-VAE", "17.43", "invae-as-is", B),
        ("IN-VAE aligned", "8.25", "sendvae-on-invae", B),
        ("VA-VAE", "11.40", "vavae-as-is", B),
        ("VA-VAE aligned", "7.57", "sendvae", B),
    ],
    probe=[
        ("IN-VAE, F1 of CelebA / DeepFashion / AwA", ".6222 / .0786 / .5567", "invae-as-is", ""),
        ("VA-VAE", ".6347 / .1094 / .5948", "vavae-as-is", ""),
        ("E2E-VAE", ".6439 / .1177 / .6441", "e2e-as-is", ""),
        ("Send-VAE", ".6647 / .1385 / .6623", "sendvae", ""),
        (
            "all against gFID; runs/paper/gfid.csv: a line <VAE>,<gFID> for each (17.43, 11.40, 8.96, 7.57 in the paper)",
            "r = -0.957 of DeepFashion's top-5 recall, over six VAEs",
            "invae-as-is vavae-as-is e2e-as-is sendvae",
            "--gfid runs/paper/gfid.csv",
        ),
    ],
    reconstruction=[
        ("IN-VAE, rFID / PSNR / LPIPS / SSIM", ".26 / 28.59 / .089 / .80", "invae-as-is", ""),
        ("VA-VAE", ".28 / 27.96 / .096 / .79", "vavae-as-is", ""),
        ("E2E-VAE", ".28 / 27.63 / .110 / .77", "e2e-as-is", ""),
        ("Send-VAE", ".31 / 27.62 / .101 / .77", "sendvae", ""),
    ],
)


def commands(table, vaes, flags):
    """Of one row, on 8 GPUs. Rows share runs of the same name: a finished run says that it is done."""
    names = vaes.split()
    eight = "torchrun --nproc_per_node=8"
    found = [
        f"{eight} train_vae.py --init {PUBLISHED[VAES[v][0]][1]} {VAES[v][1]} --out runs/paper/{v}"
        for v in names
    ]
    if table == "probe":
        data = "--data data/celeba data/deepfashion data/awa2"
        return [
            *found,
            " ".join(
                ["python probe.py --vae", *(f"runs/paper/{v}" for v in names), data, *flags.split()]
            ),
        ]
    if table == "reconstruction":
        return [*found, f"python fid.py --vae runs/paper/{vaes} --data data/imagenet/val"]
    sit = f"runs/paper/sit-{'-'.join(flags.split()[1::2])}-{vaes}"
    found.append(f"{eight} train_sit.py --vae runs/paper/{vaes} {flags} --out {sit}")
    reference = "VIRTUAL_imagenet512.npz" if "512" in vaes else "VIRTUAL_imagenet256_labeled.npz"
    for suffix, guidance in (("", "--cfg 1"), ("-guided", "--cfg 2.5"))[: 1 + (table == "system")]:
        found += [
            f"{eight} sample.py --sit {sit} --num-images 50000 {guidance} --out {sit}{suffix}.npz",
            f"python fid.py {sit}{suffix}.npz --ref {reference}",
        ]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Networks on the meta device, as the stages build them, and their operations


def make_vfm(name, resolution, grid):
    """The vision model with no weights at all: models.VFM itself would fetch its own."""
    import timm

    create = timm.create_model
    with mock.patch.object(
        timm, "create_model", lambda name, pretrained=False, **words: create(name, **words)
    ):
        return models.VFM(name, image_size=resolution, grid=grid)


def make_vae(name):
    """-> train_vae's arguments for this VAE, the VAE, and vision model and mapper or None."""
    origin, flags = VAES[name]
    args = train_vae.parse_arguments(shlex.split(flags))
    vae = models.VAE(PUBLISHED[origin][0], args.resolution)
    if args.align == "none":
        return args, vae, None, None
    patch = args.mapper_patch or max(1, 16 // vae.factor)
    vfm = make_vfm(args.vfm, args.resolution, vae.latent_size // patch)
    mapper = models.Mapper(
        vae.channels, vae.latent_size, patch, vfm.dim, max(1, vfm.dim // 64), args.mapper_depth
    )
    return args, vae, vfm, mapper


def make_sit(vae, flags):
    """-> train_sit's arguments, the SiT and the vision model of REPA."""
    args = train_sit.parse_arguments(shlex.split(flags))
    patch = args.patch or max(1, 16 // vae.factor)
    vfm = make_vfm(args.vfm, vae.resolution, vae.latent_size // patch)
    return (
        args,
        models.SiT(args.size, patch, vae.channels, vae.latent_size, 1000, vfm.dim, args.repa_block),
        vfm,
    )


def operations(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def vae_step(vae, vfm, mapper):
    """One picture through train_vae's step with all losses."""
    x = torch.zeros(1, 3, vae.resolution, vae.resolution)
    noise = torch.zeros(1, vae.channels, vae.latent_size, vae.latent_size)
    y, _, _, tokens = train_vae.SendVAE(vae, mapper)(x, noise, torch.zeros(1), noise)
    vgg, disc = vgg16().features.requires_grad_(False), models.PatchDiscriminator()
    vfm(x), vgg(x)
    critic = disc.requires_grad_(False)(y)
    (tokens.mean() + y.mean() + vgg(y).mean() + critic.mean()).backward()
    disc.requires_grad_(True)
    (disc(x) - disc(y.detach())).mean().backward()


def sit_step(vae, sit, vfm):
    x = torch.zeros(1, vae.channels, vae.latent_size, vae.latent_size)
    vfm(torch.zeros(1, 3, vae.resolution, vae.resolution))
    v, tokens = sit(x, torch.zeros(1), torch.zeros(1, dtype=torch.long), tokens=True)
    (v.mean() + tokens.mean()).backward()


@torch.no_grad()
def forward(net, *inputs):
    return operations(lambda: net(*inputs))


@functools.cache
def vae_operations(name):
    """Of one picture: encoding, decoding, and the VAE's whole training with the statistics at its end over all pictures."""
    with torch.device("meta"):
        args, vae, vfm, mapper = make_vae(name)
        encoding = forward(vae.encode, torch.zeros(1, 3, vae.resolution, vae.resolution))
        decoding = forward(
            vae.decode, torch.zeros(1, vae.channels, vae.latent_size, vae.latent_size)
        )
        training = (
            0 if mapper is None else args.epochs * operations(lambda: vae_step(vae, vfm, mapper))
        )
    return encoding, decoding, training + encoding


def hours(table, vaes, flags):
    """{stage: GPU-hours} of one row."""
    count = dict(VAE=PICTURES * sum(vae_operations(v)[2] for v in vaes.split()))
    if table not in ("probe", "reconstruction"):
        encoding, decoding, _ = vae_operations(vaes)
        with torch.device("meta"):
            _, vae, *_ = make_vae(vaes)
            args, sit, vfm = make_sit(vae, flags)
            z = torch.zeros(1, vae.channels, vae.latent_size, vae.latent_size)
            once = forward(sit, z, torch.zeros(1), torch.zeros(1, dtype=torch.long))
            step = operations(lambda: sit_step(vae, sit, vfm))
        guided = table == "system"  # two sets, and guidance doubles evaluations for t < 0.75
        sampling = 250 * once * (1 + 1.75 * guided) + decoding * (1 + guided)
        count.update(
            caching=2 * PICTURES * encoding,
            SiT=args.epochs * PICTURES * step,
            sampling=50000 * sampling,
        )
    return {stage: n / (CARD * SHARE) / 3600 for stage, n in count.items()}


def downloads(table):
    """What a table needs -> lines."""
    names = [v for _, _, vaes, _ in TABLES[table] for v in vaes.split()]
    yield "ImageNet-1k (image-net.org), train/ and val/ as folders of classes under data/imagenet"
    yield from sorted({PUBLISHED[VAES[v][0]][2] for v in names})
    sits = table not in ("probe", "reconstruction")
    vfms = {
        args.vfm
        for args in (train_vae.parse_arguments(shlex.split(VAES[v][1])) for v in names)
        if args.align != "none"
    }
    if vfms or sits:
        vfms = sorted(
            {
                models.VFM_NAMES.get(v, v)
                for v in vfms | ({models.VFM_NAMES["dinov2-b"]} if sits else set())
            }
        )
        yield f"by themselves: timm's weights of {', '.join(vfms)}; LPIPS: torchvision's VGG16 and {models.LPIPS_URL}"
    if table == "probe":
        yield "CelebA, DeepFashion, AwA2: see README.md"
    else:
        yield f"by itself: {fid.WEIGHTS_URL}"
    if sits:
        yield f"{ADM}/256/VIRTUAL_imagenet256_labeled.npz"
    if any("512" in v for v in names):
        yield f"{ADM}/512/VIRTUAL_imagenet512.npz"


def describe(table):
    """The text of --paper."""
    yield from (f"# download: {line}" for line in downloads(table))
    yield (
        f"# GPU-hours are computed at {SHARE:.0%} of {CARD / 1e12:.0f} TFLOP/s, not measured. Rows share runs of the same "
        "name, which are done once."
    )
    for row, expected, vaes, flags in TABLES[table]:
        spent = hours(table, vaes, flags)
        yield f"\n# {table}, {row}. Paper: {expected}"
        yield f"# {sum(spent.values()):.3g} GPU-hours: " + ", ".join(
            f"{stage} {n:.3g}" for stage, n in spent.items()
        )
        yield from commands(table, vaes, flags)
