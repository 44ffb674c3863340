"""Speed and memory of every stage on this machine: pictures a second, arithmetic done, share of what the machine's matrix
products reach, peak memory. All networks have random weights, which changes no speed; nothing is downloaded.

    python -m bench.speed --quick                             # small sizes: two minutes on two cores
    python -m bench.speed --only sit-B vae-f16d32 --baseline  # these rows, each beside its baseline
    python -m bench.speed --write                             # appends the table to BENCHMARKS.md

--baseline measures each training, sampling and decoding row a second time, done as published trainers do it (`published`
below), in the same run. Each row runs in a process of its own, so that its peak memory is its own. Peak memory is that of the
process with all its libraries; on CUDA that of its tensors. Floating-point operations are those of matrix products and
convolutions; on a CPU attention counts the same however it is computed. In bf16 weights, optimiser and EMA stay fp32.
"""

import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from common import processes, training
from common.draws import normal, uniform
from common.files import UserError
from common.pictures import ImageSet, from_uint8, to_uint8
from common.processes import autocast, conv_memory_format, resolve_precision, run_main, setup
from common.training import Guard, ema_update
import models
import sample
import train_sit
import train_vae

DINO = "vit_base_patch14_dinov2.lvd142m"
TERMS = ("align", "recon", "lpips", "kl", "gan")
WEIGHTS = dict(align=1.0, recon=1.0, lpips=1.0, kl=1e-6, gan=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# The baseline: the same mathematics in the plainest PyTorch, as published trainers have it


def plain_attention(q, k, v):
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def plain_cosine(predicted, target):
    """Mean cosine of tokens (B,N,D), picture by picture."""
    total = 0.0
    for p, q in zip(predicted, target):
        total = (
            total + (F.normalize(p.float(), dim=-1) * F.normalize(q.float(), dim=-1)).sum(-1).mean()
        )
    return total / len(predicted)


@torch.no_grad()
def plain_ema(ema, model, decay):
    for a, b in zip(ema.parameters(), model.parameters()):
        a.mul_(decay).add_(b, alpha=1 - decay)
    for a, b in zip(ema.buffers(), model.buffers()):
        a.copy_(b)


def plain_update(guard, losses, step):
    total = torch.nn.utils.clip_grad_norm_(guard.optimizer.param_groups[0]["params"], guard.limit)
    guard.optimizer.step()
    guard.optimizer.zero_grad(set_to_none=True)
    return total


@contextlib.contextmanager
def published(on=True):
    """While on, our functions that were made fast are replaced by plain ones."""
    with contextlib.ExitStack() as stack:
        for module, name, plain in (
            (models, "attention", plain_attention),
            (training, "ema_update", plain_ema),
            (Guard, "step", plain_update),
            (processes, "conv_memory_format", lambda *_: torch.contiguous_format),
            (train_vae, "align_loss", lambda p, q: 1 - plain_cosine(p, q)),
            (train_sit, "repa_loss", lambda p, q: -plain_cosine(p, q)),
        ):
            if on:
                stack.enter_context(mock.patch.object(module, name, plain))
        yield


def adamw(m, params):
    """The trainers' optimiser; the baseline's is PyTorch's default form of it."""
    return torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=None if m.baseline else True)


# ----------------------------------------------------------------------------------------------------------------------
# Networks with random weights


def wake(net):
    """Branches that start at zero get small random weights: with zeros a comparison of gradients would see nothing."""
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1 and not p.any():
                p.normal_(std=0.02)
    return net


def compiled(m, net):
    return torch.compile(net) if m.compile and net is not None else net


def random_vfm(m, name=DINO, size=256, grid=16):
    import timm

    create = timm.create_model
    with mock.patch.object(
        timm, "create_model", lambda name, pretrained=False, **words: create(name, **words)
    ):
        return models.VFM(name, image_size=size, grid=grid).to(m.device)


def random_lpips(m):
    from torchvision.models import vgg16

    state = {k: v for k, v in vgg16().state_dict().items() if k.startswith("features")}
    state.update(
        {f"lin{i}": torch.rand(1, width, 1, 1) for i, width in enumerate((64, 128, 256, 512, 512))}
    )
    torch.save(state, "lpips.pth")  # in the row's own folder
    return models.LPIPS(["lpips.pth"]).to(
        m.device, memory_format=conv_memory_format(m.device, m.precision)
    )


