"""Measures the speed and memory of every stage on this machine: pictures a second, floating-point
operations a second and their share of what the machine's matrix products reach, and peak memory.
All networks have random weights, which changes no speed; nothing is downloaded.

    python -m bench.speed --quick                            # small sizes: two minutes on two cores
    python -m bench.speed --only sit-B vae-f16d32 --baseline # these rows, each beside its baseline
    python -m bench.speed --write                            # appends the table to BENCHMARKS.md

--baseline measures every training, sampling and decoding row a second time, done as published
trainers do it (`published` below). Each row runs in a process of its own, so that its peak memory
is its own: on a CPU that of the process with all its libraries, on CUDA that of its tensors.
Floating-point operations are those of matrix products and convolutions. On a CPU attention counts
the same however it is computed. In bf16, weights, optimiser and EMA stay fp32.
"""

import argparse
import contextlib
import copy
import functools
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
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import processes, training
from common.draws import normal
from common.files import UserError
from common.pictures import ImageSet, from_uint8, to_uint8
from common.processes import autocast, available_cores, resolve_precision, run_main, setup
from common.training import Guard
import models
import sample
import train_sit
import train_vae

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DINO = "vit_base_patch14_dinov2.lvd142m"
TERMS = ("align", "recon", "lpips", "kl", "gan")


class Setting(NamedTuple):
    """How a row is measured."""

    device: torch.device
    precision: str = "fp32"
    compile: bool = False
    baseline: bool = False
    # Measure CPU seconds of this process instead of the clock's.
    cpu_time: bool = False
    # Timed steps, of which the fastest counts.
    repeats: int = 3


# --------------------------------------------------------------------------------------------------
# The baseline: the same mathematics in the plainest PyTorch, as published trainers have it


def plain_attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v over (B,H,N,d)."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def plain_cosine(predicted, target):
    """Mean cosine of tokens, both (B,N,D), picture by picture."""
    total = 0.0
    for a, b in zip(predicted, target, strict=True):
        a = F.normalize(a.float(), dim=-1)
        b = F.normalize(b.float(), dim=-1)
        total = total + (a * b).sum(-1).mean()
    return total / len(predicted)


def plain_align_loss(predicted, target):
    return 1 - plain_cosine(predicted, target)


def plain_repa_loss(predicted, target):
    return -plain_cosine(predicted, target)


@torch.no_grad()
def plain_ema(ema, model, decay):
    for averaged, current in zip(ema.parameters(), model.parameters(), strict=True):
        averaged.mul_(decay).add_(current, alpha=1 - decay)
    for averaged, current in zip(ema.buffers(), model.buffers(), strict=True):
        averaged.copy_(current)


def plain_step(guard, losses, step):
    """Guard.step without the guard."""
    groups = guard.optimizer.param_groups
    norms = [nn.utils.clip_grad_norm_(group["params"], guard.clip) for group in groups]
    guard.optimizer.step()
    guard.optimizer.zero_grad(set_to_none=True)
    return norms[0]


def plain_memory_format(device, precision="fp32", training=False):
    return torch.contiguous_format


@contextlib.contextmanager
def published(on=True):
    """While `on`, our functions that were made fast are replaced by plain ones, each in the module
    where its callers look it up."""
    replacements = [
        (models, "attention", plain_attention),
        (training, "ema_update", plain_ema),
        (Guard, "step", plain_step),
        (processes, "conv_memory_format", plain_memory_format),
        (train_vae, "conv_memory_format", plain_memory_format),
        (train_vae, "align_loss", plain_align_loss),
        (train_sit, "repa_loss", plain_repa_loss),
    ]
    with contextlib.ExitStack() as stack:
        if on:
            for owner, name, plain in replacements:
                stack.enter_context(mock.patch.object(owner, name, plain))
        yield


def adamw(setting, networks):
    """The trainers' optimiser, one group of parameters a network. The baseline's is PyTorch's
    default form of it."""
    groups = [dict(params=[p for p in net.parameters() if p.requires_grad]) for net in networks]
    fused = None if setting.baseline else True
    return torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.0, fused=fused)


