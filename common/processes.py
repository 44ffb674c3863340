"""Process group, device, precision, synchronised batch norm, signals."""

import contextlib
import ctypes
import datetime
import errno
import faulthandler
import hashlib
import inspect
import os
import signal
import sys
import threading
import time
import uuid

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.files import UserError, first_line


# --------------------------------------------------------------------------------------------------
# The end of a script


def run_main(main, for_less_memory="lower --batch-size"):
    """Calls a script's main(). An error that a user can mend becomes one sentence on stderr and
    exit code 2; Ctrl-C becomes exit code 130. for_less_memory: what to advise when memory is short.
    """
    for stream in (sys.stdout, sys.stderr):
        # A name of a class must not end a run where the terminal's encoding lacks its letters.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (UserError, KeyboardInterrupt, RuntimeError, OSError, MemoryError) as error:
        sentence = sentence_for_user(error, for_less_memory)
        if sentence is None:
            raise
        print(f"{os.path.basename(sys.argv[0])}: {sentence}", file=sys.stderr, flush=True)
        wait_for_savers()
        code = 130 if isinstance(error, KeyboardInterrupt) else 2
        if dist.is_initialized():
            # Other processes may wait in a collective that never ends, so none is joined here.
            os._exit(code)
        sys.exit(code)
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        # The process group is not destroyed: torch 2.6 now and then waits for ever for a thread of
        # gloo's there. One that outlives the interpreter would abort the process.
        os._exit(0)


def sentence_for_user(error, for_less_memory):
    """What went wrong and what to do about it, in a sentence; None for an error of ours."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; rerun the command to resume from what is saved"
    if is_out_of_memory(error):
        facts = first_line(error).split(". ")[0]
        return f"error: {facts}; {for_less_memory}"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        place = f": {error.filename}" if error.filename else ""
        return f"error: {error.strerror}{place}; make room and rerun the command"
    if isinstance(error, OSError) and error.errno in WRONG_PATH and error.filename:
        return f"error: {error.filename}: {error.strerror}; give another path, or mend this one"
    if "DataLoader worker" in str(error):
        # It was killed, and torch's message says by which signal.
        return (
            f"error: {first_line(error)}; a loader process was killed, probably for want of memory "
            "or of shared memory: lower --workers (0 reads in the process itself), or give a "
            "container more (docker run --shm-size=8g)"
        )
    if isinstance(error, dist.DistError) or (world() > 1 and "gloo" in str(error)):
        return (
            f"error: process {rank()} lost {silent_processes()}, which died or hangs; see the "
            "messages above and below"
        )
    reason = compiler_failure(error)
    if reason is not None:
        return (
            f"error: torch.compile failed: {reason}; pass --no-compile, or install a C++ compiler "
            "and Python's headers"
        )
    return None


def is_out_of_memory(error):
    """Whether an error says that memory is short. On a CPU, and where a library of CUDA's needed
    the memory, it has no type of its own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    words = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
    return any(word in str(error) for word in words)


def compiler_failure(error):
    """Why torch.compile found no way to compile, None for an error of another kind."""
    if isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
        return first_line(error.inner_exception)
    # Triton compiles the launcher of a kernel when it is first called.
    if "Failed to find C compiler" in str(error):
        return first_line(error)
    return None


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# A folder in the place of a file or the reverse, no permission, a name that is too long.
WRONG_PATH = (
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EROFS,
)


def wait_for_savers():
    """Waits for the threads that write checkpoints. Others (a compiler's pool) may never end."""
    for thread in threading.enumerate():
        if thread.name == "saver":
            thread.join()


def silent_processes():
    """Names the processes that do not say, within three seconds, that they also wait for others."""
    silent = []
    # The store is gone when the first process is.
    with contextlib.suppress(RuntimeError):
        store = dist.distributed_c10d._get_default_store()
        store.set(f"process {rank()} waits", "1")
        time.sleep(3)
        silent = [str(r) for r in range(world()) if not store.check([f"process {r} waits"])]
    if silent:
        return f"process {', '.join(silent)}"
    return "the others"


# --------------------------------------------------------------------------------------------------
# Process group


