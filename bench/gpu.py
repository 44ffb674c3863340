"""Checks on a GPU what the tests on CPUs cannot see, and measures its speed. One command for a card
that is at hand for minutes only.

    python -m bench.gpu                        # everything, 450 seconds at most
    python -m bench.gpu --only draws vae-fp32  # these checks (--list names them)
    python -m bench.gpu --only speed           # the second part; --only correctness: the first
    python -m bench.gpu --write                # also appends the results to BENCHMARKS.md
    python -m bench.gpu --device cpu --tiny    # a rehearsal on a CPU, about two minutes

It needs no network and no files: pictures are drawn, and all weights are random. The first part
compares the stages' own results on the card with those of the CPU, compiled with eager, bf16 with
fp32, resumed with uninterrupted. The second part measures pictures a second. The most important
checks come first. Each is a process of its own with its own time limit, prints one line, PASS or
FAIL with its numbers, and enters the record gpu.json in $OUT, else in runs/gpu, which is complete
at any moment that the command is cut off.
"""

import argparse
import contextlib
import functools
import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from bench import speed
from bench.evaluators import random_inception
from common import processes, training
from common.draws import normal, random_bits, uniform
from common.files import UserError, write_json, write_weights
from common.pictures import ImageSet, TrainingBatches, from_uint8, load_batches
from common.processes import available_cores, run_main, setup
from common.runs import load_checkpoint, provenance
from common.weights import load_vae
from tools.pictures import draw_pictures
import fid
import models
import probe
import sample
import train_sit
import train_vae


class Options(NamedTuple):
    """What every check is told."""

    device: str
    # Networks and batches of a rehearsal.
    tiny: bool
    # Folder of the pictures and weights that `prepare` made.
    shared: str

    def path(self, name):
        return os.path.join(self.shared, name)


class Failed(Exception):
    """A check's result is wrong. The message says which, in one line."""


def require(condition, message):
    if not condition:
        raise Failed(message)


# --------------------------------------------------------------------------------------------------
# Pictures and weights for all checks


def prepare(options):
    """Makes what the checks share, in options.shared, with the CPU."""
    import timm
    from safetensors.torch import save_file

    os.chdir(options.shared)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for name in "ab":
        os.makedirs(f"small/{name}")
        for i in range(12):
            picture = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
            picture.resize((48, 40), Image.BICUBIC).save(f"small/{name}/{i:02d}.png")
    draw_pictures("objects", 32, per_class=20)
    speed.write_jpegs(16 if options.tiny else 256)

    save_file(timm.create_model("test_vit").state_dict(), "vfm.safetensors")
    speed.write_random_lpips("lpips.pth")
    random_inception("inception.pth")
    vae = speed.wake(models.VAE("f4d4", 32, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1))
    write_weights("vae/vae.safetensors", "vae", vae.state_dict(), vae.config, dict(step=1))
    vae_path = os.path.abspath("vae")
    vae_hash = load_vae(vae_path).info["hash"]
    sit = speed.wake(models.SiT("S", 2, 4, 8, num_classes=2, depth=2, width=64, heads=2))
    info = dict(step=1, classes=["a", "b"], vae_hash=vae_hash, vae_path=vae_path)
    write_weights("sit/sit.safetensors", "sit", sit.state_dict(), sit.config, info)
    yield {}


# --------------------------------------------------------------------------------------------------
# The stages, run in the process of a check

STAGES = {"vae": train_vae, "sit": train_sit}
# Flags of tiny networks. In fp32 and eager unless a check says otherwise.
BOTH = (
    "--batch-size 8 --lr 1e-4 --workers 0 --log-every 1 --precision fp32 --no-compile "
    "--vfm test_vit --vfm-weights {shared}/vfm.safetensors --data {shared}/small"
)
FLAGS = {
    "vae": f"{BOTH} --resolution 32 --spec f4d4 --ch 32 --ch-mult 1 1 1 --num-res-blocks 1 "
    "--mapper-hidden 64 --lpips-weights {shared}/lpips.pth",
    "sit": f"{BOTH} --vae {{shared}}/vae --depth 2 --width 64 --heads 2 --patch 2 --repa-block 1 "
    "--preview-steps 3 --preview-n 1",
}
# The kinks of these networks amplify rounding errors, so that twenty steps with them cannot agree.
WITHOUT_KINKS = "--lpips 0 --gan 0"


