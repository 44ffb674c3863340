"""bench/speed.py compares equal work: the baseline and compiled steps give our losses and gradients. Its counts are right."""

import shutil
import types

import pytest
import torch
import torch.nn.functional as F

import models
import train_sit
from bench import speed as bench, sizes

SIT = dict(depth=2, width=64, heads=2, repa_block=1)
VAE = dict(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_levels=(2,))


def steps(kind, count, baseline=False, compile=False):
    """[(loss, gradient norm)] of the first `count` steps of a tiny SiT or VAE."""
    m = types.SimpleNamespace(
        device=torch.device("cpu"), precision="fp32", baseline=baseline, compile=compile
    )
    with bench.published(baseline):
        if kind == "sit":
            step, batch = bench.sit_training(m, "S", 2, True, vfm_dim=16, **SIT)
        else:
            step, batch = bench.vae_training(m, "f4d4", 2, 32, bench.TERMS, "test_vit", **VAE)
        return torch.tensor([[v.item() for v in step()] for _ in range(count)])


@pytest.fixture
def no_weight_files(inside, monkeypatch):
    """LPIPS on a thin VGG would be another network, and the true one is slow: a stand-in for its two calls."""
    monkeypatch.setattr(
        bench, "random_lpips", lambda m: lambda a, b: (a - b).square().mean((1, 2, 3))
    )


@pytest.mark.parametrize("kind", ["sit", "vae"])
def test_the_baseline_does_our_work(kind, no_weight_files):
    """Two steps, so that optimiser and clipping have acted; the plain functions must have been called."""
    ours, theirs = steps(kind, 2), steps(kind, 2, baseline=True)
    torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[:, 1], theirs[:, 1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(ours[0], ours[1])


def test_the_baseline_is_another_code_and_goes_away():
    fast = models.attention, train_sit.repa_loss
    with bench.published():
        assert models.attention is bench.plain_attention and train_sit.repa_loss is not fast[1]
    assert (models.attention, train_sit.repa_loss) == fast


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("kind", ["sit", "vae"])
def test_compiled_steps_are_eager_steps(kind, no_weight_files):
    """torch.compile of every network of a step, on a CPU."""
    torch._dynamo.reset()
    torch.testing.assert_close(steps(kind, 2, compile=True), steps(kind, 2), rtol=1e-4, atol=1e-4)


def test_sit_grad_checkpoint_changes_nothing_but_memory():
    torch.manual_seed(0)
    net, grads, peaks = (
        bench.wake(models.SiT("S", 2, 4, 8, vfm_dim=16, depth=4, width=64, heads=2, repa_block=2)),
        [],
        [],
    )
    x, t, y = torch.randn(16, 4, 8, 8), torch.rand(16), torch.arange(16)
    for net.grad_checkpoint in (False, True):
        net.zero_grad()
        with sizes.LiveMemory() as memory:
            v, tokens = net(x, t, y, tokens=True)
            (v.square().mean() + tokens.square().mean()).backward()
        grads.append([p.grad.clone() for p in net.parameters()])
        peaks.append(memory.peak)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads)) and peaks[1] < peaks[0]


def test_attention_and_group_norm_in_bf16_on_a_cpu_are_those_of_fp32():
    """Both have their own code there: values and gradients against PyTorch's, of the same rounded numbers."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, 3, 50, 16).bfloat16() for _ in range(4))
    x, gx = (
        torch.randn(3, 24, 6, 10).bfloat16().to(memory_format=torch.channels_last) + 0.5
        for _ in range(2)
    )
    norm = models.GroupNorm(24, 4)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    for fast, exact, inputs, grad in (
        (models.attention, F.scaled_dot_product_attention, (q, k, v), g),
        (
            lambda x, *_: norm(x),
            lambda x, w, b: F.group_norm(x, 4, w, b, 1e-6),
            (x, norm.weight, norm.bias),
            gx,
        ),
    ):
        found = fast(*(t.requires_grad_() for t in inputs))
        wanted = exact(*(copies := [t.detach().float().requires_grad_() for t in inputs]))
        found.backward(grad), wanted.backward(grad.float())
        assert found.dtype == torch.bfloat16
        for a, b in [(found, wanted), *((t.grad, c.grad) for t, c in zip(inputs, copies))]:
            assert (a.float() - b).norm() < 0.01 * b.norm()


def test_operations_of_attention_are_its_two_products():
    q, k, v = (torch.randn(2, 3, 7, 16, requires_grad=True) for _ in range(3))

    def count(attention):
        return bench.count_flop(lambda: attention(q, k, v).sum().backward())

    assert (
        count(models.attention) == count(bench.plain_attention) == 3 * 2 * (2 * 2 * 3 * 7 * 7 * 16)
    )


def test_live_memory_is_what_is_alive():
    with sizes.LiveMemory() as memory:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1  # a view is no memory
        del a
        c = F.relu(b)
    assert memory.peak == 8000 and memory.bytes == b.nbytes + c.nbytes