def rank():
    """Number of this process, 0 for the first or only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words):
    """print, on the first process only."""
    if rank() == 0:
        text = " ".join(map(str, words))
        # File names may hold bytes that are not UTF-8.
        tqdm.write(text.encode(errors="backslashreplace").decode())
        sys.stdout.flush()


# Seconds between two updates of a progress bar: on a terminal, and in a file, which keeps each.
BAR_INTERVAL = 0.5
BAR_INTERVAL_IN_FILE = 20


def progress(iterable=None, desc=None, total=None, disable=False, leave=False, **settings):
    """A progress bar of the first process: tqdm(...), which goes away at the end unless `leave`."""
    interval = BAR_INTERVAL if sys.stderr.isatty() else BAR_INTERVAL_IN_FILE
    return tqdm(
        iterable,
        desc,
        total,
        leave=leave,
        disable=disable or rank() > 0,
        mininterval=interval,
        maxinterval=BAR_INTERVAL_IN_FILE,
        **settings,
    )


def barrier():
    """Waits until every process is here, however long the others work before they come: one of them
    may read a million pictures first. Raises a UserError for one that died or hangs."""
    if world() > 1:
        if attendance is not None:
            attendance.wait_for_all()
        dist.barrier()


# The Attendance of this process, where there are several.
attendance = None


class Attendance:
    """Lets processes wait for each other without a limit, as long as all are alive.

    A thread of each process writes a sign of life into the key-value store that all share. A
    process that waits gives up when another one has written none for `timeout` seconds. (The limit
    of a collective, such as torch's own barrier, also ends a wait for a process that works.)"""

    def __init__(self, store, number, count, timeout):
        """number: of this process, 0 to count - 1."""
        self.store = store
        self.number = number
        self.count = count
        self.timeout = timeout
        self.pause = min(5, timeout / 4)  # seconds between two signs of life
        self.waits = 0
        threading.Thread(target=self._show_life, name="attendance", daemon=True).start()

    def _show_life(self):
        beats = 0
        # The store is closed when the process ends, or the first one does.
        with contextlib.suppress(RuntimeError):
            while True:
                self.store.set(f"alive {self.number}", str(beats))
                beats += 1
                time.sleep(self.pause)

    def wait_for_all(self):
        """Returns when every process has called this as often as this one."""
        self.waits += 1
        self.store.set(self._key(self.number), "1")
        absent = set(range(self.count))
        last_beat = {}
        last_change = dict.fromkeys(absent, time.monotonic())
        next_look = time.monotonic() + self.pause
        while True:
            absent = {i for i in absent if not self.store.check([self._key(i)])}
            if not absent:
                return
            if time.monotonic() > next_look:
                self._look_for_life(absent, last_beat, last_change)
                next_look = time.monotonic() + self.pause
            time.sleep(0.02)

    def _key(self, number):
        return f"wait {self.waits} of {number}"

    def _look_for_life(self, absent, last_beat, last_change):
        """Notes the newest sign of life of each absent process. Raises a UserError that names those
        without a new one for too long."""
        now = time.monotonic()
        for i in absent:
            beat = None
            if self.store.check([f"alive {i}"]):
                beat = self.store.get(f"alive {i}")
            if last_beat.get(i) != beat:
                last_beat[i] = beat
                last_change[i] = now
        silent = [str(i) for i in sorted(absent) if now - last_change[i] > self.timeout]
        if silent:
            raise UserError(
                f"process {self.number} lost process {', '.join(silent)}, which died or hangs: no "
                f"sign of life for {self.timeout:g} seconds (--timeout)"
            )


def setup(device=None, timeout=1800):
    """Joins the process group that torchrun describes (a group of one without torchrun) and returns
    this process's torch.device. device: "cuda", "cpu" or None, which is CUDA where there is a GPU.
    A process gives up when it has waited for more than `timeout` seconds for the others, or, where
    they may have long work of their own (`barrier`), for a sign of life of theirs."""
    keep_freed_memory()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = use_own_gpu()
    device = torch.device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        join_processes(device, timeout)
    return device


def keep_freed_memory():
    """Has glibc keep the pages of big tensors between steps instead of returning them to the
    system, which would hand them out again page by page, each filled with zeros.
    """
    # Numbers of the parameters are those of mallopt(3). Other C libraries have no mallopt, and
    # Windows has no library of this name, None.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 64 * 2**20)


def use_own_gpu():
    """Selects the GPU of this process's local rank, allows TF32, and has cuDNN choose the algorithm
    of each convolution by timing them at the first call. Returns the GPU's name, cuda:<n>."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; lower "
            "--nproc_per_node or pass --device cpu"
        )
    torch.cuda.set_device(local_rank)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    # Shapes stay the same during a run, so each is timed once. Two runs may choose differently, and
    # then differ in rounding, as they do anyway: the default kernels add in no fixed order.
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    return f"cuda:{local_rank}"


def join_processes(device, timeout):
    """Joins the other processes: with NCCL, which is told its GPU, or on CPUs with gloo."""
    limit = datetime.timedelta(seconds=timeout)
    store, number, count = next(dist.rendezvous("env://", timeout=limit))
    store = store_of_this_start(store, number, count)
    group = dict(rank=number, world_size=count, store=store, timeout=limit)
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, **group)
    else:
        dist.init_process_group("gloo", **group)
    global attendance
    attendance = Attendance(dist.PrefixStore("attendance", store), number, count, timeout)


def store_of_this_start(store, number, count):
    """The part of torchrun's key-value store that only processes of this start use.

    torchrun's store outlives the processes: after a restart (--max-restarts) it still holds the
    addresses of the dead ones, and its count of restarts differs between nodes. So every process
    writes a new random name, and the names of all of them together become the prefix of all keys.
    A process is sure that it read no name of a dead one when all have read the same names."""
    name_keys = [f"name {i}" for i in range(count)]
    seen_keys = [f"seen {i}" for i in range(count)]
    store.set(name_keys[number], uuid.uuid4().hex)
    while True:
        names = b" ".join(store.multi_get(name_keys))
        store.set(seen_keys[number], names)
        if set(store.multi_get(seen_keys)) == {names}:
            return dist.PrefixStore(hashlib.sha256(names).hexdigest(), store)
        time.sleep(0.1)


def from_first_process(number):
    """The first process's value of `number`, a whole number of 64 bits, on every process."""
    if world() == 1:
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    value = torch.tensor(number, device=device)
    dist.broadcast(value, 0)
    return int(value)


def sum_over_processes(values):
    """Sums a tensor over the processes, in place, and returns it."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def mean_over_processes(values):
    """Averages a tensor over the processes, in place, and returns it."""
    return sum_over_processes(values).div_(world())


# --------------------------------------------------------------------------------------------------
# Precision and memory format


def resolve_precision(precision, device):
    """'auto' becomes bf16 where the hardware multiplies bf16 matrices (a GPU, a CPU with AMX or
    AVX512-BF16), else fp32. Without such units oneDNN emulates bf16, hundreds of times slower than
    fp32. 'bf16' and 'fp32' stay."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        # oneDNN has the last word: ONEDNN_MAX_CPU_ISA can forbid it the units.
        fast = has_units and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "fp32"


def autocast(device, precision):
    """The context in which networks run: autocast to bf16, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def conv_memory_format(device, precision="fp32", training=False):
    """The memory format for convolutions: channels_last on a GPU, and for bf16 on a CPU.

    On a CPU two things are faster in contiguous memory (measured on a VAE at 256 pixels): fp32, by
    15 to 25% (f4d16, AVX2), and training in bf16, by 5% (f16d32, AVX512-BF16), since the backward
    pass of group norm is slow in channels_last there."""
    if device.type == "cuda":
        return torch.channels_last
    if precision == "bf16" and not training:
        return torch.channels_last
    return torch.contiguous_format


def processor_seconds():
    """Seconds that processors have spent on this process, and on those of its child processes that
    have ended. Other work on the machine does not count."""
    return sum(os.times()[:4])


def available_cores():
    """Number of processor cores that this process may use."""
    # macOS has no sched_getaffinity.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


@contextlib.contextmanager
def without_tf32():
    """The context of matrix products in full fp32 on GPUs, where `setup` allows TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# --------------------------------------------------------------------------------------------------
# Modules that several processes train together


class SumOverProcesses(torch.autograd.Function):
    """sum_over_processes of a copy of a tensor, whose gradient is summed in the same way."""

    @staticmethod
    def forward(context, values):
        return sum_over_processes(values.clone())

    @staticmethod
    def backward(context, gradient):
        return sum_over_processes(gradient.clone())


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes. torch's own takes no CPU tensors, and CPUs and
    GPUs must give one training curve.

    together: False while a process works `alone`."""

    together = True

    # Compiled by torch 2.11, the gradient of the layer before this one was 11% off, silently.
    @torch.compiler.disable
    def forward(self, x):
        """(B,C,h,w) of this process -> the same shape, normalised, in fp32."""
        if not self.training:
            return super().forward(x)
        x = x.float()
        count = x.numel() // x.shape[1]
        total = torch.clone
        if self.together:
            count *= world()
            total = SumOverProcesses.apply
        mean = total(x.sum((0, 2, 3))) / count
        x = x - mean[:, None, None]
        var = total(x.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        x = x * torch.rsqrt(var + self.eps)[:, None, None]
        if not self.affine:
            return x
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def parallel(module):
    """Wraps a module that all processes train together, each on its share of a batch. With one
    process it stays as it is."""
    if world() == 1:
        return module
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = SyncBatchNorm
    recomputes = any(getattr(part, "grad_checkpoint", False) for part in module.modules())
    if recomputes and torch.__version__ < (2, 14):
        # Such a graph, compiled, is not cut into parts whose gradients are sent while others are
        # computed: torch 2.6 and 2.8 fail to, with "KeyError: 'val'". torch 2.14 can.
        torch._dynamo.config.optimize_ddp = False
    # Buffers are equal on all processes already. torch 2.14 has a new name for the argument.
    options = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **{name: False})


@contextlib.contextmanager
def sync_gradients(modules, on):
    """The context of a forward and backward pass through parallel modules: their gradients are
    averaged over the processes only if `on`, that is in the last pass of a step."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if isinstance(module, DistributedDataParallel) and not on:
                stack.enter_context(module.no_sync())
        yield


@contextlib.contextmanager
def alone():
    """The context of a pass whose batch norms do not wait for other processes: one of them may fail
    on the way."""
    SyncBatchNorm.together = False
    try:
        yield
    finally:
        SyncBatchNorm.together = True


# --------------------------------------------------------------------------------------------------
# Signals and processes that hang


# Set when a signal has asked this process to stop after its step. Whoever waits for something else
# in the meantime (load_batches) looks at it, so as not to wait for ever.
asked_to_stop = threading.Event()


class Watch:
    """Watches over the processes of a training run. SIGTERM or SIGUSR1 to any of them ends the run
    after the step, on all processes together. A process that hangs for longer than --timeout prints
    its stack and ends.

    stop: whether any process was asked to stop, as of the last end_step."""

    def __init__(self, timeout):
        asked_to_stop.clear()
        self.stop = False
        self.timeout = timeout
        self.group = None
        at_signal(self._remember_signal)
        if world() > 1:
            # A group for CPU tensors, so that nothing waits for the GPU.
            limit = datetime.timedelta(seconds=timeout)
            self.group = dist.new_group(backend="gloo", timeout=limit)

    def _remember_signal(self, number, frame):
        asked_to_stop.set()

    def begin_step(self):
        if self.group is not None:
            # Five seconds after the others' own time-out, whose message names this process.
            faulthandler.dump_traceback_later(self.timeout + 5, exit=True)

    def end_step(self):
        """To be called when the work of a step is queued on the device, before its results are
        waited for."""
        asked = torch.tensor(int(asked_to_stop.is_set()))
        if self.group is not None:
            faulthandler.cancel_dump_traceback_later()
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
        self.stop = bool(asked)


def at_signal(function):
    """Has a scheduler's SIGTERM or SIGUSR1 to this process call function(number, frame)."""
    signal.signal(signal.SIGTERM, function)
    # Windows has no SIGUSR1.
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, function)


def stop_at_signal():
    """For work in blocks that are kept when they are done: a scheduler's signal ends the process at
    once, with exit code 0."""

    def leave(number, frame):
        name = signal.Signals(number).name
        print(f"stopped by {name}; rerun the command to resume", flush=True)
        sys.exit(0)

    at_signal(leave)
