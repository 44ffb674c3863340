"""What CPUs can hold of the behaviour on GPUs: the stages run compiled, as they do on CUDA by
default, and give the losses of eager ones; compiled batch norms over several processes have the
right gradients; and bench/gpu.py, which checks the rest on a card, runs, and tells right from
wrong."""

import functools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F

import models
import sample
import train_sit
import train_vae
from bench import gpu, speed
from common import processes
from common.weights import load_vae
from conftest import ROOT, SIT, VAE, read_metrics, script, torchrun

NOT_LOSSES = {"step", "epoch"}


@pytest.fixture
def traced_only(monkeypatch):
    """torch.compile without code generation, which takes minutes on a CPU. The modules that it
    returns are those of the default backend."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def lpips_weights(tmp_path_factory):
    return speed.write_random_lpips(str(tmp_path_factory.mktemp("lpips") / "lpips.pth"))


def assert_same_losses(found, wanted, terms, tolerance):
    """Compares the losses that two runs logged at every step."""
    found = read_metrics(os.path.join(found, "metrics.jsonl"))
    wanted = read_metrics(os.path.join(wanted, "metrics.jsonl"))
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys() == {*terms, *NOT_LOSSES}
        for term in terms:
            assert a[term] == pytest.approx(b[term], rel=tolerance, abs=tolerance)


# --------------------------------------------------------------------------------------------------
# The stages, compiled

VAE_TERMS = ["align", "recon", "lpips", "kl", "gan", "disc", "grad_norm"]
SIT_TERMS = ["flow", "repa", "grad_norm"]


@pytest.fixture(scope="module")
def data_words(pictures, vfm_weights):
    return ["--data", pictures, "--vfm-weights", vfm_weights, "--lr", "1e-4", "--steps", 2]


@pytest.fixture(scope="module")
def eager(data_words, lpips_weights, tmp_path_factory):
    """Folder with two eager runs, vae (with all losses) and sit (with REPA), and their flags as
    {name: words}."""
    folder = tmp_path_factory.mktemp("eager")
    words = {
        "vae": [*VAE, *data_words, "--lpips", 1, "--lpips-weights", lpips_weights],
        "sit": [*SIT, *data_words, "--vae", folder / "vae"],
    }
    for name, stage in (("vae", train_vae), ("sit", train_sit)):
        script(stage, *words[name], "--no-compile", "--out", folder / name)
    return folder, words


def test_a_compiled_vae_training_has_the_losses_of_an_eager_one(eager, inside, traced_only):
    """With every loss, and so with every network: a compiled network has no truth value."""
    folder, words = eager
    script(train_vae, *words["vae"], "--compile", "--out", "compiled")
    assert_same_losses("compiled", folder / "vae", VAE_TERMS, 1e-4)


def test_a_compiled_sit_training_has_the_losses_of_an_eager_one(eager, inside, traced_only):
    folder, words = eager
    script(train_sit, *words["sit"], "--compile", "--out", "compiled")
    assert_same_losses("compiled", folder / "sit", SIT_TERMS, 1e-4)


@pytest.fixture(scope="module")
def eager_set(eager):
    """The flags of a set of five pictures, two in a batch, and its pictures (5,32,32,3), drawn by
    an eager SiT. Four of the five steps are guided."""
    folder, _ = eager
    words = ["--sit", folder / "sit", "--num-images", 5, "--batch-size", 2, "--steps", 5]
    words += ["--precision", "fp32"]
    script(sample, *words, "--no-compile", "--out", folder / "set.npz")
    return words, np.load(folder / "set.npz")["arr_0"].astype(int)


def kinds_of_blocks(vae):
    """The kinds and sizes of the blocks that a decoder's pass meets."""
    kinds = set()

    def note(block, inputs, output):
        kinds.add((type(block), inputs[0].shape[1:], output.shape[1:]))

    for block in models.repeated_blocks(vae.decoder):
        block.register_forward_hook(note)
    with torch.no_grad():
        vae.decode(torch.zeros(1, vae.channels, vae.latent_size, vae.latent_size))
    return kinds


def test_compiled_sampling_draws_the_pictures_of_eager_sampling(
    eager, eager_set, inside, traced_only
):
    """And compiles the SiT's block for a batch and for a doubled one, and each kind of block of the
    decoder. The last batch has one picture, and compiles nothing."""
    words, wanted = eager_set
    statistics = torch._dynamo.utils.counters["stats"]
    before = statistics["unique_graphs"]
    script(sample, *words, "--compile", "--out", "compiled.npz")
    folder, _ = eager
    kinds = kinds_of_blocks(load_vae(str(folder / "vae")))
    assert statistics["unique_graphs"] - before == 2 + len(kinds) > 3
    assert np.abs(np.load("compiled.npz")["arr_0"] - wanted).max() <= 1


