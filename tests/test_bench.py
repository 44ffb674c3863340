"""bench/speed.py compares equal work: the baseline and compiled steps give our losses and
gradients. Its counts, and those of bench/sizes.py, are right."""

import shutil
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import models
import train_sit
from bench import sizes, speed

SIT = dict(depth=2, width=64, heads=2, repa_block=1)
VAE = dict(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)
CPU = torch.device("cpu")
WEIGHTS = dict(align=1.0, recon=1.0, lpips=1.0, kl=1e-6, gan=0.1, flow=1.0, repa=0.5)


def two_steps(kind, **how):
    """The first two steps of a tiny SiT or VAE, a list of {term: value}, the norm of the gradient
    included. In the second one optimiser and clipping have acted. how: fields of speed.Setting."""
    setting = speed.Setting(CPU, **how)
    with speed.published(setting.baseline):
        if kind == "sit":
            step, _ = speed.sit_training(setting, "S", 2, True, **SIT)
        else:
            step, _ = speed.vae_training(setting, "f4d4", 2, 32, speed.TERMS, vfm="test_vit", **VAE)
        steps = [step(), step()]
    return [{term: value.item() for term, value in losses.items()} for losses in steps]


def total(losses):
    """The loss of everything but the discriminator."""
    return sum(weight * losses[term] for term, weight in WEIGHTS.items() if term in losses)


def assert_same_steps(found, wanted, loss_tolerance, gradient_tolerance):
    """Compares two results of two_steps, the first step term by term."""
    assert found[0].keys() == wanted[0].keys()
    for term in found[0]:
        tolerance = gradient_tolerance if term == "grad_norm" else loss_tolerance
        assert found[0][term] == pytest.approx(wanted[0][term], rel=tolerance, abs=tolerance)
    for a, b in zip(found, wanted, strict=True):
        assert total(a) == pytest.approx(total(b), rel=loss_tolerance, abs=loss_tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=gradient_tolerance)


@pytest.fixture
def simple_lpips(inside, monkeypatch):
    """Puts a mean square in the place of LPIPS: on a thin VGG it would be another network, and the
    true one is slow."""

    class MeanSquare(torch.nn.Module):
        def __init__(self, weights, rescale):
            super().__init__()

        def forward(self, a, b):
            return (a - b).square().mean((1, 2, 3))

    monkeypatch.setattr(speed.train_vae, "LPIPS", MeanSquare)
    monkeypatch.setattr(speed, "write_random_lpips", lambda path: path)


# --------------------------------------------------------------------------------------------------
# Equal work


@pytest.mark.parametrize("kind", ["sit", "vae"])
def test_the_baseline_does_our_work(kind, simple_lpips):
    ours = two_steps(kind)
    baseline = two_steps(kind, baseline=True)
    assert_same_steps(ours, baseline, loss_tolerance=1e-5, gradient_tolerance=1e-4)
    assert ours != baseline


def test_the_baseline_is_other_code_and_goes_away():
    attention, repa_loss = models.attention, train_sit.repa_loss
    with speed.published():
        assert models.attention is speed.plain_attention
        assert train_sit.repa_loss is speed.plain_repa_loss
    assert models.attention is attention
    assert train_sit.repa_loss is repa_loss


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("kind", ["sit", "vae"])
def test_compiled_steps_are_eager_steps(kind, simple_lpips):
    """torch.compile of every network of a step, on a CPU."""
    torch._dynamo.reset()
    compiled = two_steps(kind, compile=True)
    assert_same_steps(compiled, two_steps(kind), loss_tolerance=1e-4, gradient_tolerance=1e-4)


def test_attention_in_bf16_on_a_cpu_is_that_of_fp32():
    """It has code of its own there: values and gradients against PyTorch's, of the same rounded
    numbers."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 50, 16).bfloat16().requires_grad_() for _ in range(3)]
    copies = [x.detach().float().requires_grad_() for x in inputs]
    assert_same_in_bf16(models.attention, inputs, F.scaled_dot_product_attention, copies)


def assert_same_in_bf16(function, inputs, exact, copies):
    """function(*inputs) in bf16 against exact(*copies) in fp32: values and gradients within 1%."""
    found = function(*inputs)
    wanted = exact(*copies)
    assert found.dtype == torch.bfloat16
    gradient = torch.randn(found.shape).to(found)
    found.backward(gradient)
    wanted.backward(gradient.float())
    pairs = [(found, wanted)]
    pairs += [(x.grad, copy.grad) for x, copy in zip(inputs, copies, strict=True)]
    for a, b in pairs:
        assert (a.float() - b).norm() < 0.01 * b.norm()


# --------------------------------------------------------------------------------------------------
# Memory and operations


def test_sit_grad_checkpoint_changes_nothing_but_memory():
    torch.manual_seed(0)
    net = models.SiT("S", 2, 4, 8, vfm_dim=16, depth=4, width=64, heads=2, repa_block=2)
    speed.wake(net)
    x, t, y = torch.randn(16, 4, 8, 8), torch.rand(16), torch.arange(16)
    gradients = {}
    peaks = {}
    for grad_checkpoint in (False, True):
        net.grad_checkpoint = grad_checkpoint
        net.zero_grad()
        with sizes.LiveMemory() as memory:
            v, tokens = net(x, t, y, tokens=True)
            (v.square().mean() + tokens.square().mean()).backward()
        gradients[grad_checkpoint] = [p.grad.clone() for p in net.parameters()]
        peaks[grad_checkpoint] = memory.peak
    for plain, recomputed in zip(gradients[False], gradients[True], strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-7)
    assert peaks[True] < peaks[False]


def test_the_memory_of_stage_1_grows_with_the_pictures_in_a_pass():
    found = sizes.stage_1_memory((1, 2), "bf16")
    for plain, recomputed in found.values():
        assert recomputed < plain
    # What grows is more than what the VAE alone takes, and what does not is at least the weights.
    growth = found[2][0] - found[1][0]
    with mock.patch.object(models, "attention", F.scaled_dot_product_attention):
        one = sizes.vae_memory(False, 1, "bf16")
        two = sizes.vae_memory(False, 2, "bf16")
    assert growth > two - one
    assert found[1][0] - growth > 16 * sizes.parameter_counts()["VAE f16d32 and mapper"]


@pytest.mark.parametrize("attention", [models.attention, speed.plain_attention])
def test_operations_of_attention_are_its_two_products(attention):
    q, k, v = (torch.randn(2, 3, 7, 16, requires_grad=True) for _ in range(3))
    counted = speed.count_operations(lambda: attention(q, k, v).sum().backward())
    product = 2 * (2 * 3 * 7 * 7 * 16)
    # The backward pass of a product is two products.
    assert counted == 3 * 2 * product


def test_live_memory_is_what_is_alive():
    with sizes.LiveMemory() as memory:
        a = torch.zeros(1000)
        # A view is no memory.
        b = a.view(10, 100) + 1
        del a
        c = F.relu(b)
    assert memory.peak == 8000
    assert memory.bytes == b.nbytes + c.nbytes


def test_guidance_doubles_the_evaluations_where_it_acts():
    assert speed.guided_evaluations("ode", 4, cfg=1.0) == 4
    # At t = 1, 0.75, 0.5 and 0.25, of which the last three are guided.
    assert speed.guided_evaluations("ode", 4, cfg=2.5) == 7
    assert speed.guided_evaluations("sde", 2, cfg=2.5) == 3
