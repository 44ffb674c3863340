"""The plumbing every stage shares: errors, process group, random draws, image folders, checkpoints, run log, pictures.

Randomness: every draw is a pure function of (seed, name of the draw, position of the sample in the run's endless
stream of samples), computed on the device it is needed on. Nothing depends on the number of processes, the batch
split, or on what was drawn before; hence there is no generator state to save.
"""
import argparse
import contextlib
import ctypes
import datetime
import errno
import faulthandler
import fcntl
import functools
import glob
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from models import UserError, content_hash, first_line, intact, reading, state_hash


def run(main):
    """Calls a script's main(); what a user can mend becomes one sentence on stderr and exit code 2, Ctrl-C code 130."""
    try:
        main()
    except (UserError, KeyboardInterrupt, RuntimeError, OSError) as error:
        if isinstance(error, UserError):
            text = f"error: {error}"
        elif isinstance(error, KeyboardInterrupt):
            text = "interrupted; the same command goes on from what is saved"
        elif isinstance(error, torch.OutOfMemoryError):
            text = f"error: {str(error).split('. ')[0]}; lower --batch-size, raise --accum, or try --grad-checkpoint"
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            text = f"error: {error.strerror}{f': {error.filename}' * bool(error.filename)}; make room and give the same command again"
        elif isinstance(error, dist.DistError) or world() > 1 and "gloo" in str(error):
            text = f"error: process {rank()} lost {missing()}, which died or hangs; see the messages above and below"
        else:
            raise
        print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr, flush=True)
        for thread in threading.enumerate():                # other threads, such as a compiler's pool, may never end
            if thread.name == "saver":
                thread.join()
        code = 130 if isinstance(error, KeyboardInterrupt) else 2
        os._exit(code) if dist.is_initialized() else sys.exit(code)        # other ranks may wait in a collective: do not join them
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)                                         # a gloo thread that meets the interpreter's end aborts the process


# ----------------------------------------------------------------------------------------------------------------------
# Process group, device, precision

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words):
    """print, on the first process only."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)).encode(errors="backslashreplace").decode())       # of names that are not UTF-8
        sys.stdout.flush()


def barrier():
    if world() > 1:
        dist.barrier()


def setup(device=None, timeout=1800):
    """Joins the process group torchrun describes (a world of one without it) -> torch.device of this process. A process
    that waits for the others for more than `timeout` seconds gives up."""
    with contextlib.suppress(OSError, AttributeError):      # glibc only: keep big tensors' pages between steps, see
        libc = ctypes.CDLL(None)                            # mallopt(3): M_MMAP_MAX = 0, M_TRIM_THRESHOLD, M_TOP_PAD
        libc.mallopt(-4, 0), libc.mallopt(-1, 2 ** 31 - 1), libc.mallopt(-2, 64 * 2 ** 20)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"local rank {local} has no GPU: {torch.cuda.device_count()} visible; "
                            "lower --nproc_per_node or pass --device cpu")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        timeout = datetime.timedelta(seconds=timeout)
        store, number, count = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timeout, rank=number, world_size=count,
                                store=this_start(store, number, count))
    return torch.device(device)


def this_start(store, number, count):
    """What only the processes of this start share of torchrun's store. It outlives them: after a restart (--max-restarts) it still
    holds the addresses of the dead, and its count of restarts differs between nodes. So all agree on everybody's new name."""
    names, seen = [f"name {i}" for i in range(count)], [f"seen {i}" for i in range(count)]
    store.set(names[number], uuid.uuid4().hex)
    while True:
        everybody = b" ".join(store.multi_get(names))
        store.set(seen[number], everybody)
        if set(store.multi_get(seen)) == {everybody}:
            return dist.PrefixStore(hashlib.sha256(everybody).hexdigest(), store)
        time.sleep(0.1)


def resolve_precision(precision, device):
    """'auto' -> bf16 where the hardware multiplies bf16 matrices (a GPU, a CPU with AMX or AVX512-BF16), else fp32:
    without such units oneDNN emulates bf16, hundreds of times slower than fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"          # the last knows ONEDNN_MAX_CPU_ISA


def autocast(device, precision):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def natural(text, least=0):
    """A flag's whole number."""
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return int(text)


def positive(text):
    return natural(text, least=1)


def parse(parser, argv=None):
    """The arguments; --help names the default of every flag that has one."""
    for action in parser._actions:
        if not any(action.default is value for value in (None, False, argparse.SUPPRESS)) and "default" not in (action.help or ""):
            action.help = f"{action.help or ''} (default: %(default)s)".strip()
    return parser.parse_args(argv)


def add_run_arguments(parser):
    """The flags that mean the same in every stage."""
    group = parser.add_argument_group("machine")
    group.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto",
                       help="autocast type; auto: bf16 where the hardware has bf16 matrix products, else fp32")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    group.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    group.add_argument("--timeout", type=float, default=1800, help="seconds until a process gives up waiting for the others")
    group.add_argument("--workers", type=natural, help="loader processes per process (default: its share of the cores, up to 8)")
    group.add_argument("--seed", type=natural, default=0)


