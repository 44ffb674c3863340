"""Runs the stages' main() on CUDA tensors that are not there, on a machine with or without a GPU.

    LD_PRELOAD=<the library> python tests/fake_cuda.py FOLDER      # writes FOLDER/results.json

PyTorch's fake tensors know device, shape, type and strides, and no numbers. Every operation of a
stage is dispatched, and one that mixes CPU and CUDA tensors raises, as on a GPU. Where the host
asks for a number it gets a stand-in; inside a training step or a sampler, where it would wait for
the GPU, that raises HostWait. A small library stands in for the CUDA runtime, so that autocast and
the autograd engine take the paths of a GPU. Kernels, numbers and speed are not seen.
"""

import collections
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import types
import traceback
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from bench import gpu, sizes
import fid
import models
import probe
import sample
import train_sit
import train_vae
from common import runs, training
from common.files import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
aten = torch.ops.aten

# --------------------------------------------------------------------------------------------------
# The library that stands in for the CUDA runtime and driver: one GPU, and every call succeeds

FUNCTIONS = r"""
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
int cudaGetDeviceCount(int *count) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    *count = !(visible && !*visible);
    return *count ? 0 : 100;
}
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaStreamIsCapturing(void *stream, int *on) { *on = 0; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    *stream = malloc(8);
    return 0;
}
int cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return 0;
}
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = malloc(8); return 0; }
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = 80ul << 30; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *on) { *on = 1; return 0; }
/* Compute capability 9.0 and 80 GiB, at the places that they have from CUDA 12 on. */
int cudaGetDeviceProperties(char *properties, int device) {
    memset(properties, 0, 600);
    *(size_t *)(properties + 288) = 80ul << 30;
    *(int *)(properties + 308) = 32;
    *(int *)(properties + 360) = 9;
    return 0;
}
int cudaGetDeviceProperties_v2(char *properties, int device) {
    return cudaGetDeviceProperties(properties, device);
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : 0;
    return 0;
}
"""
# Functions that need do nothing.
EMPTY = {
    "cudaGetLastError",
    "cudaPeekAtLastError",
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaStreamQuery",
    "cudaStreamWaitEvent",
    "cudaThreadExchangeStreamCaptureMode",
    "cudaEventRecord",
    "cudaEventRecordWithFlags",
    "cudaEventQuery",
    "cudaEventSynchronize",
    "cudaEventDestroy",
    "cuInit",
}


def torch_library():
    """Path of torch's library that needs the driver's functions. CPU builds of torch have none."""
    return os.path.join(os.path.dirname(torch.__file__), "lib", "libcaffe2_nvrtc.so")