def test_two_compiled_processes_draw_the_pictures_of_an_eager_one(eager_set, inside):
    words, wanted = eager_set
    own = ["--compile", "--out", "compiled.npz"]
    torchrun(2, "tests/aot_eager", "sample", *words, *own, cwd=inside)
    assert np.abs(np.load("compiled.npz")["arr_0"] - wanted).max() <= 1


def test_transformers_are_compiled_by_blocks_and_cnns_as_wholes():
    """Every block of a vision transformer is found. What a CNN calls blocks are unlike stages."""
    transformer = timm.create_model("test_vit")
    assert models.transformer_blocks(transformer) == list(transformer.blocks)
    assert len(transformer.blocks) > 1
    assert models.transformer_blocks(timm.create_model("test_efficientnet")) == []
    sit = models.SiT("S", 2, 4, 8, num_classes=2, depth=3, width=64, heads=2)
    assert models.repeated_blocks(sit) == list(sit.blocks)


def test_a_machine_without_a_compiler_gets_a_sentence(capsys, monkeypatch):
    """Where inductor finds none when it compiles, and where Triton finds none when it runs."""
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-compiler-of-this-name"))
    torch._dynamo.reset()

    def on_cpu():
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))

    def on_cuda():
        build = pytest.importorskip("triton.runtime.build")
        if not hasattr(build, "_find_compiler"):
            pytest.skip("Triton 3.2 has no function that only looks for a compiler")
        build._find_compiler.__wrapped__("c")

    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    for work in (on_cpu, on_cuda):
        with pytest.raises(SystemExit) as stop:
            processes.run_main(work)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert "compiler" in error
        assert "--no-compile" in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "terms", "flags"),
    [("vae", VAE_TERMS, []), ("sit", SIT_TERMS, ["--grad-checkpoint"])],
)
def test_two_compiled_processes_have_the_losses_of_an_eager_one(eager, inside, name, terms, flags):
    """With gradient checkpointing, torch 2.6 and 2.8 could not compile the SiT's step."""
    folder, words = eager
    stage = f"train_{name}"
    own = ["--compile", *flags, "--out", "compiled"]
    torchrun(2, "tests/aot_eager", stage, *words[name], *own, cwd=inside)
    assert_same_losses("compiled", folder / name, terms, 1e-4)


# --------------------------------------------------------------------------------------------------
# Batch norms over several processes, compiled


def discriminator_gradients(x, compiled):
    """Gradients of the hinge loss of a PatchDiscriminator on pictures (B,3,H,W), this process's
    share, averaged over the processes: {name: gradient}."""
    torch.manual_seed(0)
    net = models.PatchDiscriminator()
    if compiled:
        net.compile(backend="aot_eager")
    forward = processes.parallel(net)
    F.relu(1 - forward(x)).mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def pictures_with_shares():
    """Pictures (8,3,32,32) whose two halves have different means and scales."""
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x[4:] = 0.3 * x[4:] + 0.5
    return x


def gradients_of_a_share(rank, folder):
    """One of two processes: rank 0 writes the gradients, eager and compiled, into the folder."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    x = pictures_with_shares().chunk(2)[rank]
    found = {compiled: discriminator_gradients(x, compiled) for compiled in (False, True)}
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    dist.destroy_process_group()


def test_batch_norms_of_two_processes_have_the_gradients_of_one(tmp_path):
    """Compiled by torch 2.11, the gradient of the layer before a batch norm was 11% off."""
    torch.multiprocessing.spawn(gradients_of_a_share, (str(tmp_path),), nprocs=2)
    wanted = discriminator_gradients(pictures_with_shares(), compiled=False)
    found = torch.load(tmp_path / "gradients.pt")
    for compiled in (False, True):
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[compiled][name], gradient, rtol=1e-3, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# bench/gpu.py


def run_gpu_bench(out, *words):
    """Runs python -m bench.gpu as a rehearsal. Returns its exit code, what it printed, and its
    record."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--tiny", *map(str, words)],
        cwd=ROOT,
        env=dict(os.environ, OUT=str(out), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=1700,
    )
    with open(out / "gpu.json") as file:
        return done.returncode, done.stdout + done.stderr, json.load(file)