def add_training_arguments(parser, out, batch_size, epochs, lr, ema, log_every, sample_every, save_every, fid, fid_ref):
    """The flags that mean the same in both training stages."""
    g = parser.add_argument_group("pictures and vision model")
    g.add_argument("--data", default="data/imagenet/train", help="folder of <class>/<picture>")
    g.add_argument("--check-data", action="store_true", help="decode every picture before training, once for each list of files")
    g.add_argument("--skip-bad", action="store_true", help="another picture of the class for one that cannot be read; else an error")
    g.add_argument("--vfm", default="vit_base_patch14_dinov2.lvd142m", help="any timm model")
    g.add_argument("--vfm-weights", help="local file of its weights (default: timm's, from the hub)")
    g.add_argument("--vfm-stride", type=int, help="for a CNN: stride of the feature map (default: its last)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--batch-size", type=positive, default=batch_size, help="global, pictures a step")
    g.add_argument("--accum", type=positive, default=1, help="forward passes a step; a batch norm sees one at a time")
    g.add_argument("--epochs", type=float, default=epochs)
    g.add_argument("--steps", type=positive, help="instead of --epochs")
    g.add_argument("--lr", type=float, default=lr)
    g.add_argument("--lr-schedule", choices=["constant", "cosine"], default="constant")
    g.add_argument("--warmup", type=natural, default=0, help="steps")
    g.add_argument("--clip", type=float, default=1.0, help="gradient norm")
    g.add_argument("--ema", type=float, default=ema, help="decay of the weights that are published; 0: the raw ones")
    g.add_argument("--grad-checkpoint", action="store_true", help="less memory, about a third more time")
    g = parser.add_argument_group("run")
    g.add_argument("--out", default=out)
    g.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a run")
    g.add_argument("--resume", action="store_true", help="fail if there is nothing to resume (resuming is the default)")
    g.add_argument("--log-every", type=positive, default=log_every, help="steps")
    g.add_argument("--sample-every", type=positive, default=sample_every, help="steps between pictures in samples/")
    g.add_argument("--save-every", type=positive, default=save_every, help="steps between checkpoints; the last two are kept")
    g.add_argument("--keep-every", type=natural, default=0, help="steps between checkpoints that stay for good; 0: none")
    g.add_argument("--max-bad-steps", type=natural, default=10, help="stop after more steps in a row whose loss is not finite")
    g = parser.add_argument_group(f"{fid} during training")
    g.add_argument("--fid-every", type=natural, default=0, help="steps; 0: never")
    g.add_argument("--fid-num", type=positive, default=5000, help="pictures; few pictures give a higher FID than 50,000")
    g.add_argument("--fid-ref", help=f"reference as for fid.py (default: {fid_ref})")
    g.add_argument("--inception-weights", help="local file (default: downloaded once)")
    add_run_arguments(parser)


# Of these, the flags that may change between a run and its resumption
FREE = {"check_data", "skip_bad", "vfm_weights", "accum", "epochs", "steps", "grad_checkpoint", "out", "overwrite", "resume",
        "log_every", "sample_every", "save_every", "keep_every", "max_bad_steps", "fid_every", "fid_num", "fid_ref",
        "inception_weights", "compile", "device", "timeout", "workers"}


def share_batch(batch_size, accum):
    """Global batch -> pictures per process and forward pass."""
    if batch_size % (world() * accum):
        raise UserError(f"--batch-size {batch_size} is not divisible by {world()} processes x --accum {accum}")
    return batch_size // (world() * accum)