# --------------------------------------------------------------------------------------------------
# Networks with random weights, and pictures


def wake(net):
    """Gives branches that start at zero small random weights, and returns the network. With zeros a
    comparison of gradients would see nothing."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    return net


def memory_format(setting):
    return processes.conv_memory_format(setting.device, setting.precision)


@contextlib.contextmanager
def untrained_vision_models():
    """Inside, models.VFM takes timm's random initial weights instead of downloading any."""
    import timm

    create = timm.create_model

    def create_untrained(name, pretrained=False, **words):
        return create(name, **words)

    with mock.patch.object(timm, "create_model", create_untrained):
        yield


def random_vfm(setting, name=DINO, size=256, grid=16):
    with untrained_vision_models():
        return models.VFM(name, image_size=size, grid=grid).to(setting.device)


def write_random_lpips(path):
    """Writes a file of random weights that models.LPIPS reads, and returns its path."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        shapes = vgg16().features.state_dict()
    state = {}
    for name, value in shapes.items():
        state[f"features.{name}"] = torch.zeros(value.shape)
        if value.ndim == 4:
            nn.init.kaiming_normal_(state[f"features.{name}"], mode="fan_out")
    for i, width in enumerate((64, 128, 256, 512, 512)):
        state[f"lin{i}"] = torch.rand(1, width, 1, 1)
    torch.save(state, path)
    return path


def random_pictures(count, size, device="cpu"):
    """Smooth uint8 pictures (B,3,size,size)."""
    small = torch.rand(count, 3, size // 16, size // 16)
    x = F.interpolate(small, (size, size), mode="bicubic")
    return (x.clamp(0, 1) * 255).to(torch.uint8).to(device)


def write_jpegs(count):
    """Writes pictures of 500 x 375, ImageNet's usual size, with noise for fine detail, into the
    folder "pictures". Returns the ImageSet."""
    os.makedirs("pictures", exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((500, 375), Image.BICUBIC))
        noisy = smooth + rng.normal(0, 6, (375, 500, 3))
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        picture.save(f"pictures/{i:04d}.jpg", quality=92)
    return ImageSet("pictures")


def frozen_vae(setting, spec, size):
    vae = models.VAE(spec, size).to(setting.device, memory_format=memory_format(setting))
    return vae.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# The work of a row. Each function builds what it needs and returns (step, pictures): step() does
# the work once, for that many pictures


class TokensGiven(nn.Module):
    """Stands in for models.VFM, with the same arguments, and takes no time: every picture has the
    same tokens."""

    norm = None

    def __init__(self, name, weights=None, image_size=256, grid=None, stride=None, norm=None):
        super().__init__()
        self.dim = dim = 768
        self.register_buffer("tokens", torch.randn(1, grid**2, dim))

    def forward(self, images):
        """(B,3,H,W) -> (B,N,D)."""
        return self.tokens.expand(len(images), -1, -1)


def sit_training(setting, size, batch, repa, spec="f8d4", vfm=None, **flags):
    """The step of train_sit.py on latents of a VAE of that spec at 256 px. step() returns
    {term: scalar}, grad_norm included. vfm: the timm model that gives REPA its tokens; without one
    they are given. flags: other flags of train_sit.py, by their names in the program."""
    torch.manual_seed(0)
    words = ["--size", size, "--batch-size", batch, "--accum", 1, "--repa", 0.5 if repa else 0]
    args = train_sit.parse_arguments([str(word) for word in words])
    args.compile = setting.compile
    vars(args).update(flags)

    # Of the VAE only the statistics of its latents are used.
    vae = models.VAE(spec, 256, ch=32, num_res_blocks=1).to(setting.device)
    with untrained_vision_models() if vfm else mock.patch.object(train_sit, "VFM", TokensGiven):
        args.vfm = vfm
        networks = train_sit.build_networks(args, vae, 1000, setting.device)
    parameters = sum(p.numel() for p in networks.net.parameters())
    # Weights, gradients, two moments and the EMA.
    if setting.device.type == "cpu" and 20 * parameters > free_memory():
        raise UserError("weights, gradients, AdamW's moments and EMA do not fit the free memory")
    wake(networks.net)
    ema = copy.deepcopy(networks.net).eval().requires_grad_(False)
    running_networks = train_sit.compiled_and_parallel(networks, args, setting.device)
    guard = Guard(networks.net, adamw(setting, [networks.net]), args.clip)
    data = dict(
        latent=torch.randn(batch, 2, *networks.latent_shape).half().to(setting.device),
        label=torch.arange(batch, device=setting.device) % networks.null_label,
        position=torch.arange(batch, device=setting.device),
        image=random_pictures(batch, 256 if vfm else 16, setting.device),
    )

    def step():
        losses = train_sit.train_step(running_networks, data, 0, args, setting.precision, guard)
        training.ema_update(ema, networks.net, args.ema)
        return losses

    return step, batch


def vae_training(setting, spec, batch, size, terms, vfm=DINO, **flags):
    """The step of train_vae.py with these of TERMS. step() returns {term: scalar}, grad_norm
    included. flags: other flags of train_vae.py, by their names in the program."""
    torch.manual_seed(0)
    words = ["--spec", spec, "--resolution", size, "--batch-size", batch, "--accum", 1]
    words += ["--vfm", vfm]
    args = train_vae.parse_arguments([str(word) for word in words])
    args.lpips_weights = [write_random_lpips("lpips.pth")] if "lpips" in terms else []
    if "align" not in terms:
        args.align = "none"
    if "recon" not in terms:
        args.recon_weight = 0
    for term in {"lpips", "kl", "gan"} - set(terms):
        setattr(args, term, 0)
    vars(args).update(flags)
    args.compile = setting.compile

    with untrained_vision_models():
        networks = train_vae.build_networks(args, setting.device, setting.precision)
    if not {"recon", "lpips", "gan"} & set(terms):
        # These terms need no reconstruction. The flag is set after the networks were built, so that
        # the encoder is trained all the same.
        args.freeze = True
        networks.net.decode = False
    wake(networks.net.vae)
    trained = nn.ModuleDict(dict(net=networks.net))
    if networks.discriminator is not None:
        trained["disc"] = networks.discriminator
    ema = copy.deepcopy(networks.net).eval().requires_grad_(False)
    running_networks = train_vae.compiled_and_parallel(networks, args, setting.device)
    guard = Guard(trained, adamw(setting, trained.values()), args.clip)
    data = dict(
        image=random_pictures(batch, size, setting.device),
        position=torch.arange(batch, device=setting.device),
    )

    def step():
        losses = train_vae.train_step(running_networks, data, 0, args, setting.precision, guard)
        training.ema_update(ema, networks.net, args.ema)
        return losses

    return step, batch


def inference(setting, function):
    @torch.no_grad()
    def step():
        with autocast(setting.device, setting.precision):
            return function()

    return step


def vfm_forward(setting, batch):
    vfm = random_vfm(setting)
    if setting.compile:
        models.compile_network(vfm)
    x = from_uint8(random_pictures(batch, 256, setting.device))
    return inference(setting, lambda: vfm(x)), batch


def guided_evaluations(sampler, steps, cfg):
    """Evaluations of the network in a run of a sampler: two a step where guidance acts."""
    first_to_last = {"sde": (1, 0.04), "ode": (1, 1 / steps)}
    times = np.linspace(*first_to_last[sampler], steps)
    guided = (times <= 0.75).sum() if cfg > 1 else 0
    return steps + int(guided)


def sampling(setting, size, batch, sampler, steps, cfg, timed_steps=4, **shape):
    """The evaluations of the SiT in sample.py, without the decoder: `timed_steps` steps spread over
    the whole time, scaled to `steps` by the number of evaluations. shape: arguments of models.SiT
    instead of the default, a patch of 2 on latents (4,32,32)."""
    torch.manual_seed(0)
    shape = dict(patch=2, channels=4, latent_size=32) | shape
    # Frozen weights would be cast anew at each call: autocast keeps bf16 copies of those only that
    # could be trained.
    net = wake(models.SiT(size, **shape)).to(setting.device).eval()
    if setting.compile:
        models.compile_network(net)
    ids = torch.arange(batch, device=setting.device)
    latent = (net.channels, net.latent_size, net.latent_size)

    def velocity(x, t):
        return sample.guided_velocity(net, x, t, ids % net.num_classes, cfg, (0.0, 0.75))

    def noise(i):
        return normal(0, f"sample step {i}", ids, latent)

    def integrate():
        start = normal(0, "sample start", ids, latent)
        return sample.integrate(velocity, start, sampler, timed_steps, noise)

    timed = guided_evaluations(sampler, timed_steps, cfg)
    pictures = batch * timed / guided_evaluations(sampler, steps, cfg)
    return inference(setting, integrate), pictures


def decoding(setting, spec, batch, size):
    vae = frozen_vae(setting, spec, size)
    if setting.compile:
        models.compile_network(vae)
    z = torch.randn(batch, vae.channels, vae.latent_size, vae.latent_size).to(setting.device)
    return inference(setting, lambda: to_uint8(vae.decode(z))), batch


def caching(setting, spec, batch, size):
    """The latent cache of train_sit.py from JPEG files, without mirror images, read in this
    process."""
    data = write_jpegs(batch)
    vae = frozen_vae(setting, spec, size)
    vae.info = dict(hash="0" * 16, path="none")
    numbers = itertools.count()

    def step():
        args = SimpleNamespace(cache=f"cache{next(numbers)}", workers=0, flip=False)
        return train_sit.cache_latents(vae, data, args, setting.device, setting.precision)

    return step, batch


def loading(setting, batch, size):
    data = write_jpegs(batch)
    return lambda: data.stack(range(batch), size), batch


def fid_features(setting, batch, size):
    import fid
    from bench.evaluators import random_inception

    if not os.path.exists("inception.pth"):
        random_inception("inception.pth")
    net = fid.Inception("inception.pth").to(setting.device)
    x = random_pictures(batch, size, setting.device)
    return lambda: net(x), batch


def probing(setting, count, width, attributes=40):
    """The fit of probe.py to random features (count,width), a fifth of them for validation."""
    import probe

    torch.manual_seed(0)
    x = torch.randn(count, width)
    scores = x @ torch.randn(width, attributes) + width**0.5 * torch.randn(count, attributes)
    y = (scores > 0).to(torch.int8).numpy()
    held_out = count // 5

    def step():
        train = (x[held_out:], y[held_out:])
        val = (x[:held_out], y[:held_out])
        return probe.fit_linear_probe(*train, *val, device=setting.device)

    return step, count - held_out


# --------------------------------------------------------------------------------------------------
# The rows


class Row(NamedTuple):
    make: callable
    arguments: tuple
    text: str
    has_baseline: bool
    # Whether it runs in bf16 where the rest does.
    has_bf16: bool = True


def rows(quick, batch=None):
    """{name: Row}. batch: that of the SiT, sampling and FID rows."""
    batch = batch or (4 if quick else 16)
    found = sit_rows(quick, batch)
    found.update(vae_rows(quick))
    found.update(sampling_rows("S" if quick else "B", batch))
    vfm_batch = 2 if quick else 8
    text = f"VFM forward, DINOv2-B at 224 px, batch {vfm_batch}"
    found["vfm"] = Row(vfm_forward, (vfm_batch,), text, True)
    text = f"FID features of 256 px, batch {batch}"
    found["fid"] = Row(fid_features, (batch, 256), text, False, has_bf16=False)
    size = (1000, 512) if quick else (5000, 8192)
    text = "probe fit, 40 attributes; rows/s"
    found["probe"] = Row(probing, size, text, False, has_bf16=False)
    text = "JPEG 500x375, decode and ADM crop to 256, a core"
    found["pictures"] = Row(loading, (16, 256), text, False, has_bf16=False)
    return found


def sit_rows(quick, batch):
    found = {}
    for size in ["S"] if quick else ["S", "B", "XL"]:
        for repa in [True] if quick else [False, True]:
            name = f"sit-{size}"
            text = f"SiT-{size}/2 step, batch {batch}"
            if repa:
                name += "-repa"
                text += ", VFM tokens given"
            found[name] = Row(sit_training, (size, batch, repa), text, True)
    return found


def vae_rows(quick):
    size = 64 if quick else 256
    found = {}
    for spec in ["f16d32"] if quick else ["f16d32", "f8d4"]:
        text = f"VAE {spec} step, {size} px, batch 2"
        every_term = Row(vae_training, (spec, 2, size, TERMS), f"{text}, all losses", True)
        found[f"vae-{spec}"] = every_term
        if not quick:
            in_bf16 = functools.partial(vae_training, autocast_losses=True)
            words = f"{text}, all losses, --autocast-losses"
            found[f"vae-{spec}-autocast"] = Row(in_bf16, (spec, 2, size, TERMS), words, False)
        for term in [] if quick else TERMS:
            arguments = (spec, 2, size, (term,))
            found[f"vae-{spec}-{term}"] = Row(
                vae_training, arguments, f"{text}, {term} alone", True
            )
        text = f"latent caching, {spec}, {size} px, 4 JPEG files"
        found[f"cache-{spec}"] = Row(caching, (spec, 4, size), text, False)
        text = f"decoding, {spec}, {size} px, batch 2"
        found[f"decode-{spec}"] = Row(decoding, (spec, 2, size), text, True)
    return found


def sampling_rows(size, batch):
    found = {}
    for sampler, steps in (("ode", 50), ("sde", 250)):
        for cfg in (1.0, 2.5):
            name = sampler
            text = f"{sampler.upper()} {steps}, SiT-{size}/2"
            if cfg > 1:
                name += "-cfg"
                text += f", cfg {cfg}"
            text += f", batch {batch}; 4 steps, scaled"
            found[name] = Row(sampling, (size, batch, sampler, steps, cfg), text, True)
    return found


# --------------------------------------------------------------------------------------------------
# Measuring


def free_memory():
    """Bytes that the system can still give to processes."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024


