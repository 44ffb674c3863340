"""Process group, device, precision, synchronised batch norm, signals."""

import contextlib
import ctypes
import datetime
import errno
import faulthandler
import hashlib
import os
import signal
import sys
import threading
import time
import uuid

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.files import UserError


def run_main(main):
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
        elif isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
        ):
            text = f"error: {error.strerror}{f': {error.filename}' * bool(error.filename)}; make room and give the same command again"
        elif isinstance(error, dist.DistError) or world() > 1 and "gloo" in str(error):
            text = f"error: process {rank()} lost {silent_processes()}, which died or hangs; see the messages above and below"
        else:
            raise
        print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr, flush=True)
        for (
            thread
        ) in threading.enumerate():  # other threads, such as a compiler's pool, may never end
            if thread.name == "saver":
                thread.join()
        code = 130 if isinstance(error, KeyboardInterrupt) else 2
        os._exit(code) if dist.is_initialized() else sys.exit(
            code
        )  # other ranks may wait in a collective: do not join them
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)  # a gloo thread that meets the interpreter's end aborts the process


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words):
    """print, on the first process only."""
    if rank() == 0:
        tqdm.write(
            " ".join(map(str, words)).encode(errors="backslashreplace").decode()
        )  # of names that are not UTF-8
        sys.stdout.flush()


def barrier():
    if world() > 1:
        dist.barrier()


def setup(device=None, timeout=1800):
    """Joins the process group torchrun describes (a world of one without it) -> torch.device of this process. A process
    that waits for the others for more than `timeout` seconds gives up."""
    with contextlib.suppress(
        OSError, AttributeError
    ):  # glibc only: keep big tensors' pages between steps, see
        libc = ctypes.CDLL(None)  # mallopt(3): M_MMAP_MAX = 0, M_TRIM_THRESHOLD, M_TOP_PAD
        libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1), libc.mallopt(-2, 64 * 2**20)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local} has no GPU: {torch.cuda.device_count()} visible; "
                "lower --nproc_per_node or pass --device cpu"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        timeout = datetime.timedelta(seconds=timeout)
        store, number, count = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            timeout=timeout,
            rank=number,
            world_size=count,
            store=store_of_this_start(store, number, count),
        )
    return torch.device(device)


def store_of_this_start(store, number, count):
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
    return (
        "bf16" if fast and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
    )  # the last knows ONEDNN_MAX_CPU_ISA


def autocast(device, precision):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def sum_over_processes(values):
    """Sum over the processes of a tensor, in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def mean_over_processes(values):
    return sum_over_processes(values).div_(world())


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes. torch's own takes no CPU tensors, and both must give one curve."""

    # Compiled by torch 2.11, the gradient of the layer before this one was 11% off, without a word.
    @torch.compiler.disable
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        xf = x.float()
        n = xf.numel() // xf.shape[1] * world()
        mean = torch.distributed.nn.functional.all_reduce(xf.sum((0, 2, 3))) / n  # differentiable
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


class Watch:
    """Watches over a training run's processes: SIGTERM or SIGUSR1 to any of them ends the run after the step, on all
    together; one that hangs for longer than --timeout prints its stack and ends."""

    def __init__(self, timeout):
        self.asked = self.stop = False
        self.timeout, self.group = timeout, None

        def note(number, frame):
            self.asked = True

        at_signal(note)
        if world() > 1:  # on CPU tensors: a GPU need not be waited for
            self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))

    def begin_step(self):
        if self.group is not None:  # later than the others' own time-out, which names this process
            faulthandler.dump_traceback_later(self.timeout + 5, exit=True)

    def end_step(self):
        """When a step's work is given out, before its results are waited for. stop: whether any process was asked to."""
        asked = torch.tensor(int(self.asked))
        if self.group is not None:
            faulthandler.cancel_dump_traceback_later()
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
        self.stop = bool(asked)


def silent_processes():
    """Words on the processes that do not say, within some seconds, that they wait for others too."""
    store, silent = dist.distributed_c10d._get_default_store(), []
    with contextlib.suppress(RuntimeError):  # the store went with the first process
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
        print(
            f"stopped by {signal.Signals(number).name}; the same command goes on with what is left",
            flush=True,
        )
        sys.exit(0)

    at_signal(leave)


def available_cores():
    """Processor available_cores this process may use."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )  # macOS has none


def conv_memory_format(device, precision="fp32"):
    """Memory format of convolutions: channels_last where they run in bf16. On a CPU in fp32 it was 15 to 25% slower (2 AVX2
    available_cores, f4d16 VAE)."""
    return (
        torch.channels_last
        if device.type == "cuda" or precision == "bf16"
        else torch.contiguous_format
    )