def gather_sum(values):
    """Sum over the processes of a tensor, in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def gather_mean(values):
    return gather_sum(values).div_(world())


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes. torch's own takes no CPU tensors, and both must give one curve."""

    # Compiled by torch 2.11, the gradient of the layer before this one was 11% off, without a word.
    @torch.compiler.disable
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        xf = x.float()
        n = xf.numel() // xf.shape[1] * world()
        mean = torch.distributed.nn.functional.all_reduce(xf.sum((0, 2, 3))) / n      # differentiable
        xf = xf - mean[:, None, None]
        var = torch.distributed.nn.functional.all_reduce(xf.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        x = xf * torch.rsqrt(var + self.eps)[:, None, None]
        return x * self.weight[:, None, None] + self.bias[:, None, None] if self.affine else x


def parallel(module):
    """A module (or what torch.compile made of it) that several processes train together, each on its share of a batch."""
    if world() == 1:
        return module
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = SyncBatchNorm
    return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def sync_gradients(model, on):
    """Context of a forward and backward pass: gradients are averaged over the processes only when `on`."""
    return contextlib.nullcontext() if on or world() == 1 else model.no_sync()


def learning_rate(args, step, total):
    """--lr after --warmup steps, and with --lr-schedule cosine down to 0 at the end."""
    rate = args.lr * min(1.0, (step + 1) / max(args.warmup, 1))        # a Python float: checkpoints hold no NumPy scalars
    return rate * 0.5 * (1 + math.cos(math.pi * step / total)) if args.lr_schedule == "cosine" else rate


class Guard:
    """Steps an optimiser; a step whose losses or gradient norms (one a group of parameters) are not finite changes neither
    weights nor the statistics of batch norms. It is counted on the device: nothing waits for it."""

    def __init__(self, module, optimizer, limit):
        self.optimizer, self.limit = optimizer, limit
        self.statistics = [b for m in module.modules() if isinstance(m, nn.BatchNorm2d) for b in (m.running_mean, m.running_var)]
        self.good = [b.clone() for b in self.statistics]
        self.row = self.most = self.last = torch.zeros((), device=optimizer.param_groups[0]["params"][0].device)

    def step(self, losses, step):
        """Clips the gradient norms, steps and clears; losses (n,) -> the first group's norm before clipping, a tensor.
        finite: whether the step counts; row, most: bad steps in a row until now, and ever; last: number, losses and norm of
        the last bad one."""
        norms = torch.stack([nn.utils.clip_grad_norm_(group["params"], self.limit).to(losses)
                             for group in self.optimizer.param_groups])
        finite = torch.isfinite(torch.cat([losses, norms])).all().float()
        if world() > 1:                                     # a loss is not finite on one process: all must skip the step
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        self.optimizer.found_inf = 1 - finite               # read by the fused kernels, as torch.amp.GradScaler sets it
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.finite = finite.bool()
        for statistic, good in zip(self.statistics, self.good):
            good.copy_(torch.where(self.finite, statistic, good))
            statistic.copy_(good)
        self.row = (self.row + 1) * (1 - finite)
        self.most = torch.maximum(self.most, self.row)
        self.last = torch.where(self.finite, self.last, torch.cat([losses.new_full((1,), step), losses, norms[:1]]))
        return norms[0]

    def look(self, args, names, final):
        """Whether the last step was bad. Raises if more than --max-bad-steps in a row ever were, or the `final` step was."""
        row, most = int(self.row), int(self.most)
        if most > args.max_bad_steps or final and row:
            step, *values = self.last.tolist()
            terms = [k for k, v in zip(names, values) if not math.isfinite(v)] or ["on another process"]
            good = (list_checkpoints(args.out) or ["none yet"])[-1]
            raise UserError(f"{most if most > args.max_bad_steps else row} steps in a row, the last one {step:.0f}, were not finite "
                            f"({', '.join(terms)}) and did not enter the weights; the last good checkpoint is {good}; lower --lr, "
                            "or try --precision fp32")
        return row > 0


class Watch:
    """Watches over a training run's processes: SIGTERM or SIGUSR1 to any of them ends the run after the step, on all
    together; one that hangs for longer than --timeout prints its stack and ends."""

    def __init__(self, timeout):
        self.asked = self.stop = False
        self.timeout, self.group = timeout, None

        def note(number, frame):
            self.asked = True
        at_signal(note)
        if world() > 1:                                     # on CPU tensors: a GPU need not be waited for
            self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))

    def begin_step(self):
        if self.group is not None:                          # later than the others' own time-out, which names this process
            faulthandler.dump_traceback_later(self.timeout + 5, exit=True)

    def end_step(self):
        """When a step's work is given out, before its results are waited for. stop: whether any process was asked to."""
        asked = torch.tensor(int(self.asked))
        if self.group is not None:
            faulthandler.cancel_dump_traceback_later()
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
        self.stop = bool(asked)


def missing():
    """Words on the processes that do not say, within some seconds, that they wait for others too."""
    store, silent = dist.distributed_c10d._get_default_store(), []
    with contextlib.suppress(RuntimeError):                 # the store went with the first process
        store.set(f"process {rank()} waits", "1")
        time.sleep(3)
        silent = [str(r) for r in range(world()) if not store.check([f"process {r} waits"])]
    return f"process {', '.join(silent)}" if silent else "the others"


def at_signal(function):
    """A scheduler's SIGTERM or SIGUSR1 to this process calls function(number, frame)."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, function)


def stop_at_signal():
    """For work in blocks that are kept when done: a scheduler's signal ends the process at once, with exit code 0."""
    def leave(number, frame):
        print(f"stopped by {signal.Signals(number).name}; the same command goes on with what is left", flush=True)
        sys.exit(0)
    at_signal(leave)


# ----------------------------------------------------------------------------------------------------------------------
# Random draws: SplitMix64 (Steele et al. 2014) as a counter-based generator on int64 tensors

def _mix(x):
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, None)):
        x = x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))                  # >> on int64 is arithmetic: mask the sign
        x = x if factor is None else x * factor
    return x


def random_bits(seed, name, ids, n):
    """64 random bits as int64 (B,n) for sample ids (B,), a function of (seed, name, id, column)."""
    golden = -0x61C8864680B583EB                                            # 2^64 / golden ratio, odd
    start = (seed * 0x10001 + zlib.crc32(name.encode())) % 2 ** 62
    key = _mix(_mix(ids.long() * golden + start) + zlib.crc32(name.encode()))
    return _mix(key[:, None] + golden * torch.arange(1, n + 1, device=ids.device))


def uniform(seed, name, ids):
    """(B,) uniform in (0,1), 24 bits."""
    return ((random_bits(seed, name, ids, 1)[:, 0] >> 40 & 0xFFFFFF).float() + 0.5) / 2 ** 24


def normal(seed, name, ids, shape):
    """(B,*shape) standard normal, float32, by Box and Muller's transform."""
    count = int(np.prod(shape))
    bits = random_bits(seed, name, ids, (count + 1) // 2)
    radius = (-2 * (((bits >> 32 & 0xFFFFFFFF).float() + 0.5) / 2 ** 32).clamp(max=1 - 2 ** -24).log()).sqrt()
    angle = (bits & 0xFFFFFFFF).float() * (2 * np.pi / 2 ** 32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count].view(len(ids), *shape)


# ----------------------------------------------------------------------------------------------------------------------
# Image folders

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


def to_rgb(image):
    """Any PIL image -> RGB. Alpha is dropped, as ADM's loader does; 16-bit greys are scaled, which PIL would clip."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def adm_crop(image, size):
    """RGB PIL image -> uint8 (size,size,3): halve with a box filter while the short side is at least 2*size, resize it
    to size (bicubic), cut the centre. The preprocessing of ADM (Dhariwal and Nichol 2021), hence of every FID."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")        # whatever the name says; others may run programs