def build_library(path):
    """Compiles the library to `path`, named libcuda.so.1, which is what LD_PRELOAD is to name.
    Needs cc and nm."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", torch_library()],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = {line.split()[-1].split("@")[0] for line in symbols.splitlines()}
    driver = {name for name in names if name.startswith("cu")}
    lines = [FUNCTIONS]
    for name in sorted(driver | EMPTY):
        if f" {name}(" not in FUNCTIONS:
            lines.append(f"int {name}() {{ return 0; }}")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-w", "-x", "c", "-Wl,-soname,libcuda.so.1", "-o", path, "-"],
        input="\n".join(lines) + "\n",
        text=True,
        check=True,
    )


# --------------------------------------------------------------------------------------------------
# Fake tensors that answer when the host asks for numbers


class HostWait(Exception):
    """The host would wait for the GPU inside a step."""


class FakeCuda(FakeTensorMode):
    """Fake tensors for the stages.

    in_step: whether a training step or a sampler runs. calls: {(operation, type of its input):
    number} on CUDA.
    """

    # Otherwise the first CUDA tensor would be a real one.
    avoid_device_init = True

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.in_step = False
        self.calls = collections.Counter()
        self.masks = 0

    def wait(self, what):
        if self.in_step:
            raise HostWait(what)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = next((a for a in args if isinstance(a, torch.Tensor)), None)
        on_gpu = isinstance(first, FakeTensor) and first.fake_device.type == "cuda"
        if on_gpu:
            self.calls[str(function), str(first.dtype)] += 1
        if function is aten._local_scalar_dense.default:
            return self.number(first, on_gpu)
        if function is aten.nonzero.default:
            self.wait("nonzero")
            return first.new_zeros((first.numel(), first.ndim), dtype=torch.long)
        if function in INDEXING:
            args = (args[0], [self.chosen(index) for index in args[1]], *args[2:])
        if function is aten._to_copy.default:
            self.watch_copy(on_gpu, **kwargs)
        return super().__torch_dispatch__(function, types, args, kwargs)

    def watch_copy(self, from_gpu, device=None, non_blocking=False, **_):
        """Before a copy, to `device` if it is not None."""
        to_gpu = from_gpu if device is None else torch.device(device).type == "cuda"
        if from_gpu and not to_gpu:
            self.wait("a copy to the host")
        if to_gpu and not from_gpu and not non_blocking:
            self.wait("a blocking copy to the GPU")

    def number(self, tensor, on_gpu):
        """What the host gets for a scalar tensor."""
        if on_gpu:
            self.wait("a number")
        if not isinstance(tensor, FakeTensor):
            with unset_fake_temporarily():
                return tensor.item()
        if tensor.constant is not None:
            with unset_fake_temporarily():
                return tensor.constant.item()
        if tensor.dtype == torch.bool:
            return True
        return 1.0 if tensor.dtype.is_floating_point else 0

    def chosen(self, index):
        """A mask (N,) as the indices that it stands for: all, but none after twenty masks, so that
        loops over what is left come to an end."""
        if not (isinstance(index, FakeTensor) and index.dtype == torch.bool):
            return index
        self.wait("a mask")
        self.masks += 1
        return index.new_zeros(len(index) if self.masks <= 20 else 0, dtype=torch.long)

    def step(self, function):
        """The function, as one in which the host must not wait."""

        @functools.wraps(function)
        def watched(*args, **kwargs):
            before = self.in_step
            self.in_step = True
            try:
                return function(*args, **kwargs)
            finally:
                self.in_step = before

        return watched


INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


def to_numpy(tensor, *_, **__):
    """torch.Tensor.numpy of a fake tensor: zeros."""
    if tensor.fake_device.type != "cpu":
        raise TypeError(f"can't convert {tensor.fake_device} device type tensor to numpy")
    return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def numpy_of_fakes(plain):
    def convert(tensor, *args, **kwargs):
        if isinstance(tensor, FakeTensor):
            return to_numpy(tensor)
        return plain(tensor, *args, **kwargs)

    return convert


def replace_tensors(module, function, recurse=True):
    """nn.Module._apply, with new parameters: a fake tensor cannot change in place."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = function(parameter.detach())
                part._parameters[name] = torch.nn.Parameter(new, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = function(buffer)
    return module


def copy_of(tensor, memo):
    """copy.deepcopy of a fake tensor."""
    copy = tensor.detach().clone()
    if isinstance(tensor, torch.nn.Parameter):
        copy = torch.nn.Parameter(copy, tensor.requires_grad)
    memo[id(tensor)] = copy
    return copy


def with_real_tensors(function):
    """A function that reads files, run with real tensors on the CPU."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run


def load_then_move(load):
    """load_vae or load_sit: real tensors on the CPU, of which `to` makes fake ones."""

    def run(path, device="cpu", *args, **kwargs):
        with unset_fake_temporarily():
            network = load(path, "cpu", *args, **kwargs)
        return network.to(device)

    return run


def check_and_go_on(check):
    """Guard.check, which may find that the stand-ins for its counts are too many bad steps."""

    def run(guard, *args, **kwargs):
        with contextlib.suppress(UserError):
            check(guard, *args, **kwargs)
        guard.good = True

    return run


@contextlib.contextmanager
def fake_cuda():
    """Inside, tensors are fake and a GPU seems to be there. Gives the mode."""
    mode = FakeCuda()
    with contextlib.ExitStack() as stack:

        def put(owner, name, value):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))

        put(torch.cuda, "_lazy_init", lambda: None)
        put(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        put(torch.cuda, "get_device_name", lambda *_: "fake")
        # With this memory the search for --accum runs, and ends with its first trial.
        card = types.SimpleNamespace(total_memory=80 * 2**30)
        put(torch.cuda, "get_device_properties", lambda *_: card)
        put(torch.cuda, "get_rng_state", lambda *_: None)
        put(torch.cuda, "set_rng_state", lambda *_: None)
        put(torch.cuda, "synchronize", lambda *_: None)
        put(torch._C, "_select_conv_backend", lambda *_, **__: torch._C._ConvBackend.Cudnn)
        put(torch.Tensor, "numpy", numpy_of_fakes(torch.Tensor.numpy))
        put(torch.Tensor, "__array__", numpy_of_fakes(torch.Tensor.__array__))
        put(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
        put(FakeTensor, "__deepcopy__", copy_of)
        put(torch.nn.Module, "_apply", replace_tensors)
        for network in (models.VFM, models.LPIPS):
            put(network, "__init__", with_real_tensors(network.__init__))
        for stage in (train_vae, train_sit, sample, fid, probe):
            for name in ("load_vae", "load_sit"):
                if hasattr(stage, name):
                    put(stage, name, load_then_move(getattr(stage, name)))
        put(sample, "step_times", with_real_tensors(sample.step_times))
        put(training.Guard, "check", check_and_go_on(training.Guard.check))
        put(runs.Saver, "write", lambda *_: None)
        put(torch, "save", lambda *_: None)
        for module, name in ((train_vae, "train_step"), (train_sit, "train_step")):
            put(module, name, mode.step(getattr(module, name)))
        put(sample, "integrate", mode.step(sample.integrate))
        stack.enter_context(mode)
        yield mode


# --------------------------------------------------------------------------------------------------
# Scenarios: the commands of a user, with tiny networks


def train(stage, *flags):
    words = gpu.FLAGS[stage].format(shared="shared").split()
    words += ["--steps", "2", "--save-every", "2", "--sample-every", "2", "--device", "cuda"]
    words += ["--overwrite", "--out", f"runs/{stage}", "--precision", "bf16"]
    if stage == "sit":
        words += ["--cache", tempfile.mkdtemp(dir=".")]
    for part in flags:
        words += part.split()
    gpu.run_script(gpu.STAGES[stage], *words)


def draw(*flags):
    words = "--sit shared/sit --steps 4 --device cuda --no-compile --overwrite --precision bf16"
    gpu.run_script(sample, *words.split(), *" ".join(flags).split())


def measure(stage, words):
    gpu.run_script(stage, *words.split(), "--device", "cuda", "--workers", 0)


SCENARIOS = {
    "vae": lambda: train("vae", "--val shared/small --val-images 8 --stats-images 8"),
    "vae-options": lambda: train(
        "vae",
        "--accum 2 --recon l1 --gan-start 1 --grad-checkpoint --precision fp32 --lpips 0",
        "--shuffle-targets --noise-kind constant",
    ),
    "sit": lambda: train("sit"),
    "sit-options": lambda: train("sit", "--accum 2 --repa 0 --grad-checkpoint --precision fp32"),
    "set": lambda: draw("--num 3 --batch-size 2 --out set.npz"),
    "grid": lambda: draw("--n 2 --sampler heun --out grid.png"),
    "fid": lambda: measure(
        fid,
        "shared/small/a --ref shared/small/b --size 32 --inception-weights shared/inception.pth"
        " --out fid.json",
    ),
    "reconstruction": lambda: measure(
        fid,
        "--vae shared/vae --data shared/small/a --inception-weights shared/inception.pth"
        " --lpips-weights shared/lpips.pth --out rfid.json",
    ),
    "probe": lambda: measure(
        probe, "--vae shared/vae --data shared/objects --train-images 100 --out probe --pictures 0"
    ),
}


# --------------------------------------------------------------------------------------------------
# Faults: what a scenario must not bear


def loss_from_the_cpu(mean, logvar):
    return (mean + torch.zeros(mean.shape)).square().mean()


def loss_that_asks(predicted, target):
    loss = (predicted - target).square().mean()
    return loss / max(loss.item(), 1.0)


def stays_on_the_cpu(network, *_, **__):
    return network


def encoding_without_a_copy(vae, x, device, precision):
    return vae.encode(x)[0].numpy()


def noise_of_a_generator(seed, name, ids, shape):
    return torch.randn(len(ids), *shape, generator=torch.Generator().manual_seed(seed))


# {name: (scenario, module, name in the module, what is put there)}
FAULTS = {
    "a loss has a tensor of the CPU": ("vae", train_vae, "kl_loss", loss_from_the_cpu),
    "a loss asks for a number": ("sit", train_sit, "repa_loss", loss_that_asks),
    "a network stays on the CPU": ("vae", models.LPIPS, "to", stays_on_the_cpu),
    "latents go to NumPy": ("sit", train_sit, "encode_block", encoding_without_a_copy),
    "noise is drawn on the CPU": ("set", sample, "normal", noise_of_a_generator),
}

# --------------------------------------------------------------------------------------------------


def outcome(scenario):
    """Runs a scenario. Gives "ok", or the error with the last place in a stage where it was."""
    with fake_cuda():
        try:
            SCENARIOS[scenario]()
        except Exception as error:
            traceback.print_exc()
            frames = traceback.extract_tb(error.__traceback__)
            places = [f"{os.path.relpath(frame.filename, ROOT)}:{frame.lineno}" for frame in frames]
            ours = [place for place in places if not place.startswith(("..", "tests"))]
            return f"{ours[-1]}: {type(error).__name__}: {error}"
    return "ok"


def calls_of_a_reconstruction():
    """The operations of the f16d32 VAE on a picture of 256 pixels under autocast, as a list of
    (operation, type of the input, number)."""
    with fake_cuda() as mode:
        vae = models.VAE("f16d32", 256).to("cuda")
        x = torch.zeros(1, 3, 256, 256, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            vae.decode(vae.encode(x)[0])
    return [(*call, count) for call, count in mode.calls.items()]


def activation_memory():
    """The bytes that bench/sizes.py counts, on CUDA: {name: number}."""
    with fake_cuda(), torch.device("cuda"):
        return {
            "vae": sizes.vae_memory(False, 2, "bf16"),
            "sit": sizes.sit_memory(False, 2, "bf16"),
        }


def main():
    folder = sys.argv[1]
    os.chdir(folder)
    os.mkdir("shared")
    list(gpu.prepare(gpu.Options("cpu", True, os.path.abspath("shared"))))
    os.chdir(folder)
    results = {"calls": calls_of_a_reconstruction(), "memory": activation_memory()}
    with mock.patch.object(models.GroupNorm, "forward", torch.nn.GroupNorm.forward):
        results["calls of PyTorch's norms"] = calls_of_a_reconstruction()
    results["scenarios"] = {name: outcome(name) for name in SCENARIOS}
    results["faults"] = {}
    for fault, (scenario, *place) in FAULTS.items():
        with mock.patch.object(*place):
            results["faults"][fault] = outcome(scenario)
    with open("results.json", "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
