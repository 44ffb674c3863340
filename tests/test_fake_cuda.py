"""The stages' main() on CUDA tensors that are not there (fake_cuda.py): everything is on the right
device, no step waits for the GPU, and CUDA's autocast does what a CPU's does.

    python -m pytest tests/test_fake_cuda.py
"""

import json
import os
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch.nn.functional as F

import fake_cuda
import models
from bench import sizes
from conftest import ROOT


def environment(library):
    """The environment of a process for which one GPU is there."""
    variables = dict(os.environ, LD_PRELOAD=library, OMP_NUM_THREADS="1")
    del variables["CUDA_VISIBLE_DEVICES"]
    return variables


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    for tool in ("cc", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no C compiler ({tool}) for the library that stands in for CUDA")
    if not os.path.exists(fake_cuda.torch_library()):
        pytest.skip("this torch was built without CUDA")
    path = str(tmp_path_factory.mktemp("library") / "libcuda.so.1")
    fake_cuda.build_library(path)
    return path


@pytest.fixture(scope="module")
def results(library, tmp_path_factory):
    """What fake_cuda.py found, and under "output" what it printed."""
    folder = tmp_path_factory.mktemp("fake_cuda")
    done = subprocess.run(
        [sys.executable, fake_cuda.__file__, folder],
        env=environment(library),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads((folder / "results.json").read_text()), output=done.stderr)


@pytest.mark.parametrize("name", fake_cuda.SCENARIOS)
def test_a_stage_runs_on_a_gpu(results, name):
    assert results["scenarios"][name] == "ok", results["output"][-4000:]


@pytest.mark.parametrize(
    ("fault", "error"),
    {
        "a loss has a tensor of the CPU": "cuda",
        "a loss asks for a number": "HostWait: a number",
        "a network stays on the CPU": "cuda",
        "latents go to NumPy": "to numpy",
        "noise is drawn on the CPU": "cuda",
    }.items(),
)
def test_a_planted_fault_is_found(results, fault, error):
    assert error in results["faults"][fault]


def counts(calls, kind):
    """How often the VAE computed a group norm, and how often a SiLU, on a type."""
    return [
        sum(n for name, dtype, n in calls if (name, dtype) == (operation, f"torch.{kind}"))
        for operation in ("aten.native_group_norm.default", "aten.silu.default")
    ]


def test_norms_and_activations_run_in_bf16(results):
    """Left to itself, CUDA's autocast has all norms in fp32, and the SiLUs after them."""
    parts = list(models.VAE("f16d32", 256).modules())
    norms = sum(isinstance(part, models.GroupNorm) for part in parts)
    # Those of attention blocks have none after them.
    activations = norms - sum(isinstance(part, models.AttnBlock) for part in parts)
    assert counts(results["calls"], "bfloat16") == [norms, activations]
    assert counts(results["calls"], "float32") == [0, 0]
    assert counts(results["calls of PyTorch's norms"], "float32") == [norms, activations]


def test_the_tables_of_memory_are_those_of_cuda(results):
    """bench/sizes.py counts on CPU tensors."""
    with mock.patch.object(models, "attention", F.scaled_dot_product_attention):
        assert results["memory"]["vae"] == pytest.approx(sizes.vae_memory(False, 2, "bf16"), 0.01)
        assert results["memory"]["sit"] == pytest.approx(sizes.sit_memory(False, 2, "bf16"), 0.01)


def test_the_tests_see_no_gpu_on_a_machine_that_has_one(library):
    for module, sees in (("torch", True), ("conftest", False)):
        program = f"import {module}, torch; print(torch.cuda.is_available())"
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=dict(environment(library), PYTHONPATH=f"{ROOT}:{ROOT}/tests"),
            capture_output=True,
            text=True,
        )
        assert done.stdout.split() == [str(sees)], done.stderr