def open_picture(path):
    """-> PIL image, its pixels not read yet. Decompression bombs, and strips that resizing would make one, are refused."""
    image = Image.open(path, formats=FORMATS)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS or max(image.size) > 100 * min(image.size):
        image.close()
        raise ValueError(f"{image.width}x{image.height} pixels: more than {Image.MAX_IMAGE_PIXELS}, or a side 100 times the other")
    return image


def load_image(path, size):
    """File -> uint8 (size,size,3). EXIF rotation is ignored, as ADM does; of an animation the first frame is taken."""
    try:
        with open_picture(path) as image:
            return adm_crop(to_rgb(image), size)
    except Exception as error:                              # Pillow's decoders raise a dozen types
        raise UserError(f"cannot read the picture {os.fsdecode(path)!r}: {first_line(error)}") from None


def check_picture(path, decode=False):
    """Cheap test of one file: its header is read and its end must be there; or all of it. -> width, height, or what is wrong."""
    try:
        if not os.path.isfile(path):
            return "it is a broken link" if os.path.islink(path) else "it is no file"
        with open_picture(path) as image:
            if image.mode == "F":
                return "floating-point pixels have no known range"
            size = image.size
            if image.format in ("JPEG", "MPO"):             # without its mark at the end it is cut, or followed by other data
                image.fp.seek(-min(os.path.getsize(path), 1024), os.SEEK_END)
                decode = decode or b"\xff\xd9" not in image.fp.read()
            image.verify()                                  # a PNG's checksums, to its end
        if decode:
            with open_picture(path) as image:
                image.load()
        return size
    except Exception as error:
        return first_line(error)