def run_script(module, *words):
    """Runs a stage's main() as `python <module>.py words` would."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *map(str, words)]):
        module.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train(options, stage, out, steps, *flags):
    """Trains a tiny network in the folder `out` and returns {term: its values at all steps}."""
    words = FLAGS[stage].format(shared=options.shared).split()
    words += ["--device", options.device, "--out", out, "--steps", str(steps)]
    if stage == "sit":
        words += ["--cache", f"{out}-cache"]
    for part in flags:
        words += part.split()
    run_script(STAGES[stage], *words)
    return logged(out)


def logged(out):
    """{term: its values at all steps (steps,)} of a run."""
    with open(os.path.join(out, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    lines = [line for line in lines if "grad_norm" in line]
    terms = lines[0].keys() - {"step", "epoch", "images_per_s"}
    return {term: np.array([line[term] for line in lines]) for term in sorted(terms)}


def deviation(found, wanted):
    """The largest deviation of two results of `train`, relative to the value, or to 0.1 where the
    value is smaller. Infinite where a value is not a number."""
    require(found.keys() == wanted.keys(), f"terms {sorted(found)} instead of {sorted(wanted)}")
    largest = 0.0
    for term in wanted:
        scale = np.maximum(np.abs(wanted[term]), 0.1)
        relative = np.abs(found[term] - wanted[term]) / scale
        largest = max(largest, float(np.nan_to_num(relative, nan=np.inf).max()))
    return largest


@contextlib.contextmanager
def without_tf32():
    """Inside, fp32 on the card is the fp32 of the CPU: `setup` does not allow TF32."""
    use_own_gpu = processes.use_own_gpu

    def use_own_gpu_without_tf32():
        name = use_own_gpu()
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        return name

    with mock.patch.object(processes, "use_own_gpu", use_own_gpu_without_tf32):
        yield


# --------------------------------------------------------------------------------------------------
# Correctness. A check is a generator of {name of a number: number}, and raises Failed


def draws(options):
    """Bits and uniform numbers are the CPU's bit for bit. Normal ones differ in the last digits,
    since the card's logarithm and cosine round differently."""
    device = setup(options.device)
    ids = torch.arange(0, 2**40, 2**40 // 1000)
    for seed in (0, 12345):
        bits = random_bits(seed, "noise", ids.to(device), 64).cpu()
        numbers = uniform(seed, "time", ids.to(device)).cpu()
        require(torch.equal(bits, random_bits(seed, "noise", ids, 64)), "other bits")
        require(torch.equal(numbers, uniform(seed, "time", ids)), "other uniform numbers")
        found = normal(seed, "noise", ids.to(device), (4, 8, 8)).cpu()
        wanted = normal(seed, "noise", ids, (4, 8, 8))
        difference = (found - wanted).abs().max().item()
        equal = (found == wanted).double().mean().item()
        yield {"normal: largest difference": difference, "normal: share of equal bits": equal}
        require(difference < 1e-5, f"normal numbers differ by {difference:.2g}")


def same_curve(options, stage, steps, tolerance, flags="", first="", second=""):
    """Two trainings, with the flags `first` and `second`, log the same losses at every step."""
    with without_tf32():
        wanted = train(options, stage, "first", steps, flags, first)
        found = train(options, stage, "second", steps, flags, second)
    largest = deviation(found, wanted)
    yield {"largest deviation": largest, "allowed": tolerance}
    require(largest <= tolerance, f"the losses deviate by {largest:.2g}, allowed {tolerance:.2g}")


def finite_curve(options, stage, steps, flags=""):
    """A training with the defaults of the machine (precision, compilation) logs finite losses."""
    values = train(options, stage, "defaults", steps, "--precision auto --compile", flags)
    yield {f"last {term}": float(series[-1]) for term, series in values.items()}
    for term, series in values.items():
        require(len(series) == steps, f"{len(series)} steps of {steps} are logged")
        require(np.isfinite(series).all(), f"{term} is not finite")


def resume(options, stage, flags=""):
    """A run that is resumed is the uninterrupted one bit for bit, on deterministic kernels."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    # SiT's latents are computed once for the three runs.
    flags += " --cache latents" if stage == "sit" else ""
    train(options, stage, "whole", 6, flags)
    train(options, stage, "again", 6, flags)
    train(options, stage, "parts", 3, flags)
    train(options, stage, "parts", 6, flags)
    whole = dict(tensors_in(load_checkpoint("whole", "cpu")))
    again = dict(tensors_in(load_checkpoint("again", "cpu")))
    parts = dict(tensors_in(load_checkpoint("parts", "cpu")))
    require(whole.keys() == again.keys() == parts.keys(), "other tensors")
    unrepeatable = sum(not torch.equal(whole[name], again[name]) for name in whole)
    differ = sum(not torch.equal(whole[name], parts[name]) for name in whole)
    yield {"tensors": len(whole), "differ when run twice": unrepeatable, "when resumed": differ}
    require(unrepeatable == 0, "two equal runs differ, so nothing can be said of resuming")
    require(differ == 0, f"{differ} of {len(whole)} tensors differ after resuming")


def passes_found(options):
    """--accum auto, where a pass with all pictures exceeds the memory that this process may use:
    the run has the losses of one that was given that number of passes."""
    flags = f"{WITHOUT_KINKS} --batch-size {8 if options.tiny else 256}"
    train(options, "vae", "unlimited", 1, flags, "--accum 1")
    limit = None
    if options.device == "cuda":
        # Activations take nearly all of it.
        limit = int(0.6 * torch.cuda.max_memory_allocated())
        total = torch.cuda.get_device_properties(0).total_memory
        free_memory(torch.device("cuda"))
        torch.cuda.set_per_process_memory_fraction(limit / total)
    with mock.patch.object(training, "memory_limit", lambda device: limit):
        found = train(options, "vae", "found", 3, flags)
    with open("found/config.json") as file:
        passes = json.load(file)["arguments"]["accum"]
    yield {"memory allowed, GB": (limit or 0) / 1e9, "passes": passes}
    require(passes > 1 or limit is None, "a limit of 0.6 times the memory of a pass was not met")
    given = train(options, "vae", "given", 3, flags, f"--accum {passes}")
    largest = deviation(found, given)
    yield {"largest deviation": largest}
    require(largest <= 1e-3, f"the losses deviate by {largest:.2g}")


def tensors_in(state, name=""):
    """Yields (name, tensor) for every tensor in nested dicts and lists."""
    if torch.is_tensor(state):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors_in(value, f"{name}/{key}")
    elif isinstance(state, (list, tuple)):
        for i, value in enumerate(state):
            yield from tensors_in(value, f"{name}/{i}")


def moved_run(options, tolerance):
    """A run of stage 1 that is resumed in the other memory format, or on the other device, gives
    the losses of one that was not moved."""
    formats = dict(contiguous=torch.contiguous_format, channels_last=torch.channels_last)
    here = options.device
    moves = [
        ((here, "channels_last"), (here, "contiguous")),
        ((here, "contiguous"), (here, "channels_last")),
        ((here, "channels_last"), ("cpu", "contiguous")),
        (("cpu", "contiguous"), (here, "channels_last")),
    ]

    def leg(out, steps, device, layout):
        def memory_format(*_, **__):
            return formats[layout]

        with without_tf32(), mock.patch.object(train_vae, "conv_memory_format", memory_format):
            return train(options, "vae", out, steps, WITHOUT_KINKS, f"--device {device}")

    wanted = leg("whole", 6, "cpu", "contiguous")
    for i, (first, second) in enumerate(moves):
        leg(f"moved{i}", 3, *first)
        found = leg(f"moved{i}", 6, *second)
        name = f"{' '.join(first)} to {' '.join(second)}"
        largest = deviation(found, wanted)
        yield {name: largest}
        require(largest <= tolerance, f"{name}: the losses deviate by {largest:.2g}")


def process_group(options, stage, tolerance, flags=""):
    """A group of one process, with the card's own backend: DistributedDataParallel and synchronised
    batch norm give the losses of a run without them."""
    with without_tf32():
        wanted = train(options, stage, "alone", 3, flags)
        backend = "nccl" if options.device == "cuda" else "gloo"
        store = dist.HashStore()
        if options.device == "cuda":
            torch.cuda.set_device(0)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        parallel = processes.parallel

        def parallel_nevertheless(module):
            """`parallel` leaves the module of a single process as it is, so it is told of two."""
            with mock.patch.object(processes, "world", lambda: 2):
                return parallel(module)

        with mock.patch.object(STAGES[stage], "parallel", parallel_nevertheless):
            found = train(options, stage, "grouped", 3, flags)
        dist.destroy_process_group()
    largest = deviation(found, wanted)
    yield {"backend": backend, "largest deviation": largest, "allowed": tolerance}
    require(largest <= tolerance, f"the losses deviate by {largest:.2g}")


def same_samples(options):
    """sample.py draws the pictures that it draws on the CPU."""
    words = ["--sit", options.path("sit"), "--num", 8, "--steps", 20, "--precision", "fp32"]
    words += ["--no-compile"]
    with without_tf32():
        run_script(sample, *words, "--device", "cpu", "--out", "cpu.npz")
        run_script(sample, *words, "--device", options.device, "--out", "card.npz")
    pictures = np.load("cpu.npz")["arr_0"].astype(int)
    difference = np.abs(np.load("card.npz")["arr_0"] - pictures)
    yield {"largest difference of 255": int(difference.max()), "mean": float(difference.mean())}
    require(pictures.std() > 1, "the pictures are blank")
    require(difference.max() <= 2 and difference.mean() < 0.05, "other pictures")


def compiled_samples(options):
    """sample.py draws the same pictures compiled, with guidance in a part of the steps and a small
    last batch. It compiles the SiT's block twice, the decoder's blocks once each, and nothing more
    for the later batches."""
    words = ["--sit", options.path("sit"), "--batch-size", 2, "--steps", 8, "--precision", "fp32"]
    words += ["--device", options.device]
    statistics = torch._dynamo.utils.counters["stats"]
    graphs = {}
    with without_tf32():
        run_script(sample, *words, "--num", 5, "--no-compile", "--out", "eager.npz")
        for count in (2, 5):
            torch.compiler.reset()
            before = statistics["unique_graphs"]
            run_script(sample, *words, "--num", count, "--compile", "--out", f"compiled{count}.npz")
            graphs[count] = statistics["unique_graphs"] - before
    pictures = np.load("eager.npz")["arr_0"].astype(int)
    difference = np.abs(np.load("compiled5.npz")["arr_0"] - pictures)
    yield {"graphs": graphs[5], "largest difference of 255": int(difference.max())}
    require(graphs[2] > 2, f"{graphs[2]} graphs were compiled")
    require(graphs[5] == graphs[2], f"{graphs[5]} graphs, of which the first batch {graphs[2]}")
    require(difference.max() <= 2 and difference.mean() < 0.05, "other pictures")


def norm_memory(options):
    """The VAE's group norms run in bf16: a training step of the decoder takes at most three
    quarters of the memory that it takes with PyTorch's own, which autocast on CUDA runs in fp32."""
    device = setup(options.device)
    spec, size = ("f4d4", 32) if options.tiny else ("f16d32", 256)
    vae = models.VAE(spec, size).to(device, memory_format=torch.channels_last)
    z = torch.zeros(4, vae.channels, vae.latent_size, vae.latent_size, device=device)

    def step():
        with processes.autocast(device, "bf16"):
            loss = vae.decode(z).square().mean()
        loss.backward()
        vae.zero_grad()

    sizes = []
    for forward in (models.GroupNorm.forward, torch.nn.GroupNorm.forward):
        with mock.patch.object(models.GroupNorm, "forward", forward):
            step()
            free_memory(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step()
            sizes.append(speed.peak_memory(device) / 1e9)
    yield {"in bf16, GB": sizes[0], "in fp32, GB": sizes[1]}
    # Autocast on a CPU makes no difference, and the peak there is that of the whole process.
    if device.type == "cuda":
        require(sizes[0] < 0.75 * sizes[1], f"{sizes[0]:.2f} GB of {sizes[1]:.2f} GB")


def same_fid(options):
    """fid.py measures what it measures on the CPU, on two sets of pictures and on
    reconstructions."""
    generation = [options.path("small/a"), "--ref", options.path("small/b")]
    reconstruction = ["--vae", options.path("vae"), "--data", options.path("small/a")]
    reconstruction += ["--lpips-weights", options.path("lpips.pth")]
    common = ["--inception-weights", options.path("inception.pth"), "--workers", 0]
    for kind, words, names in (
        ("generation", [*generation, "--size", 32], ("fid", "sfid", "precision", "recall")),
        ("reconstruction", reconstruction, ("rfid", "psnr", "ssim", "lpips")),
    ):
        results = []
        for device in ("cpu", options.device):
            out = f"{kind}-{len(results)}.json"
            # The statistics of a reference are kept here, whatever device they come from.
            shutil.rmtree("runs", ignore_errors=True)
            run_script(fid, *words, *common, "--device", device, "--out", out)
            with open(out) as file:
                results.append(json.load(file))
        for name in names:
            on_cpu, on_card = results[0][name], results[1][name]
            relative = abs(on_card - on_cpu) / max(abs(on_cpu), 1e-6)
            yield {name: on_card, f"{name}: deviation": relative}
            require(relative < 1e-3, f"{name} is {on_card:.6g}, on the CPU {on_cpu:.6g}")


def same_probe(options):
    """probe.py measures what it measures on the CPU."""
    words = ["--vae", options.path("vae"), "--data", options.path("objects"), "--workers", 0]
    words += ["--pictures", 0]
    results = []
    for device in ("cpu", options.device):
        out = f"probe-{len(results)}"
        run_script(probe, *words, "--device", device, "--out", out, "--cache", f"{out}-cache")
        with open(os.path.join(out, "result.json")) as file:
            results.append(json.load(file)["results"])
    [on_cpu], [on_card] = (result.values() for result in results)
    largest = 0.0
    for measure, columns in on_cpu.items():
        for column, value in columns.items():
            largest = max(
                largest, float(np.abs(np.subtract(on_card[measure][column], value)).max())
            )
    yield {"largest difference": largest, "measures": len(on_cpu)}
    require(largest < 0.01, f"a measure differs by {largest:.2g}")


# --------------------------------------------------------------------------------------------------
# Speed

# Stage 1 of the paper, and the small stand-ins of a rehearsal. LPIPS has no small form.
VAE = dict(spec="f16d32", size=256, terms=speed.TERMS)
TINY_VAE = dict(
    spec="f4d4",
    size=32,
    terms=("align", "recon", "kl", "gan"),
    vfm="test_vit",
    ch=32,
    ch_mult=[1, 1, 1],
    num_res_blocks=1,
)
TINY_SIT = dict(size="S", depth=2, width=64, heads=2)


def matrix_rates(options):
    """What square matrix products reach, and which card it is."""
    device = setup(options.device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        yield {"card": properties.name, "memory, GiB": memory, "cuda": torch.version.cuda}
    for precision in ("bf16", "fp32"):
        peak = speed.matrix_peak(speed.Setting(device, precision))
        yield {f"{precision}, TFLOP/s": peak / 1e12}


def timed(options, make, batch, arguments, compile=False, baseline=False, repeats=5):
    """The speed of a row of bench/speed.py."""
    begin = time.monotonic()
    device = speed.baseline_device(options.device) if baseline else setup(options.device)
    precision = "fp32" if baseline else "bf16"
    setting = speed.Setting(device, precision, compile, baseline)
    if options.tiny:
        batch, repeats = 2, min(repeats, 1)
    with speed.published(baseline):
        # Operations are proportional to the batch, and a small one fits any memory.
        step, pictures = make(setting._replace(compile=False), batch=2, **arguments)
        operations = speed.count_operations(step) / pictures
        # Said at once, so that a check that is cut off shows where its time went.
        yield {"batch": batch, "eager step of 2 after, s": time.monotonic() - begin}
        del step
        free_memory(device)
        try:
            step, pictures = make(setting, batch=batch, **arguments)
            yield {"first step, s": speed.seconds(setting, step)}
            times = time_steps(setting, step, repeats)
        except torch.OutOfMemoryError:
            yield {"fits the memory": False}
            return
        yield {"peak memory, GB": speed.peak_memory(device) / 1e9}
        rate = pictures / min(times)
        yield {"pictures/s": rate, "TFLOP/s": rate * operations / 1e12}


def time_steps(setting, step, repeats):
    # The second step is the first without initialisations.
    step()
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return [speed.seconds(setting, step) for _ in range(repeats)]


def free_memory(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def without_timing():
    """Inside, `setup` lets cuDNN choose algorithms by its rules, not by timing them."""
    use_own_gpu = processes.use_own_gpu

    def use_own_gpu_without_timing():
        name = use_own_gpu()
        torch.backends.cudnn.benchmark = False
        return name

    with mock.patch.object(processes, "use_own_gpu", use_own_gpu_without_timing):
        yield


def vae_speed(options, batch, layout=None, benchmark=True, **how):
    """Stage 1. layout: "contiguous" instead of channels_last; benchmark: cudnn.benchmark, which
    `setup` switches on."""
    arguments = TINY_VAE if options.tiny else VAE
    with contextlib.ExitStack() as stack:
        if not benchmark:
            stack.enter_context(without_timing())
        if layout == "contiguous":
            plain = speed.plain_memory_format
            stack.enter_context(mock.patch.object(train_vae, "conv_memory_format", plain))
        yield from timed(options, speed.vae_training, batch, arguments, **how)


def sit_speed(options, batch, spec, **how):
    """Stage 2 with DINOv2-B: SiT-XL/1 on latents of f16d32, XL/2 on those of f8d4."""
    arguments = dict(size="XL", repa=True, spec=spec, vfm=speed.DINO)
    if options.tiny:
        arguments.update(TINY_SIT, repa_block=1, vfm="test_vit")
    yield from timed(options, speed.sit_training, batch, arguments, **how)


def sampling_speed(options, batch, **how):
    """250 steps of the SDE sampler with guidance, of SiT-XL/1, without the decoder."""
    arguments = dict(size="XL", sampler="sde", steps=250, cfg=2.5)
    arguments.update(patch=1, channels=32, latent_size=16)
    if options.tiny:
        arguments.update(TINY_SIT)
    yield from timed(options, speed.sampling, batch, arguments, **how)


def decoding_speed(options, batch, **how):
    arguments = dict(spec="f4d4", size=32) if options.tiny else dict(spec="f16d32", size=256)
    yield from timed(options, speed.decoding, batch, arguments, **how)


def encoding(setting, spec, batch, size):
    """What the latent cache of train_sit.py does with pictures that are on the card."""
    vae = speed.frozen_vae(setting, spec, size)
    x = from_uint8(speed.random_pictures(batch, size, setting.device))

    @torch.no_grad()
    def step():
        return train_sit.encode_block(vae, x, setting.device, setting.precision)

    return step, batch


def caching_speed(options, batch, **how):
    arguments = dict(spec="f4d4", size=32) if options.tiny else dict(spec="f16d32", size=256)
    yield from timed(options, encoding, batch, arguments, **how)


def fid_speed(options, batch):
    """Inception's features, in fp32 without TF32, as fid.py takes them."""
    with without_tf32():
        yield from timed(options, speed.fid_features, batch, dict(size=256))


def loader_speed(options, workers):
    """Pictures a second from JPEG files to the card, decoded and cropped to 256 px."""
    device = setup(options.device)
    if options.tiny:
        workers = 1
    data = ImageSet(options.path("pictures"))
    batches = TrainingBatches(data, 8 if options.tiny else 64, seed=0, size=256)
    stream = load_batches(batches, range(4 * workers), workers, device)
    # Until the processes have started and each has given a batch.
    for _ in range(workers):
        next(stream)
    start = time.perf_counter()
    count = sum(len(batch["image"]) for batch in stream)
    if device.type == "cuda":
        torch.cuda.synchronize()
    yield {"pictures/s": count / (time.perf_counter() - start), "cores": available_cores()}


# --------------------------------------------------------------------------------------------------
# The list, the most important first


class Check(NamedTuple):
    name: str
    function: callable
    arguments: dict
    # Seconds after which its process is ended.
    limit: float
    # Speed is measured while nothing else runs; the other checks run some at a time.
    alone: bool = False


def correctness(name, function, limit, **arguments):
    return Check(name, function, arguments, limit)


def measurement(name, function, limit, **arguments):
    return Check(name, function, arguments, limit, alone=True)


def list_checks(options):
    checks = [
        Check("prepare", prepare, {}, 60, alone=True),
        measurement("matrix-products", matrix_rates, 30),
        *correctness_checks(steps=6 if options.tiny else 20),
        *speed_checks(),
    ]
    if options.tiny:
        # These differ from others in sizes, workers, a flag of cuDNN or compilation only. (The
        # operations of a compiled step are counted in an eager one.)
        repeated = {
            "vae-compiled",
            "vae-64",
            "vae-64-eager",
            "vae-32-no-benchmark",
            "sit-XL/1-32-eager",
            "sit-XL/2-32",
            "loaders-16",
            "decode",
        }
        checks = [check for check in checks if check.name not in repeated]
        # A rehearsal may share its cores with other work.
        checks = [check._replace(limit=5 * check.limit) for check in checks]
    return checks


def chosen(checks, names):
    """Those of the checks that --only names, by name or as one of the two parts, and "prepare"."""
    parts = {
        "correctness": [check.name for check in checks if not check.alone],
        "speed": [check.name for check in checks if check.alone],
    }
    wanted = {"prepare"}
    for name in names:
        wanted.update(parts.get(name, [name]))
    unknown = sorted(wanted - {check.name for check in checks})
    if unknown:
        known = [*parts, *[check.name for check in checks]]
        raise UserError(f"--only {' '.join(unknown)}: the checks are {', '.join(known)}")
    return [check for check in checks if check.name in wanted]


def correctness_checks(steps):
    cpu = "--device cpu"
    bf16 = "--precision bf16"
    compiled = "--compile"
    smooth = WITHOUT_KINKS
    curve = dict(steps=steps, tolerance=1e-3)
    all_losses = dict(steps=3, tolerance=1e-3)
    # On a CPU six steps in bf16 were within 0.4% of those in fp32.
    rough = dict(steps=steps, tolerance=0.05)
    check = correctness
    return [
        check("vae-defaults", finite_curve, 120, stage="vae", steps=3),
        check("draws", draws, 30),
        check("vae-fp32", same_curve, 60, stage="vae", flags=smooth, first=cpu, **curve),
        check("sit-fp32", same_curve, 60, stage="sit", first=cpu, **curve),
        check("vae-losses", same_curve, 60, stage="vae", first=cpu, **all_losses),
        check("sit-compiled", same_curve, 90, stage="sit", second=compiled, **curve),
        check("vae-compiled", same_curve, 120, stage="vae", flags=smooth, second=compiled, **curve),
        check("losses-compiled", same_curve, 120, stage="vae", second=compiled, **all_losses),
        check("vae-bf16", same_curve, 60, stage="vae", flags=smooth, second=bf16, **rough),
        check("sit-bf16", same_curve, 60, stage="sit", second=bf16, **rough),
        check("vae-passes", passes_found, 60),
        check("vae-resumed", resume, 60, stage="vae", flags="--lpips 0"),
        check("sit-resumed", resume, 60, stage="sit"),
        check("moved-run", moved_run, 60, tolerance=1e-3),
        check("vae-group", process_group, 60, stage="vae", flags="--lpips 0", tolerance=1e-3),
        check("sit-group", process_group, 60, stage="sit", tolerance=1e-3),
        check("sample", same_samples, 60),
        check("sample-compiled", compiled_samples, 120),
        check("norm-memory", norm_memory, 60),
        check("fid", same_fid, 60),
        check("probe", same_probe, 60),
    ]


def speed_checks():
    sit_XL_1 = dict(batch=32, spec="f16d32")
    sit_XL_2 = dict(batch=32, spec="f8d4")
    plain = dict(baseline=True, repeats=3)
    check = measurement
    return [
        check("vae-16-baseline", vae_speed, 60, batch=16, **plain),
        check("vae-32-eager", vae_speed, 90, batch=32),
        check("sampling-baseline", sampling_speed, 60, batch=64, **plain),
        check("loaders-16", loader_speed, 40, workers=16),
        check("cache", caching_speed, 60, batch=256),
        check("decode", decoding_speed, 60, batch=64),
        check("fid-features", fid_speed, 60, batch=64),
        # Minutes of compiling, so that they come after what takes seconds.
        check("vae-32", vae_speed, 240, batch=32, compile=True),
        check("sit-XL/1-32", sit_speed, 180, **sit_XL_1, compile=True),
        check("sampling", sampling_speed, 90, batch=64, compile=True),
        check("sit-XL/2-32", sit_speed, 180, **sit_XL_2, compile=True),
        check("loaders-8", loader_speed, 40, workers=8),
        check("vae-32-no-benchmark", vae_speed, 60, batch=32, benchmark=False),
        check("vae-32-contiguous", vae_speed, 60, batch=32, layout="contiguous"),
        check("sit-XL/1-32-eager", sit_speed, 60, **sit_XL_1),
        check("decode-compiled", decoding_speed, 90, batch=64, compile=True),
        check("vae-64", vae_speed, 240, batch=64, compile=True),
        check("vae-64-eager", vae_speed, 60, batch=64),
    ]


# --------------------------------------------------------------------------------------------------
# A check as a process

# Checks of correctness that run at the same time.
AT_ONCE = 3


def run_check(check, options, folder):
    """In a process of its own: runs a check in `folder`. Its numbers become lines of numbers.jsonl
    there, all else that it prints goes to output.txt. The exit code is 1 if it failed."""
    # A process group, so that its loaders and compilers end with it.
    os.setsid()
    os.chdir(folder)
    output = os.open("output.txt", os.O_CREAT | os.O_WRONLY, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(max(1, available_cores() // (1 if check.alone else AT_ONCE)))
    if options.device == "cpu":
        # Compiling for a CPU takes minutes. A rehearsal needs no more than the tracing.
        torch.compile = functools.partial(torch.compile, backend="eager")
    code = 0
    with open("numbers.jsonl", "w") as file:
        try:
            for numbers in check.function(options, **check.arguments):
                file.write(json.dumps(numbers) + "\n")
                file.flush()
        except Exception as error:
            traceback.print_exc()
            kind = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
            line = " ".join(str(error).split())[:300]
            file.write(json.dumps({"error": kind + line}) + "\n")
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of process groups and compilers may never end.
    os._exit(code)


class Running:
    """A check whose process has been started."""

    def __init__(self, check, options, context, folder):
        self.check = check
        self.folder = os.path.join(folder, check.name.replace("/", "-"))
        os.makedirs(self.folder)
        self.begin = time.monotonic()
        self.process = context.Process(target=run_check, args=(check, options, self.folder))
        self.process.start()

    def seconds(self):
        return time.monotonic() - self.begin

    def is_over(self):
        return not self.process.is_alive() or self.seconds() > self.check.limit

    def end(self, cut_off=None):
        """Its part of the record. A process that still runs is ended. cut_off: why, if that is not
        its own limit."""
        error = None
        if self.process.is_alive():
            error = cut_off or f"not done after {self.check.limit:g} seconds"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            # If it had no process group yet.
            self.process.kill()
        self.process.join()
        numbers = self._numbers()
        error = error or numbers.pop("error", None)
        if error is None and self.process.exitcode != 0:
            error = f"the process ended with code {self.process.exitcode}"
        result = dict(
            name=self.check.name,
            passed=error is None,
            seconds=round(self.seconds(), 1),
            numbers=numbers,
        )
        if error is not None:
            result["error"] = error
            result["output"] = self._last_output()
        return result

    def _numbers(self):
        numbers = {}
        with contextlib.suppress(FileNotFoundError), open(f"{self.folder}/numbers.jsonl") as file:
            for line in file:
                # The last line of a process that was killed may be cut.
                with contextlib.suppress(json.JSONDecodeError):
                    numbers.update(json.loads(line))
        return numbers

    def _last_output(self):
        path = f"{self.folder}/output.txt"
        if not os.path.exists(path):
            return ""
        with open(path, errors="replace") as file:
            return file.read()[-4000:]


def process_context():
    """How processes are started: forked, which spares each the seconds of imports. If an import has
    asked for CUDA, a forked process could not use it, so that each must begin anew."""
    fork = multiprocessing.get_context("fork")
    trial = fork.Process(target=exit_with_1_in_bad_fork)
    trial.start()
    trial.join()
    return fork if trial.exitcode == 0 else multiprocessing.get_context("spawn")


def exit_with_1_in_bad_fork():
    os._exit(int(torch.cuda._is_in_bad_fork()))


def run_checks(checks, options, folder, total_limit, done):
    """Runs the checks in their order, within total_limit seconds, and calls done(result) for each.
    The first one makes what is in options.shared."""
    end = time.monotonic() + total_limit
    context = process_context()
    waiting = list(checks)
    running = []
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and may_start(waiting[0], [active.check for active in running]):
                running.append(Running(waiting.pop(0), options, context, folder))
            time.sleep(0.05)
            for active in list(running):
                if active.is_over():
                    running.remove(active)
                    done(active.end())
    finally:
        # Also after Ctrl-C: these processes have sessions of their own.
        for active in running:
            done(active.end(f"cut off by the limit of {total_limit:g} seconds for all"))
    for check in waiting:
        done(dict(name=check.name, passed=None, seconds=0, numbers={}, error="not run: no time"))


def may_start(check, running):
    if check.alone or any(other.alone for other in running):
        return not running
    return len(running) < AT_ONCE


# --------------------------------------------------------------------------------------------------
# The record


def line_of(result, peak):
    """A result as a line for the terminal. peak: the measured rate of bf16 products, or None."""
    word = {True: "PASS", False: "FAIL", None: "----"}[result["passed"]]
    numbers = dict(result["numbers"])
    if peak and "TFLOP/s" in numbers:
        numbers["of bf16 peak"] = numbers["TFLOP/s"] / peak
    words = [f"{name} {shown(value)}" for name, value in numbers.items()]
    if "error" in result:
        words.append(result["error"])
    return f"{word} {result['name']:20} {result['seconds']:5.1f} s  {'; '.join(words)}"


def shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def numbers_of(record, name):
    """The numbers of a check, {} if there are none."""
    for result in record["checks"]:
        if result["name"] == name:
            return result["numbers"]
    return {}


def aims(record):
    """What the speed should be and what it is, a list of sentences."""
    peak = numbers_of(record, "matrix-products").get("bf16, TFLOP/s")
    sentences = []

    def compare(text, aim, name, key, denominator):
        value = numbers_of(record, name).get(key)
        if value and denominator:
            sentences.append(f"{text}: {value / denominator:.2f} (aim: {aim})")

    compare("SiT-XL/1 step, share of the bf16 peak", 0.45, "sit-XL/1-32", "TFLOP/s", peak)
    compare("SiT-XL/2 step, share of the bf16 peak", 0.45, "sit-XL/2-32", "TFLOP/s", peak)
    baseline = numbers_of(record, "vae-16-baseline").get("pictures/s")
    compare("VAE step, times the eager TF32 baseline", 1.5, "vae-32", "pictures/s", baseline)
    baseline = numbers_of(record, "sampling-baseline").get("pictures/s")
    compare("sampling, times the eager TF32 baseline", 3, "sampling", "pictures/s", baseline)
    trained = numbers_of(record, "vae-32").get("pictures/s")
    compare("16 loaders, times the VAE step's rate", 1, "loaders-16", "pictures/s", trained)
    return sentences


def markdown(record, command):
    """The record as lines for BENCHMARKS.md."""
    card = numbers_of(record, "matrix-products").get("card", "no card: a rehearsal on a CPU")
    rates = numbers_of(record, "matrix-products")
    passed = [result["name"] for result in record["checks"] if result["passed"]]
    failed = [result for result in record["checks"] if not result["passed"]]
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    lines = [f"## {time.strftime('%Y-%m-%d')}, {card}", ""]
    lines += [f"`{command}`; {versions}; commit {record['provenance']['commit']}.", ""]
    lines += [f"Passed: {', '.join(passed)}."]
    if failed:
        lines += ["", *[f"- {result['name']}: {result['error']}" for result in failed]]
    for precision in ("bf16", "fp32"):
        rate = rates.get(f"{precision}, TFLOP/s")
        if rate:
            lines += ["", f"Square matrix products reach {rate:.1f} TFLOP/s in {precision}"]
            lines[-1] += " (TF32 on a card)." if precision == "fp32" else "."
    lines += ["", "| check | batch | pictures/s | TFLOP/s | of bf16 peak | peak memory, GB |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for result in record["checks"]:
        numbers = result["numbers"]
        if "pictures/s" in numbers:
            lines.append(table_row(result["name"], numbers, rates.get("bf16, TFLOP/s")))
    lines += ["", *[f"- {sentence}" for sentence in aims(record)]]
    return lines


def table_row(name, numbers, peak):
    flop = numbers.get("TFLOP/s", 0)
    share = f"{flop / peak:.0%}" if flop and peak else ""
    memory = numbers.get("peak memory, GB")
    cells = [
        name,
        numbers.get("batch", ""),
        shown(numbers["pictures/s"]),
        f"{flop:.1f}" if flop else "",
        share,
        "" if memory is None else f"{memory:.1f}",
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


# --------------------------------------------------------------------------------------------------


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks: a rehearsal")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these checks, or a part")
    parser.add_argument("--list", action="store_true", help="print the names of the checks")
    parser.add_argument("--limit", type=float, default=450, help="seconds for everything")
    parser.add_argument("--write", action="store_true", help="append to BENCHMARKS.md")
    return parser.parse_args(argv)


def main():
    args = parse_arguments()
    # As Ctrl-C, so that the processes of the checks are ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = os.path.abspath(os.environ.get("OUT") or "runs/gpu")
    record = dict(arguments=vars(args), checks=[])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = Options(args.device, args.tiny, os.path.join(folder, "shared"))
        os.mkdir(options.shared)
        checks = list_checks(options)
        names = [check.name for check in checks]
        if args.list:
            print("\n".join(names))
            return
        if args.only:
            checks = chosen(checks, args.only)

        def done(result):
            record["checks"].append(result)
            peak = numbers_of(record, "matrix-products").get("bf16, TFLOP/s")
            print(line_of(result, peak), flush=True)
            write_json(os.path.join(out, "gpu.json"), record)

        run_checks(checks, options, folder, args.limit, done)
    # Only now, since it asks for CUDA.
    record["provenance"] = provenance()
    record["aims"] = aims(record)
    write_json(os.path.join(out, "gpu.json"), record)
    print("\n".join(record["aims"]))
    if args.write:
        speed.append_to_benchmarks(
            markdown(record, " ".join(["python -m bench.gpu", *sys.argv[1:]]))
        )
    failed = [result["name"] for result in record["checks"] if not result["passed"]]
    if failed:
        raise UserError(f"failed or not run: {', '.join(failed)}; see {out}/gpu.json")
    print(f"all {len(checks)} checks passed: {out}/gpu.json")


if __name__ == "__main__":
    run_main(main)