def random_pictures(count, size, device="cpu"):
    """Smooth uint8 pictures (B,3,size,size)."""
    x = F.interpolate(torch.rand(count, 3, size // 16, size // 16), (size, size), mode="bicubic")
    return (x.clamp(0, 1) * 255).to(torch.uint8).to(device)


# ----------------------------------------------------------------------------------------------------------------------
# Rows. A row's function makes what it needs and returns (step, pictures a step): step() does the work once


def sit_training(m, size, batch, repa, vfm_dim=768, **shape):
    """train_sit.py's step on latents of 4x32x32 with patch 2; the VFM's tokens are given. step() -> loss, gradient norm."""
    torch.manual_seed(0)
    net = models.SiT(size, 2, 4, 32, vfm_dim=vfm_dim if repa else None, **shape)
    if m.device.type == "cpu" and 20 * sum(p.numel() for p in net.parameters()) > free_memory():
        raise UserError("weights, gradients, AdamW's moments and EMA do not fit the free memory")
    net = wake(net).to(m.device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    forward, guard = compiled(m, net), Guard(net, adamw(m, net.parameters()), 1.0)
    position, label = torch.arange(batch, device=m.device), torch.arange(batch, device=m.device)
    mean, std = torch.randn(batch, 2, 4, 32, 32).to(m.device).unbind(1)
    target = torch.randn(batch, net.grid**2, vfm_dim).to(m.device)

    def step():
        x = mean + std * normal(0, "posterior", position, mean.shape[1:])
        t = uniform(0, "time", position)
        x_t, v = train_sit.interpolate(x, normal(0, "noise", position, mean.shape[1:]), t)
        y = train_sit.drop_labels(
            label, uniform(0, "label dropout", position), 0.1, net.num_classes
        )
        with autocast(m.device, m.precision):
            if repa:
                predicted, tokens = forward(x_t, t, y, tokens=True)
                loss = F.mse_loss(predicted, v) + 0.5 * train_sit.repa_loss(tokens, target)
            else:
                loss = F.mse_loss(forward(x_t, t, y), v)
            loss.backward()
        gradient = guard.step(loss.detach()[None], 0)
        ema_update(ema, net, 0.9999)
        return loss.detach(), gradient

    return step, batch


def vae_training(m, spec, batch, size, terms, vfm=DINO, **shape):
    """train_vae.py's step with these loss terms. step() -> loss, gradient norm."""
    torch.manual_seed(0)
    vae = wake(models.VAE(spec, size, **shape))
    patch = max(1, 16 // vae.factor)
    vision = random_vfm(m, vfm, size, vae.latent_size // patch) if "align" in terms else None
    mapper = (
        models.Mapper(vae.channels, vae.latent_size, patch, vision.dim, max(1, vision.dim // 64))
        if vision
        else None
    )
    lpips = random_lpips(m) if "lpips" in terms else None
    memory_format = conv_memory_format(m.device, m.precision)
    disc = (
        models.PatchDiscriminator().to(m.device, memory_format=memory_format)
        if "gan" in terms
        else None
    )
    net = train_vae.SendVAE(vae, mapper, bool({"recon", "lpips", "gan"} & set(terms)))
    net.to(m.device, memory_format=memory_format)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    forward, critic, vision, lpips = (compiled(m, part) for part in (net, disc, vision, lpips))
    guard = Guard(net, adamw(m, net.parameters()), 1.0)
    critic_guard = None if disc is None else Guard(disc, adamw(m, disc.parameters()), 1.0)
    position = torch.arange(batch, device=m.device)
    image = random_pictures(batch, size, m.device)
    shape = (vae.channels, vae.latent_size, vae.latent_size)

    def step():
        x, t = from_uint8(image), uniform(0, "mapper time", position)
        with autocast(m.device, m.precision):
            y, mean, logvar, tokens = forward(
                x,
                normal(0, "posterior", position, shape),
                t,
                normal(0, "mapper noise", position, shape),
            )
            parts = {}
            if vision is not None:
                with torch.no_grad():
                    target = vision(x)
                parts["align"] = train_vae.align_loss(tokens, target)
            if "recon" in terms:
                parts["recon"] = F.mse_loss(y, x)
            if lpips is not None:
                parts["lpips"] = lpips(y, x).mean()
            if "kl" in terms:
                parts["kl"] = train_vae.kl_loss(mean, logvar)
            if disc is not None:
                disc.requires_grad_(False)
                parts["gan"] = -critic(y).mean()
                disc.requires_grad_(True)
            loss = sum(WEIGHTS[k] * part for k, part in parts.items())
            loss.backward()
        gradient = guard.step(loss.detach()[None], 0)
        if disc is not None:
            with autocast(m.device, m.precision):
                critic_loss = train_vae.hinge_loss(critic(x), critic(y.detach()))
                critic_loss.backward()
            critic_guard.step(critic_loss.detach()[None], 0)
        ema_update(ema, net, 0.999)
        return loss.detach(), gradient

    return step, batch


def inference(m, function):
    @torch.no_grad()
    def step():
        with autocast(m.device, m.precision):
            return function()

    return step


def vfm_forward(m, batch):
    vfm, x = compiled(m, random_vfm(m)), from_uint8(random_pictures(batch, 256, m.device))
    return inference(m, lambda: vfm(x)), batch


def sampling(m, size, batch, sampler, steps, cfg, timed=4):
    """SiT evaluations of sample.py without the decoder: `timed` steps spread over the whole time, scaled to `steps` by the
    number of evaluations, two a step where guidance acts."""
    torch.manual_seed(0)
    net = (
        wake(models.SiT(size, 2, 4, 32)).to(m.device).eval()
    )  # autocast keeps bf16 copies of what could be trained
    if m.compile:
        net.forward = torch.compile(net.forward)
    ids = torch.arange(batch, device=m.device)

    def evaluations(steps):
        times = (
            np.linspace(1, 0.04, steps) if sampler == "sde" else np.linspace(1, 0, steps + 1)[:-1]
        )
        return sum(2 if cfg > 1 and t <= 0.75 else 1 for t in times)

    def integrate():
        return sample.integrate(
            lambda x, t: sample.guided_velocity(net, x, t, ids, cfg, (0.0, 0.75)),
            normal(0, "sample start", ids, (4, 32, 32)),
            sampler,
            timed,
            lambda i: normal(0, f"sample step {i}", ids, (4, 32, 32)),
        )

    return inference(m, integrate), batch * evaluations(timed) / evaluations(steps)


def decoding(m, spec, batch, size):
    vae = (
        models.VAE(spec, size)
        .to(m.device, memory_format=conv_memory_format(m.device, m.precision))
        .eval()
        .requires_grad_(False)
    )
    decode = torch.compile(vae.decode) if m.compile else vae.decode
    z = torch.randn(batch, vae.channels, vae.latent_size, vae.latent_size).to(m.device)
    return inference(m, lambda: to_uint8(decode(z))), batch


def write_jpegs(count):
    """-> the set of that many pictures of 500 x 375, ImageNet's usual size, with noise for fine detail."""
    os.makedirs("pictures", exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
            (500, 375), Image.BICUBIC
        )
        grain = np.asarray(small) + rng.normal(0, 6, (375, 500, 3))
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(
            f"pictures/{i:04d}.jpg", quality=92
        )
    return ImageSet("pictures")


def caching(m, spec, batch, size):
    """train_sit.py's latent cache from JPEG files, one side, read in this process."""
    data, folders = write_jpegs(batch), (f"cache{i}" for i in itertools.count())
    vae = (
        models.VAE(spec, size)
        .to(m.device, memory_format=conv_memory_format(m.device, m.precision))
        .eval()
        .requires_grad_(False)
    )
    vae.info = dict(hash="0" * 16, path="none")

    def step():
        args = SimpleNamespace(cache=next(folders), workers=0)
        return train_sit.cache_latents(vae, data, False, args, m.device, m.precision)

    return step, batch


def loading(m, batch, size):
    data = write_jpegs(batch)
    return lambda: data.stack(range(batch), size), batch


def fid_features(m, batch, size):
    import fid
    from bench.evaluators import random_inception

    random_inception("inception.pth")
    net, x = fid.Inception("inception.pth").to(m.device), random_pictures(batch, size, m.device)
    return lambda: net(x), batch


def probing(m, count, dims, attributes=40):
    import probe

    torch.manual_seed(0)
    x = torch.randn(count, dims)
    y = (
        (x @ torch.randn(dims, attributes) + dims**0.5 * torch.randn(count, attributes) > 0)
        .to(torch.int8)
        .numpy()
    )
    val = count // 5
    return lambda: probe.fit_linear_probe(
        x[val:], y[val:], x[:val], y[:val], device=m.device
    ), count - val


def rows(quick, batch=None):
    """Name -> (function, its arguments, what is measured, whether it has a baseline)."""
    found, size, batch, net = (
        {},
        64 if quick else 256,
        batch or (4 if quick else 16),
        "S" if quick else "B",
    )
    for kind in ("S",) if quick else ("S", "B", "XL"):
        for repa in (True,) if quick else (False, True):
            text = f"SiT-{kind}/2 step, batch {batch}{', VFM tokens given' if repa else ''}"
            found[f"sit-{kind}{'-repa' if repa else ''}"] = (
                sit_training,
                (kind, batch, repa),
                text,
                True,
            )
    for spec in ("f16d32",) if quick else ("f16d32", "f8d4"):
        for terms in (TERMS,) if quick else (TERMS, *((term,) for term in TERMS)):
            text = f"VAE {spec} step, {size} px, batch 2, {'all losses' if terms == TERMS else terms[0] + ' alone'}"
            found[f"vae-{spec}{'' if terms == TERMS else '-' + terms[0]}"] = (
                vae_training,
                (spec, 2, size, terms),
                text,
                True,
            )
        found[f"cache-{spec}"] = (
            caching,
            (spec, 4, size),
            f"latent caching, {spec}, {size} px, 4 JPEG files",
            False,
        )
        found[f"decode-{spec}"] = (
            decoding,
            (spec, 2, size),
            f"decoding, {spec}, {size} px, batch 2",
            True,
        )
    for sampler, steps, cfg in (
        ("ode", 50, 1.0),
        ("ode", 50, 2.5),
        ("sde", 250, 1.0),
        ("sde", 250, 2.5),
    ):
        text = f"{sampler.upper()} {steps}, SiT-{net}/2{', cfg 2.5' if cfg > 1 else ''}, batch {batch}; 4 steps, scaled"
        found[f"{sampler}{'-cfg' if cfg > 1 else ''}"] = (
            sampling,
            (net, batch, sampler, steps, cfg),
            text,
            True,
        )
    found["vfm"] = (
        vfm_forward,
        (2 if quick else 8,),
        f"VFM forward, DINOv2-B at 224 px, batch {2 if quick else 8}",
        True,
    )
    found["fid"] = fid_features, (batch, 256), f"FID features of 256 px, batch {batch}", False
    found["probe"] = (
        probing,
        ((1000, 512) if quick else (5000, 8192)),
        "probe fit, 40 attributes; rows/s",
        False,
    )
    found["pictures"] = (
        loading,
        (16, 256),
        "JPEG 500x375, decode and ADM crop to 256, a core",
        False,
    )
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def free_memory():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def seconds(m, step):
    """Of one call: by the clock, or CPU seconds of this process with --cpu-time."""
    clock = time.process_time if m.cpu_time else time.perf_counter
    if m.device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    step()
    if m.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def count_flop(step):
    """Operations of one call in eager mode. PyTorch's counter lacks the CPU's fused attention."""

    def forward(q, k, v, *_, **__):
        return 4 * math.prod(q) * k[-2]

    def backward(grad, q, k, v, *_, **__):
        return 8 * math.prod(q) * k[-2]

    ops = torch.ops.aten
    own = {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        step()
    return counter.get_total_flops()


def matrix_peak(m):
    """Operations a second of square matrix products, what a machine does best."""
    n, dtype = (
        8192 if m.device.type == "cuda" else 1536,
        torch.bfloat16 if m.precision == "bf16" else torch.float32,
    )
    a, b = (torch.randn(n, n, dtype=dtype).to(m.device) for _ in range(2))
    return dict(flop=2 * n**3 / min(seconds(m, lambda: a @ b) for _ in range(8)))


def measure(m, make, arguments):
    """-> dict(rate: pictures/s, flop: operations a second, memory: bytes at the peak)."""
    with published(m.baseline):
        eager = SimpleNamespace(
            **{**vars(m), "compile": False}
        )  # compiled code shows the counter nothing
        step, count = make(eager, *arguments)
        flop = count_flop(step)  # this is the warm-up too
        if m.compile:
            del step
            step, count = make(m, *arguments)
            step()
        if m.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        best = min(seconds(m, step) for _ in range(m.repeats))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if m.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    return dict(rate=count / best, flop=flop / best, memory=memory)


def one_row(args):
    """In a process of its own: measures row args.row and prints the result as JSON."""
    if args.baseline:  # not setup, which tunes the allocator
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        device = setup(args.device)
    m = SimpleNamespace(
        device=device,
        precision=args.precision,
        compile=args.compile,
        baseline=args.baseline,
        cpu_time=args.cpu_time,
        repeats=args.repeats,
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if args.row == "peak":
            found = matrix_peak(m)
        else:
            make, arguments = rows(args.quick, args.batch_size)[args.row][:2]
            try:
                found = measure(m, make, arguments)
            except UserError as error:
                found = dict(error=str(error))
        os.chdir("/")
    print(json.dumps(found))


def start_row(args, name, precision, baseline=False, compile=False):
    words = ["--row", name, "--precision", precision, "--repeats", str(args.repeats)]
    words += [
        flag
        for flag, on in (
            ("--quick", args.quick),
            ("--cpu-time", args.cpu_time),
            ("--baseline", baseline),
            ("--compile", compile),
        )
        if on
    ]
    words += ["--device", args.device] if args.device else []
    words += ["--batch-size", str(args.batch_size)] if args.batch_size else []
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-m", "bench.speed", *words], cwd=root, capture_output=True, text=True
    )
    if done.returncode:
        return dict(
            error=(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(args, device):
    """Prints a table, line by line as rows are done -> its lines."""
    lines = []

    def add(*cells):
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        print(lines[-1], flush=True)

    best = resolve_precision(args.precision, device)
    precisions = ["fp32"] + (["bf16"] if resolve_precision("auto", device) == "bf16" else [])
    peaks = {p: start_row(args, "peak", p)["flop"] for p in precisions}
    lines.append(
        "matrix products reach "
        + ", ".join(f"{flop / 1e12:.3f} TFLOP/s in {p}" for p, flop in peaks.items())
        + "\n"
    )
    print(lines[0])
    add("row", "how", "pictures/s", "TFLOP/s", "of peak", "peak memory, GB", "times baseline")
    add("---", "---", "---:", "---:", "---:", "---:", "---:")
    for name, (_, _, text, comparable) in rows(args.quick, args.batch_size).items():
        if args.only and name not in args.only:
            continue
        ways = [
            (f"baseline {p}", p, True, False) for p in precisions if args.baseline and comparable
        ]
        ours = "fp32" if name in ("fid", "probe", "pictures") else best  # which have no bf16
        ways += [(f"ours {ours}", ours, False, False)]
        ways += [(f"ours {ours}, compiled", ours, False, True)] if args.compile else []
        rates = {}
        for how, precision, baseline, compile in ways:
            found = start_row(args, name, precision, baseline, compile)
            if "error" in found:
                add(f"`{name}` {text}", how, f"not measured: {found['error']}", "", "", "", "")
                continue
            ratio = (
                ", ".join(f"{found['rate'] / rate:.2f} ({p})" for p, rate in rates.items())
                if not baseline
                else ""
            )
            if baseline:
                rates[precision] = found["rate"]
            peak = peaks.get(precision)
            add(
                f"`{name}` {text}",
                how,
                f"{found['rate']:.4g}",
                f"{found['flop'] / 1e12:.3f}" if found["flop"] else "",
                f"{found['flop'] / peak:.0%}" if found["flop"] and peak else "",
                f"{found['memory'] / 1e9:.2f}",
                ratio,
            )
    return lines


def agreement(args, device):
    """How far bf16 moves pictures: 50 SDE steps of a trained SiT, cfg 2.5, as the baseline draws them in fp32, as ours from the
    same noise, and as the baseline from other noise. Squared Frechet distances of the colours of an 8x8 grid (192 numbers)."""
    import fid

    sit, vae = sample.load_pair(args.agreement, None, device)
    precision = resolve_precision(args.precision, device)

    def drawn(plain, precision, seed):
        with published(plain):
            parts = [
                sample.draw(sit, vae, ids, ids % sit.num_classes, seed, precision, "sde", 50)
                for ids in torch.arange(1024, device=device).split(64)
            ]
        return torch.cat(parts).float()

    def moments(x):
        x = F.adaptive_avg_pool2d(x, 8).flatten(1).double()
        return x.mean(0), torch.cov(x.T)

    plain = drawn(True, "fp32", 0)
    for text, *how in (
        (f"ours {precision}, same noise", False, precision, 0),
        ("baseline fp32, other noise", True, "fp32", 1),
    ):
        x = drawn(*how)
        print(
            f"{text}: Frechet distance {fid.frechet_distance(*moments(plain), *moments(x)):.4g}, root mean square difference "
            f"of pixels {(x - plain).square().mean().sqrt().item():.2f} of 255",
            flush=True,
        )


# ----------------------------------------------------------------------------------------------------------------------


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"rows to measure: {', '.join(rows(False))}"
    )
    p.add_argument("--quick", action="store_true", help="small networks, batches and pictures")
    p.add_argument(
        "--baseline", action="store_true", help="beside each row the way of published trainers"
    )
    p.add_argument("--compile", action="store_true", help="another row for torch.compile")
    p.add_argument(
        "--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of our rows"
    )
    p.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    p.add_argument(
        "--batch-size",
        type=int,
        help="of the SiT, sampling and FID rows (default: 16; 4 with --quick)",
    )
    p.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="timed steps after one of warm-up; the fastest counts",
    )
    p.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU seconds instead of the clock's: for one thread on a machine "
        "that is shared with other work",
    )
    p.add_argument(
        "--agreement",
        metavar="RUN",
        help="instead: how far the precision moves a trained SiT's pictures",
    )
    p.add_argument("--write", action="store_true", help="append the table to BENCHMARKS.md")
    p.add_argument("--row", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.row:
        return one_row(args)
    if args.agreement:
        return agreement(args, setup(args.device))
    names = rows(args.quick)
    unknown = sorted(set(args.only or ()) - set(names))
    if unknown:
        raise UserError(f"--only {' '.join(unknown)}: the rows are {', '.join(names)}")
    device = setup(args.device)
    if args.cpu_time and (device.type == "cuda" or torch.get_num_threads() > 1):
        raise UserError(
            "--cpu-time is for one thread on a CPU: set OMP_NUM_THREADS=1 and give --device cpu"
        )
    machine = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    with open("/proc/cpuinfo") as file:
        names = [
            line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
        ] or [platform.machine()]
    machine = f"{names[0]} ({torch.backends.cpu.get_cpu_capability()}), {machine}"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name()}; {machine}"
    threads = (
        f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} "
        if "OMP_NUM_THREADS" in os.environ
        else ""
    )
    command = threads + shlex.join(["python", "-m", "bench.speed", *sys.argv[1:]])
    clock = "CPU seconds" if args.cpu_time else "wall clock"
    head = (
        f"## {time.strftime('%Y-%m-%d')}, {machine}\n\n`{command}`; torch {torch.__version__}, "
        f"Python {platform.python_version()}; {clock}, best of {args.repeats};"
    )
    print(head)
    lines = table(args, device)
    if args.write:
        with open(
            os.path.join(
                os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "BENCHMARKS.md"
            ),
            "a",
        ) as file:
            file.write("\n".join(["", head, *lines, ""]))


if __name__ == "__main__":
    run_main(main)