class ImageSet:
    """A folder of pictures in ImageNet's layout, root/<class>/<picture>, or with all pictures in root (one class).

    names: bytes (N,) relative to root, sorted; labels int64 (N,); classes: list of folder names, sorted; fingerprint:
    hash of the names and sizes of the files. Listing and checking happen once: the result is kept under runs/cache and
    used again while no folder's modification time changes. `check_data`: the check decodes every picture in full.
    `skip_bad`: another one stands in for a picture that cannot be read, else it is an error."""

    def __init__(self, root, check_data=False, skip_bad=False):
        self.root, self.check_data, self.skip_bad = os.path.abspath(root), check_data, skip_bad
        if not os.path.isdir(root):
            raise UserError(f"{root}: no such folder; name one with --data, laid out as <class>/<picture> "
                            "(`python demo.py` makes a small one under runs/demo)")
        name = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        self.cache = os.path.join("runs", "cache", f"files-{name}.npz")
        if rank() == 0 and not self.read_cache():
            self.scan()
        barrier()
        if rank() != 0 and not self.read_cache():
            self.scan()                                     # the cache could not be written
        if self.bad:
            say(f"note: {len(self.bad)} of {len(self)} pictures cannot be read and others of their class take their places, the "
                f"first for {self.path(min(self.bad))!r}")

    def read_cache(self):
        """Whether there is a list that still holds; then it is read."""
        try:
            with open_npz(self.cache) as file:
                header = json.loads(str(file["header"]))
                self.names, self.labels, self.bad = file["names"], file["labels"], set(file["bad"].tolist())
            self.classes, self.fingerprint, self.smallest = (header[k] for k in ("classes", "fingerprint", "smallest"))
            sound = (self.labels.shape == self.names.shape == (len(self.names),) and self.labels.dtype == np.int64
                     and self.names.dtype.kind == "S" and set(self.labels.tolist()) == set(range(len(self.classes))))
            fresh = all(os.stat(os.path.join(self.root, d)).st_mtime_ns == t for d, t in header["folders"].items())
            return sound and fresh and header["decoded"] >= self.check_data and (self.skip_bad or not self.bad)
        except Exception:                                   # absent, damaged, or of another version: made again
            return False

    def scan(self):
        """Lists the files, checks them, and keeps the result."""
        def unreadable(error):
            raise UserError(f"cannot list {error.filename!r}: {error.strerror}")
        folders, files = {}, []                             # every folder below root -> its modification time
        for folder, _, names in os.walk(self.root, followlinks=True, onerror=unreadable):
            if os.path.islink(folder) and f"{os.path.realpath(os.path.dirname(folder))}/".startswith(f"{os.path.realpath(folder)}/"):
                raise UserError(f"{folder!r} is a link to a folder that it is in itself; remove it")
            relative = os.path.relpath(folder, self.root)
            folders[relative] = os.stat(folder).st_mtime_ns
            files += [os.path.normpath(os.path.join(relative, f)) for f in names if f.lower().endswith(IMAGE_TYPES)]
        files.sort()
        subfolders = sorted(d for d in folders if d != "." and os.sep not in d)
        if not files:
            raise UserError(f"{self.root} has no pictures ({' '.join(IMAGE_TYPES)})")
        if set(subfolders) & {"train", "val", "test"} and len(subfolders) <= 3:
            raise UserError(f"{self.root} holds the folders {', '.join(subfolders)}: name one of them, such as "
                            f"{os.path.join(self.root, subfolders[-1])}")
        of = [f.split(os.sep, 1)[0] if os.sep in f else "." for f in files]
        empty = sorted(set(subfolders) - set(of))
        if empty:
            raise UserError(f"{len(empty)} class folder{'s' if empty[1:] else ''} without pictures, the first is "
                            f"{os.path.join(self.root, empty[0])!r}; fill or remove it")
        self.classes, self.labels = np.unique(of, return_inverse=True)
        self.classes, self.names = self.classes.tolist(), np.array([os.fsencode(f) for f in files])
        paths = [os.path.join(self.root, f) for f in files]
        check = functools.partial(check_picture, decode=self.check_data)
        executor = ProcessPoolExecutor if len(paths) > 5000 else ThreadPoolExecutor        # processes take a while to begin
        with executor(min(16, cores())) as pool:
            found = list(tqdm(pool.map(check, paths, chunksize=100), "checking pictures", len(paths), disable=len(paths) < 5000,
                              leave=False))
        self.bad = {i for i, size in enumerate(found) if isinstance(size, str)}
        lost = sorted(set(of) - {name for i, name in enumerate(of) if i not in self.bad})
        if self.bad and (lost or not self.skip_bad):
            first = min(self.bad)
            raise UserError(f"{len(self.bad)} picture{'s' * (len(self.bad) > 1)} cannot be read, the first is {paths[first]!r}: "
                            f"{found[first]}; mend or remove it" + (f", {lost[0]!r} has no other" if lost else
                                                                    " (training takes another instead with --skip-bad)"))
        self.smallest = min(min(size) for size in found if not isinstance(size, str))
        lines = [f"{f} {os.path.getsize(p) if os.path.isfile(p) else -1}" for f, p in zip(files, paths)]
        self.fingerprint = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]
        header = dict(folders=folders, classes=self.classes, fingerprint=self.fingerprint, smallest=self.smallest,
                      decoded=self.check_data)
        with going_on(self.cache), writing(self.cache) as file:
            np.savez(file, header=np.array(json.dumps(header)), names=self.names, labels=self.labels,
                     bad=np.array(sorted(self.bad), np.int64))

    def __len__(self):
        return len(self.names)

    def path(self, i):
        return os.path.join(self.root, os.fsdecode(self.names[i]))

    def load(self, i, size):
        """-> uint8 (size,size,3) of picture i or, with skip_bad, of the next one of its class that can be read: a function of i
        alone, the same on every process."""
        j = i
        while True:
            try:
                if j not in self.bad:
                    return load_image(self.path(j), size)
            except UserError as error:
                if not self.skip_bad:
                    raise
                self.bad.add(j)
                print(f"warning: {error}; another one of its class takes its place ({len(self.bad)} so far)", file=sys.stderr,
                      flush=True)
            same = [k for k in np.flatnonzero(self.labels == self.labels[i]) if k not in self.bad]
            if not same:
                raise UserError(f"no picture of {os.path.join(self.root, self.classes[self.labels[i]])!r} can be read any more")
            j = same[np.searchsorted(same, i) % len(same)]

    def stack(self, index, size):
        """Indices -> uint8 (b,3,size,size)."""
        return torch.from_numpy(np.stack([self.load(i, size) for i in index])).permute(0, 3, 1, 2)


@functools.lru_cache(2)
def epoch_order(seed, epoch, count):
    return np.random.default_rng([seed, epoch]).permutation(count)