def synchronize(setting):
    if setting.device.type == "cuda":
        torch.cuda.synchronize()


def seconds(setting, step):
    """Of one call, by the clock or in CPU time."""
    clock = time.process_time if setting.cpu_time else time.perf_counter
    synchronize(setting)
    start = clock()
    step()
    synchronize(setting)
    return clock() - start


def count_operations(step):
    """Floating-point operations of one call in eager mode; the counter sees nothing of compiled
    code. PyTorch's counter lacks the CPU's fused attention."""

    def forward(q, k, v, *_, **__):
        return 4 * math.prod(q) * k[-2]

    def backward(grad, q, k, v, *_, **__):
        return 8 * math.prod(q) * k[-2]

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {fused: forward, fused_backward: backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return counter.get_total_flops()


def matrix_peak(setting):
    """Operations a second of square matrix products, what a machine does best."""
    n = 8192 if setting.device.type == "cuda" else 1536
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    a = torch.randn(n, n, dtype=dtype).to(setting.device)
    b = torch.randn(n, n, dtype=dtype).to(setting.device)
    return 2 * n**3 / min(seconds(setting, lambda: a @ b) for _ in range(8))


def measure(setting, make, arguments):
    """Measures a row: {rate: pictures a second, flop: operations a second, memory: bytes at the
    peak}."""
    with published(setting.baseline):
        step, pictures = make(setting._replace(compile=False), *arguments)
        # Counting is the warm-up too.
        operations = count_operations(step)
        if setting.compile:
            # The eager networks make room.
            del step
            step, pictures = make(setting, *arguments)
            step()
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        fastest = min(seconds(setting, step) for _ in range(setting.repeats))
    return dict(
        rate=pictures / fastest, flop=operations / fastest, memory=peak_memory(setting.device)
    )


def peak_memory(device):
    """Bytes: on CUDA of tensors since the last reset, on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --------------------------------------------------------------------------------------------------
# The table, each row from a process of its own


def baseline_device(name):
    """The device as published trainers use it: TF32 and default settings otherwise. `setup` would
    also tune the allocator."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def measure_one_row(args):
    """In a process of its own: measures the row args.row and prints the result as JSON."""
    device = baseline_device(args.device) if args.baseline else setup(args.device)
    setting = Setting(
        device, args.precision, args.compile, args.baseline, args.cpu_time, args.repeats
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if args.row == "peak":
            result = dict(flop=matrix_peak(setting))
        else:
            row = rows(args.quick, args.batch_size)[args.row]
            try:
                result = measure(setting, row.make, row.arguments)
            except UserError as error:
                result = dict(error=str(error))
        os.chdir(ROOT)
    print(json.dumps(result))


def start_row(args, name, precision, baseline=False, compile=False):
    """Runs measure_one_row and returns its result, or {error: its last words}."""
    command = [sys.executable, "-m", "bench.speed", "--row", name, "--precision", precision]
    command += ["--repeats", str(args.repeats)]
    switches = {
        "--quick": args.quick,
        "--cpu-time": args.cpu_time,
        "--baseline": baseline,
        "--compile": compile,
    }
    command += [flag for flag, on in switches.items() if on]
    if args.device:
        command += ["--device", args.device]
    if args.batch_size:
        command += ["--batch-size", str(args.batch_size)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        errors = done.stderr.strip().splitlines()
        return dict(error=errors[-1] if errors else f"exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


class Table:
    """Prints the lines of a Markdown table as they come, and keeps them."""

    def __init__(self):
        self.lines = []

    def print(self, line):
        self.lines.append(line)
        print(line, flush=True)

    def row(self, *cells):
        self.print("| " + " | ".join(str(cell) for cell in cells) + " |")


def measure_all(args, device):
    """Prints the table of the rows that args ask for, and returns its lines."""
    best = resolve_precision(args.precision, device)
    precisions = ["fp32"]
    if resolve_precision("auto", device) == "bf16":
        precisions.append("bf16")
    peaks = {precision: start_row(args, "peak", precision)["flop"] for precision in precisions}
    table = Table()
    reached = [f"{peak / 1e12:.3f} TFLOP/s in {precision}" for precision, peak in peaks.items()]
    table.print(f"matrix products reach {', '.join(reached)}\n")
    table.row("row", "how", "pictures/s", "TFLOP/s", "of peak", "peak memory, GB", "times baseline")
    table.row("---", "---", "---:", "---:", "---:", "---:", "---:")
    for name, row in rows(args.quick, args.batch_size).items():
        if args.only is None or name in args.only:
            own = best if row.has_bf16 else "fp32"
            measure_ways(table, args, name, row, precisions, own, peaks)
    return table.lines


def measure_ways(table, args, name, row, precisions, own_precision, peaks):
    """Adds a row in each of its ways: the baseline in each precision, ours, ours compiled."""
    first = f"`{name}` {row.text}"
    baseline_rates = {}
    for precision in precisions if args.baseline and row.has_baseline else []:
        result = start_row(args, name, precision, baseline=True)
        if "rate" in result:
            baseline_rates[precision] = result["rate"]
        table.row(first, f"baseline {precision}", *cells(result, peaks.get(precision), {}))
    peak = peaks.get(own_precision)
    result = start_row(args, name, own_precision)
    table.row(first, f"ours {own_precision}", *cells(result, peak, baseline_rates))
    if args.compile:
        result = start_row(args, name, own_precision, compile=True)
        table.row(first, f"ours {own_precision}, compiled", *cells(result, peak, baseline_rates))


def cells(result, peak, baseline_rates):
    """A result as the last five cells of a line."""
    if "error" in result:
        return f"not measured: {result['error']}", "", "", "", ""
    rate = result["rate"]
    flop = share = ""
    if result["flop"]:
        flop = f"{result['flop'] / 1e12:.3f}"
        share = f"{result['flop'] / peak:.0%}" if peak else ""
    ratios = [f"{rate / other:.2f} ({precision})" for precision, other in baseline_rates.items()]
    return f"{rate:.4g}", flop, share, f"{result['memory'] / 1e9:.2f}", ", ".join(ratios)


def heading(args, device):
    """The lines above a table: date, machine, command and versions."""
    name = processor_name()
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name()}; {name}"
    cores = f"{available_cores()} of {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    command = shlex.join(["python", "-m", "bench.speed", *sys.argv[1:]])
    if "OMP_NUM_THREADS" in os.environ:
        command = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} {command}"
    clock = "CPU seconds" if args.cpu_time else "wall clock"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return (
        f"## {time.strftime('%Y-%m-%d')}, {name}, {cores}\n\n"
        f"`{command}`; {versions}; {clock}, best of {args.repeats};"
    )


def processor_name():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def append_to_benchmarks(lines):
    with open(os.path.join(ROOT, "BENCHMARKS.md"), "a") as file:
        file.write("\n".join(["", *lines, ""]))


# --------------------------------------------------------------------------------------------------
# What bf16 does to pictures


def colour_moments(pictures):
    """uint8 pictures (N,3,H,W) as floats -> mean and covariance of their 8x8 grids of colours, 192
    numbers a picture."""
    x = F.adaptive_avg_pool2d(pictures, 8).flatten(1).double()
    return x.mean(0), torch.cov(x.T)


def agreement(args, device):
    """Prints how far bf16 moves pictures: 1,024 of a trained SiT, 50 SDE steps, cfg 2.5, as the
    baseline draws them in fp32, as ours from the same noise, and as the baseline from other noise.
    Distances are squared Frechet distances of 8x8 grids of colours."""
    import fid

    sit, vae = sample.load_pair(args.agreement, None, device)
    precision = resolve_precision(args.precision, device)

    def drawn(baseline, precision, seed):
        with published(baseline):
            parts = []
            for ids in torch.arange(1024, device=device).split(64):
                labels = ids % sit.num_classes
                parts.append(sample.draw(sit, vae, ids, labels, seed, precision, "sde", 50))
        return torch.cat(parts).float()

    reference = drawn(True, "fp32", 0)
    for text, baseline, own_precision, seed in (
        (f"ours {precision}, same noise", False, precision, 0),
        ("baseline fp32, other noise", True, "fp32", 1),
    ):
        pictures = drawn(baseline, own_precision, seed)
        distance = fid.frechet_distance(*colour_moments(reference), *colour_moments(pictures))
        difference = (pictures - reference).square().mean().sqrt().item()
        print(
            f"{text}: Frechet distance {distance:.4g}, root mean square difference of pixels "
            f"{difference:.2f} of 255",
            flush=True,
        )


# --------------------------------------------------------------------------------------------------


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"rows to measure: {', '.join(rows(False))}"
    )
    parser.add_argument("--quick", action="store_true", help="small networks, batches and pictures")
    parser.add_argument(
        "--baseline", action="store_true", help="beside each row the way of published trainers"
    )
    parser.add_argument("--compile", action="store_true", help="another row for torch.compile")
    parser.add_argument(
        "--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of our rows"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument(
        "--batch-size",
        type=int,
        help="of the SiT, sampling and FID rows (default: 16; 4 with --quick)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="timed steps after one of warm-up; the fastest counts",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU seconds instead of the clock's: for one thread on a machine that is shared with "
        "other work",
    )
    parser.add_argument(
        "--agreement",
        metavar="RUN",
        help="instead: how far the precision moves a trained SiT's pictures",
    )
    parser.add_argument("--write", action="store_true", help="append the table to BENCHMARKS.md")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_arguments()
    if args.row:
        return measure_one_row(args)
    if args.agreement:
        return agreement(args, setup(args.device))
    known = rows(args.quick)
    unknown = sorted(set(args.only or ()) - set(known))
    if unknown:
        raise UserError(f"--only {' '.join(unknown)}: the rows are {', '.join(known)}")
    device = setup(args.device)
    if args.cpu_time and (device.type == "cuda" or torch.get_num_threads() > 1):
        raise UserError(
            "--cpu-time is for one thread on a CPU: set OMP_NUM_THREADS=1 and give --device cpu"
        )
    head = heading(args, device)
    print(head)
    lines = measure_all(args, device)
    if args.write:
        append_to_benchmarks([head, *lines])


if __name__ == "__main__":
    run_main(main)