def test_the_whole_rehearsal_passes(tmp_path):
    code, printed, record = run_gpu_bench(tmp_path, "--limit", 1500)
    assert code == 0, printed
    options = gpu.Options("cpu", True, "shared")
    names = [check.name for check in gpu.list_checks(options)]
    assert sorted(check["name"] for check in record["checks"]) == sorted(names)
    assert all(check["passed"] for check in record["checks"])
    assert len(re.findall(r"^PASS ", printed, re.MULTILINE)) == len(names)
    assert record["provenance"]["torch"] == torch.__version__

    table = gpu.markdown(record, "python -m bench.gpu --tiny")
    assert table[0].startswith("## ")
    assert f"Passed: {', '.join(check['name'] for check in record['checks'])}." in table
    measured = [check for check in record["checks"] if "pictures/s" in check["numbers"]]
    assert len(measured) > 10
    for check in measured:
        assert any(line.startswith(f"| {check['name']} |") for line in table)


def test_a_record_that_is_cut_off_is_whole(tmp_path):
    """What is done when the time is over stays, and the rest is named."""
    code, printed, record = run_gpu_bench(tmp_path, "--limit", 0.2, "--only", "draws", "probe")
    assert code == 2
    names = [check["name"] for check in record["checks"]]
    assert sorted(names) == ["draws", "prepare", "probe"]
    assert not all(check["passed"] for check in record["checks"])
    assert "probe" in printed


def good(options, share):
    yield {"share": share}
    yield {"rate, TFLOP/s": 2.5}


def wrong(options):
    yield {"deviation": 0.5}
    gpu.require(False, "the losses deviate")


def raising(options):
    print("what happened")
    raise ValueError("of two\nlines")
    yield {}


def killed(options):
    yield {"before": 1}
    os._exit(9)


def hanging(options):
    yield {"before": 1}
    subprocess.run(["sleep", "60"])


ODD_CHECKS = [
    gpu.Check("good", good, {"share": 0.5}, 60, alone=True),
    gpu.Check("hanging", hanging, {}, 3),
    gpu.Check("wrong", wrong, {}, 60),
    gpu.Check("raising", raising, {}, 60),
    gpu.Check("killed", killed, {}, 60),
]


def run_odd_checks(folder):
    """Runs them in `folder` and prints the results as JSON: {name: result} and, under "context",
    how their processes were started."""
    results = {"context": gpu.process_context().get_start_method()}

    def done(result):
        results[result["name"]] = result

    gpu.run_checks(ODD_CHECKS, gpu.Options("cpu", True, folder), folder, 200, done)
    print(json.dumps(results))


def test_a_check_that_fails_hangs_or_dies_is_told_from_a_good_one(tmp_path):
    # A process of its own: the checks are forked from one that only imports.
    program = "import sys, test_gpu; test_gpu.run_odd_checks(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join([ROOT, os.path.dirname(__file__)])),
        capture_output=True,
        text=True,
        timeout=250,
    )
    results = json.loads(done.stdout)
    # An import that asks for CUDA would forbid forking, and each process would spend seconds on
    # imports.
    assert results.pop("context") == "fork"
    assert [name for name, result in results.items() if result["passed"]] == ["good"]
    assert results["good"]["numbers"] == {"share": 0.5, "rate, TFLOP/s": 2.5}
    assert results["wrong"]["error"] == "the losses deviate"
    assert results["wrong"]["numbers"] == {"deviation": 0.5}
    assert results["raising"]["error"] == "ValueError: of two lines"
    assert "what happened" in results["raising"]["output"]
    assert results["killed"]["error"] == "the process ended with code 9"
    assert results["hanging"]["error"] == "not done after 3 seconds"
    # Numbers from before the end are kept.
    assert results["killed"]["numbers"] == results["hanging"]["numbers"] == {"before": 1}


def test_speed_is_measured_while_nothing_else_runs():
    alone = gpu.Check("alone", good, {}, 1, alone=True)
    together = gpu.Check("together", good, {}, 1)
    assert gpu.may_start(alone, [])
    assert not gpu.may_start(alone, [together])
    assert not gpu.may_start(together, [alone])
    assert gpu.may_start(together, [together])
    assert not gpu.may_start(together, [together] * gpu.AT_ONCE)


def test_a_deviation_is_the_largest_of_all_terms_and_steps():
    wanted = dict(align=np.array([1.0, 2.0]), gan=np.array([0.0, 0.01]))
    found = dict(align=np.array([1.0, 2.2]), gan=np.array([0.001, 0.01]))
    assert gpu.deviation(found, wanted) == pytest.approx(0.1)
    assert gpu.deviation(wanted, wanted) == 0
    assert gpu.deviation(dict(wanted, gan=np.array([0.0, np.nan])), wanted) == np.inf
    with pytest.raises(gpu.Failed):
        gpu.deviation(dict(align=wanted["align"]), wanted)