class Batches(torch.utils.data.Dataset):
    """Item k is what this process sees in step k of the run: positions in the endless stream of samples, and the
    pictures there. Position p is picture epoch_order(p // N)[p % N]; a batch may span two epochs.

    Item: dict(position, index, flip, label: int64 (b,), image: uint8 (b,3,size,size) if `size`, and the arrays that
    `extra(index, flip)` adds)."""

    def __init__(self, data, batch_size, seed, size=None, flip=True, extra=None):
        self.data, self.batch_size, self.seed, self.size, self.flip, self.extra = data, batch_size, seed, size, flip, extra
        self.rank, self.world = rank(), world()

    def __getitem__(self, step):
        share, count = self.batch_size // self.world, len(self.data)
        position = step * self.batch_size + self.rank * share + np.arange(share)
        index = np.array([epoch_order(self.seed, p // count, count)[p % count] for p in position.tolist()])
        position = torch.from_numpy(position)
        flip = (uniform(self.seed, "flip", position) < 0.5) & self.flip
        batch = dict(position=position, index=torch.from_numpy(index), flip=flip,
                     label=torch.from_numpy(self.data.labels[index]))
        if self.size:
            image = self.data.stack(index, self.size)
            batch["image"] = torch.where(flip.view(-1, 1, 1, 1), image.flip(3), image)
        if self.extra:
            batch.update(self.extra(index, flip.numpy()))
        return batch


class Blocks(torch.utils.data.Dataset):
    """Item k: dict(image=load(indices of the k-th `block` of `count` pictures, size)), uint8 (b,3,size,size)."""

    def __init__(self, load, size, count, block):
        self.load, self.size, self.count, self.block = load, size, count, block

    def __getitem__(self, k):
        return dict(image=self.load(range(k * self.block, min((k + 1) * self.block, self.count)), self.size))


def cores():
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()       # macOS has none


def ignore_signals(worker):
    """A scheduler's signal goes to loaders too: they go on until the process they read for has ended."""
    at_signal(signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def answer(dataset, k):
    """dataset[k], or the UserError that it raises: torch's own way to hand on an error keeps loaders from ending."""
    try:
        return dataset[k]
    except UserError as error:
        return error


def batches(dataset, items, workers, device):
    """Iterates over dataset[k] for k in items, in order, read ahead by `workers` processes."""
    if workers is None:
        workers = min(8, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    loader = torch.utils.data.DataLoader(items, batch_size=None, collate_fn=functools.partial(answer, dataset),
                                         num_workers=workers, worker_init_fn=ignore_signals,
                                         pin_memory=device.type == "cuda", prefetch_factor=4 if workers else None)
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def layout(device, precision="fp32"):
    """Memory format of convolutions: channels_last where they run in bf16. On a CPU in fp32 it was 15 to 25% slower (2 AVX2
    cores, f4d16 VAE)."""
    return torch.channels_last if device.type == "cuda" or precision == "bf16" else torch.contiguous_format


def from_uint8(x):
    """uint8 (B,3,H,W) 0..255 -> float32 in [-1,1]."""
    return x.float().div(127.5).sub(1).contiguous(memory_format=layout(x.device))


def to_uint8(x):
    """Float in [-1,1] -> uint8 0..255, rounded."""
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# Files: written beside their name, flushed, renamed. A reader never sees half a file

@contextlib.contextmanager
def writing(path):
    """with writing("a/b") as file: a binary file that becomes a/b when the block ends well."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    for left in glob.glob(f"{glob.escape(path)}.*.tmp"):    # by a process that was killed
        with contextlib.suppress(FileNotFoundError):
            os.remove(left)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def open_npz(path):
    """np.load of an .npz whose checksums are right and whose headers claim what its members hold, no more and no less."""
    with open(path, "rb"):                                  # absent, or not to be read: its own error
        if not intact(path):
            raise ValueError("it is not a zip file, or a checksum in it differs")
    file = np.load(path, allow_pickle=False)
    for member in file.zip.infolist():
        with file.zip.open(member) as rows:
            np.lib.format.read_magic(rows)                  # other versions have long headers, and no array of ours or ADM's
            shape, _, dtype = np.lib.format.read_array_header_1_0(rows)
            if dtype.hasobject:
                raise ValueError(f"{member.filename} holds Python objects")
            if rows.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                raise ValueError(f"{member.filename} is cut, or claims the wrong shape {shape}")
    return file


def open_array(path, dtype, shape):
    """A memory map of an .npy file, to read and write. Its header and size must be what it was made with: np.load believes
    any header, and fills up with zeros what a cut file lacks."""
    found = None
    with contextlib.suppress(Exception):                    # NumPy's header parser raises a dozen types
        array = np.load(path, mmap_mode="r")
        found = array.dtype, array.shape, array.offset + array.nbytes, array.flags.c_contiguous
    if found != (dtype, shape, os.path.getsize(path), True):
        raise UserError(f"{path} is damaged; remove its folder and give the same command again")
    return np.load(path, mmap_mode="r+")


def resumable_array(folder, name, dtype, shape, block):
    """folder/<name>, a memory-mapped array that all processes fill together, `block` rows at a time -> array, marks of the
    blocks that are filled, numbers of those that are not. A killed run goes on with these. Call mark_done after each."""
    path, marks = os.path.join(folder, name), os.path.join(folder, "done.npy")
    if rank() == 0 and not os.path.exists(marks):
        os.makedirs(folder, exist_ok=True)
        try:
            np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
            if hasattr(os, "posix_fallocate"):              # not on macOS
                with open(path, "r+b") as file:             # a mapped file that meets a full disk later kills the process
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(path)
            raise UserError(f"cannot write {path}, {math.prod(shape) * np.dtype(dtype).itemsize / 1e9:.3g} GB: {error.strerror}") from None
        with writing(marks) as file:                        # last: its presence says that the array is there
            np.save(file, np.zeros(-(-shape[0] // block), np.uint8))
    barrier()
    array, done = open_array(path, dtype, shape), open_array(marks, np.uint8, (-(-shape[0] // block),))
    todo = np.flatnonzero(done != 1)
    barrier()                                               # nobody marks a block before all have read the list
    return array, done, todo


def mark_done(array, done, k):
    array.flush()                                           # first: a mark says that its rows are on the disk
    done[k] = 1
    done.flush()


def save_weights(path, kind, state, config, info):
    """Tensors and what is needed to build and judge them -> a .safetensors file that models.load_<kind> opens."""
    from safetensors.torch import save
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    metadata = dict(format="pt", kind=kind, config=json.dumps(config), info=json.dumps(info))
    metadata["hash"] = content_hash(state_hash(state), metadata)
    with writing(path) as file:
        file.write(save(state, metadata))


def lock(folder, wait=False):
    """Makes this run the only one that writes into a folder, until its process ends, however it ends, or closes the file of
    this number; refuses, or waits for, another. Also removes half-written files that a killed run left there."""
    file = None
    if rank() == 0:
        try:
            os.makedirs(folder, exist_ok=True)
            file = os.open(os.path.join(folder, ".lock"), os.O_WRONLY | os.O_CREAT)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)                   # unlike flock's, not inherited by loaders
        except BlockingIOError:
            if not wait:
                raise UserError(f"another process is writing into {folder}; wait for its end, or name another --out") from None
            say(f"waiting for another process that writes into {folder}")
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {error.strerror}; name another with --out, for latents --cache") from None
        for inside in (folder, os.path.join(folder, "checkpoints")):
            for path in glob.glob(os.path.join(glob.escape(inside), "*.tmp")):
                os.remove(path)
    barrier()
    return file


class Saver:
    """Writes a run's weights and training state, on the first process, in a thread, from a copy in host memory. What cannot
    be written is said at once and training goes on; only at the end it is an error. What was saved before stays good."""

    def __init__(self, folder, keep_every=0):
        self.folder, self.keep_every, self.thread, self.error = folder, keep_every, None, None

    def save(self, step, weights, state):
        """state: for save_checkpoint; weights: {file name: (kind, state dict, config, info)} for save_weights. A tensor that
        stands in both is copied once."""
        if rank() == 0:
            self.wait()
            to_host = functools.cache(lambda x: x.detach().to("cpu", copy=True))
            self.thread = threading.Thread(target=self.write, name="saver",
                                           args=(step, *tree_map_only(torch.Tensor, to_host, (weights, state))))
            self.thread.start()

    def write(self, step, weights, state):
        self.error = None
        try:
            for name, (kind, part, config, info) in weights.items():
                save_weights(os.path.join(self.folder, name), kind, part, config, dict(info, **provenance()))
            save_checkpoint(self.folder, step, state, self.keep_every)
        except (OSError, RuntimeError) as error:            # torch.save turns some failed writes into RuntimeError
            last = (list_checkpoints(self.folder) or ["none"])[-1]
            self.error = f"cannot save step {step} in {self.folder}: {error}; the last good checkpoint is {last}"
            say(f"warning: {self.error}; training goes on")

    def wait(self):
        if self.thread is not None:
            self.thread.join()

    def close(self):
        """Waits for the last save; raises if it failed."""
        self.wait()
        if self.error:
            raise UserError(f"{self.error}; make room and give the same command again")


def save_checkpoint(folder, step, state, keep_every=0):
    """The whole training state -> folder/checkpoints/<step>.pt, checked by reading it back before it gets this name. The
    last two are kept, and those of every `keep_every` steps."""
    with writing(os.path.join(folder, "checkpoints", f"{step:09d}.pt")) as file:
        torch.save(state, file)
        file.flush()
        if not intact(file.name):
            raise OSError("what was read back differs from what was written: the disk may be failing")
    for old in list_checkpoints(folder)[:-2]:
        if not keep_every or int(os.path.basename(old)[:-3]) % keep_every:
            os.remove(old)


def list_checkpoints(folder):
    return sorted(glob.glob(os.path.join(glob.escape(folder), "checkpoints", "*.pt")))


def load_checkpoint(folder, device):
    """The newest whole checkpoint -> its state, or None where there is none. Damaged ones are named and passed by."""
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            if intact(path):
                return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:                          # whole, but not a checkpoint
            say(f"note: {path}: {first_line(error)}")
        say(f"warning: {path} is damaged, using the one before it")
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} can be read; start anew with --overwrite")
    return None


def resume(args, free, parts, total, device):
    """Makes --out this run's and loads its last state into its parts, in their order -> the step to go on from, None where
    all steps are done, and the sums of the unfinished line of metrics. Other settings than the run began with are refused,
    except for the flags named in `free`."""
    lock(args.out)
    state = None if args.overwrite else load_checkpoint(args.out, device)
    if state is None:
        if args.resume:
            raise UserError(f"--resume: {args.out} holds no checkpoint")
        for path in list_checkpoints(args.out) if rank() == 0 else ():
            os.remove(path)
        return 0, None
    saved, free = {"vae_hash": state.get("vae_hash")} | state["arguments"], free | FREE        # where older SiT runs have it
    if args.lr_schedule == "cosine":
        free = free - {"steps", "epochs"}                   # the rate of every step depends on the last one's number
    differ = [f"--{k.replace('_', '-')} was {saved[k]} and is now {v}" for k, v in vars(args).items()
              if k not in free and k in saved and saved[k] != v]
    if differ:
        raise UserError(f"{args.out} holds a run with other settings: {'; '.join(differ)}; use the same flags to resume, "
                        "another --out, or --overwrite to begin anew")
    if state["step"] >= total:
        say(f"done      {args.out} has its {state['step']} steps already")
        return None, None
    with reading(args.out, "a run of this version of the code; begin anew with --overwrite"):
        for name, part in parts.items():
            part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):
                match_memory_formats(part)
    say(f"resuming  {args.out} at step {state['step']}")
    return state["step"], state["running"]


def match_memory_formats(optimizer):
    """Gives every moment of an optimiser its parameter's memory format. Fused AdamW walks both in the order of their
    storage, so a state that was saved in channels_last scrambles the update of contiguous weights, and the reverse."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def newest(name, what, command):
    """The newest runs/**/<name> by modification time, said aloud; or an error that tells how to make one."""
    found = glob.glob(os.path.join("runs", "**", name), recursive=True)
    if not found:
        raise UserError(f"no {what} under runs/; make one with `{command}`, or a small one with `python demo.py`")
    path = max(found, key=os.path.getmtime)
    say(f"using the newest {what}: {path}")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Run folder: config.json, metrics.jsonl, samples/*.png

def provenance():
    """What made this result: commit, versions, device."""
    git = subprocess.run("git describe --always --dirty --abbrev=40 --exclude='*'", shell=True, capture_output=True, text=True,
                         cwd=os.path.dirname(os.path.abspath(__file__)))
    commit, _, dirty = git.stdout.strip().partition("-")    # nothing where there is no git, or no repository
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return dict(commit=commit or None, dirty=bool(dirty), python=sys.version.split()[0], torch=torch.__version__,
                device=device, processes=world(), date=time.strftime("%Y-%m-%d %H:%M:%S"))


@contextlib.contextmanager
def going_on(path):
    """Around what a run can do without: a failed write of it is said."""
    try:
        yield
    except OSError as error:
        say(f"warning: cannot write {path}: {error.strerror}; going on without it")


def write_json(path, value):
    with writing(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


class RunLog:
    """Progress bar and metrics.jsonl of a training run, on the first process; silent on the others.

    add sums up what line writes the means of; lines after `start`, left by a run that was killed, are dropped.
    `running`: since the last line, the sums of the losses called `names`, number of bad steps, number of good ones."""

    def __init__(self, args, names, running, start, total, steps_per_epoch, device):
        self.args, self.names, self.start, self.total, self.steps_per_epoch = args, names, start, total, steps_per_epoch
        self.running = torch.zeros(len(names) + 2, device=device) if running is None else running
        self.main, folder = rank() == 0, args.out
        self.last_time, self.last_step = time.time(), start
        if self.main:
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, "metrics.jsonl")
            with open(path, "a+b") as file:
                file.seek(0)
                lines = re.findall(rb'^({"step": (\d+), .*}\n)', file.read(), re.MULTILINE)        # the last one may be cut off
            with writing(path) as file:
                file.write(b"".join(line for line, step in lines if 0 < int(step) <= start))
            self.file = open(path, "ab", buffering=2 ** 20)
            write_json(os.path.join(folder, "config.json"), dict(arguments=vars(args), provenance=provenance()))
        self.bar = tqdm(total=total, initial=start, disable=not self.main, unit="step", smoothing=0.05,
                        mininterval=0.5 if sys.stderr.isatty() else 20)
        say(f"training  steps {start} to {total}, {total / steps_per_epoch:.1f} epochs of {steps_per_epoch:.1f} steps; batch "
            f"{args.batch_size} = {world()} processes x {args.accum} passes x {args.batch_size // (world() * args.accum)}")

    def every(self, n, step):
        """Whether a turn of the loop is one of every n steps; the last is, unless n is 0."""
        return n > 0 and (step == self.total or step % n == 0 and step > self.start)

    def add(self, losses, good):
        """losses (n,) of one step, and whether it counts, on the device: nothing waits for them."""
        self.running[:-2] += torch.where(good, losses, 0)
        self.running[-2] += ~good
        self.running[-1] += good
        self.bar.update()

    def line(self, step, active):
        """Writes the means of the losses named in `active` since the last line, over all processes."""
        *sums, bad, good = gather_mean(self.running.clone()).tolist()
        self.running.zero_()
        now = time.time()
        rate = (step - self.last_step) * self.args.batch_size / max(now - self.last_time, 1e-9)
        self.last_time, self.last_step = now, step
        if self.main:
            values = {k: v / good for k, v in zip(self.names, sums) if k in active and good}
            if bad:
                values["bad_steps"] = round(bad)
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
            self.write(dict(step=step, epoch=round(step / self.steps_per_epoch, 4), **values, images_per_s=round(rate, 2)))

    def write(self, line):
        """What a full disk does not take stays in the file's buffer until a later line: none is lost or cut."""
        with going_on(self.file.name):
            self.file.write((json.dumps(line) + "\n").encode())
            self.file.flush()

    def pictures(self, step, rows):
        path = os.path.join(self.args.out, "samples", f"{step:07d}.png")
        with going_on(path):
            save_grid(path, rows)

    def note(self, step, values):
        """A line of measurements other than the losses, also said."""
        if self.main:
            say(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
            self.write(dict(step=step, **values))

    def close(self, step, done):
        """The last words, after the last save."""
        self.bar.close()
        say(done if step == self.total else f"stopped   by a signal at step {step}; the same command goes on from the last "
            f"checkpoint in {self.args.out}")


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay ema + (1 - decay) model for the parameters, a copy for the buffers; two modules of one shape."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for a, b in zip(ema.buffers(), model.buffers()):
        a.copy_(b)


def save_grid(path, rows):
    """Rows of as many pictures each, uint8 (n,3,H,W) -> one PNG. Pictures under 64 pixels are enlarged, sharp."""
    from torchvision.utils import save_image                # takes a second to import
    x = torch.cat([row.cpu() for row in rows])
    scale = 128 // x.shape[2] if x.shape[2] < 64 else 1
    x = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3) / 255
    with writing(path) as file:
        save_image(x, file, "png", nrow=len(rows[0]), padding=2 * scale, pad_value=1)
