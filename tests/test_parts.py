"""The mathematics, each against an independent formula: draws, crop, flow, samplers, losses, averages, networks."""

import argparse
import copy
import json
import math
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats

from common.draws import _mix, normal, uniform
from common.files import UserError
from common.pictures import (
    adm_crop,
    check_picture,
    from_uint8,
    load_image,
    save_grid,
    to_rgb,
    to_uint8,
)
from common.processes import run_main
from common.runs import RunLog, match_memory_formats
from common.training import Guard, ema_update
import models
import sample
import train_sit
import train_vae


# ---- random draws ----------------------------------------------------------------------------------------------------


def test_splitmix64_is_the_published_generator():
    """First outputs of SplitMix64 from seed 1234567, the test vector that goes round with its C code."""
    golden = -0x61C8864680B583EB
    x = 1234567 + golden * torch.arange(1, 6)
    got = [int(v) & 0xFFFFFFFFFFFFFFFF for v in _mix(x)]
    assert got == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_draws_are_normal_uniform_and_independent():
    x = normal(3, "noise", torch.arange(400), (5, 10, 10)).double()
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(x.flatten(1).corrcoef().fill_diagonal_(0)).max() < 0.25  # 5.6 sigma of 1/sqrt(500)
    assert stats.kstest(uniform(3, "time", torch.arange(50000)).numpy(), "uniform").pvalue > 0.01
    for other in (
        normal(4, "noise", torch.arange(400), (5, 10, 10)),
        normal(3, "eps", torch.arange(400), (5, 10, 10)),
    ):
        assert abs(np.corrcoef(x.flatten(), other.flatten())[0, 1]) < 0.01


def test_draws_belong_to_the_sample_and_not_to_the_batch():
    whole = normal(0, "noise", torch.arange(20), (3, 4, 4))
    assert torch.equal(whole[[7, 2]], normal(0, "noise", torch.tensor([7, 2]), (3, 4, 4)))


# ---- pictures --------------------------------------------------------------------------------------------------------


def bicubic_matrix(n_in, n_out):
    """Rows of weights of a bicubic (a = -1/2) resize with the filter widened when shrinking, in float64."""
    scale = n_in / n_out
    width = max(scale, 1.0)
    d = np.abs((np.arange(n_in)[None] + 0.5 - (np.arange(n_out)[:, None] + 0.5) * scale) / width)
    w = np.where(
        d < 1, 1.5 * d**3 - 2.5 * d**2 + 1, np.where(d < 2, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2, 0)
    )
    return w / w.sum(1, keepdims=True)


def box_matrix(n):
    """Rows of weights that halve n pixels: the mean of those whose centres lie within half an output pixel."""
    scale = n / (n // 2)
    d = ((np.arange(n)[None] + 0.5) - (np.arange(n // 2)[:, None] + 0.5) * scale) / scale
    w = ((d > -0.5) & (d <= 0.5)).astype(float)
    return w / w.sum(1, keepdims=True)


def two_passes(y, rows, columns):
    """Resize y (H,W,3): columns, then rows, each rounded to 8 bits half up, as Pillow does on 8-bit pictures."""
    for equation, weights in (("ec,bcd->bed", columns), ("ab,bcd->acd", rows)):
        y = np.floor(np.einsum(equation, weights, y) + 0.5).clip(0, 255)
    return y


@pytest.mark.parametrize(
    "width,height,size", [(500, 333, 64), (48, 40, 32), (20, 31, 32), (64, 64, 32), (131, 300, 32)]
)
def test_adm_crop_against_float_reference(width, height, size):
    x = np.random.default_rng(0).integers(
        0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8
    )
    image = Image.fromarray(x).resize((width, height), Image.BICUBIC)
    y = np.asarray(image).astype(np.float64)
    while min(y.shape[:2]) >= 2 * size:
        y = two_passes(y, box_matrix(y.shape[0]), box_matrix(y.shape[1]))
    scale = size / min(y.shape[:2])
    h, w = round(y.shape[0] * scale), round(y.shape[1] * scale)
    y = two_passes(y, bicubic_matrix(y.shape[0], h), bicubic_matrix(y.shape[1], w))
    top, left = (h - size) // 2, (w - size) // 2
    got = adm_crop(image, size)
    assert got.shape == (size, size, 3) and got.dtype == np.uint8
    error = np.abs(got - y[top : top + size, left : left + size])
    assert error.max() <= 1 and error.mean() < 0.25  # exact halves may round either way


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    grey = np.tile(np.arange(256, dtype=np.uint8), (32, 1))
    kinds = {
        m: Image.fromarray(grey).convert("RGB").convert(m)
        for m in ("L", "RGBA", "CMYK", "P", "1", "LA", "YCbCr")
    }
    kinds["I;16"] = Image.fromarray(grey.astype(np.uint16) * 257)
    for mode, image in kinds.items():
        kind = dict(CMYK="tif", YCbCr="jpg").get(
            mode, "png"
        )  # Pillow 12.3 cannot read the YCbCr TIFFs it writes
        path = tmp_path / f"{mode.replace(';', '')}.{kind}"
        image.save(path)
        assert isinstance(check_picture(path), tuple), mode
        x = load_image(path, 32)
        assert x.shape == (32, 32, 3) and (mode == "1" or np.ptp(x) > 20), mode
    x = np.asarray(to_rgb(Image.open(tmp_path / "I16.png")))
    assert np.abs(x.astype(int) - grey[..., None]).max() == 0  # PIL alone clips 16 bits to white


def test_uint8_and_back():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    y = from_uint8(x)
    assert y.min() == -1 and y.max() == 1 and torch.equal(to_uint8(y), x)


def test_a_grid_shows_every_pixel(tmp_path):
    """Pictures of 32 pixels are enlarged fourfold, on white."""
    rows = torch.arange(2 * 3 * 3 * 32 * 32).remainder(251).to(torch.uint8).view(2, 3, 3, 32, 32)
    save_grid(str(tmp_path / "a.png"), rows)
    x = np.asarray(Image.open(tmp_path / "a.png"))
    assert (
        x.shape == (2 * 136 + 8, 3 * 136 + 8, 3)
        and (x[:8] == 255).all()
        and (x[:, -8:] == 255).all()
    )
    for i in range(2):
        for j in range(3):
            cell = x[8 + 136 * i : 136 * (i + 1), 8 + 136 * j : 136 * (j + 1)]
            assert np.array_equal(
                cell, np.repeat(np.repeat(rows[i, j].permute(1, 2, 0).numpy(), 4, 0), 4, 1)
            )


# ---- flow: velocity, score, samplers on a Gaussian, where all is known ------------------------------------------------

MU, A = (
    torch.tensor([0.7, -0.4]).double(),
    torch.tensor([[0.9, 0.2], [0.2, 0.5]]).double(),
)  # data ~ N(MU, A)


def moments(t):
    """Mean and covariance of x_t = (1-t) x + t eps."""
    return (1 - t) * MU, (1 - t) ** 2 * A + t**2 * torch.eye(2).double()


def gaussian_velocity(x, t):
    """E[eps - x | x_t = x], x (B,2), float64."""
    mean, cov = moments(t)
    gain = (t * torch.eye(2).double() - (1 - t) * A) @ torch.linalg.inv(
        cov
    )  # cov(eps - x, x_t) cov(x_t)^-1
    return -MU + (x - mean) @ gain.T


def test_interpolate_is_the_path_and_its_derivative():
    x, eps = torch.randn(4, 2, 3, 3).double(), torch.randn(4, 2, 3, 3).double()
    t = torch.rand(4).double()
    path, v = torch.func.jvp(
        lambda s: train_sit.interpolate(x, eps, s)[0], (t,), (torch.ones_like(t),)
    )
    assert torch.allclose(v, train_sit.interpolate(x, eps, t)[1])
    assert torch.equal(train_sit.interpolate(x, eps, t * 0)[0], x) and torch.equal(
        train_sit.interpolate(x, eps, t * 0 + 1)[0], eps
    )


@pytest.mark.parametrize("t", [0.05, 0.4, 0.97])
def test_score_from_velocity_is_the_gradient_of_log_density(t):
    x = torch.randn(6, 2).double().requires_grad_()
    mean, cov = moments(t)
    log_density = torch.distributions.MultivariateNormal(mean, cov).log_prob(x).sum()
    score = torch.autograd.grad(log_density, x)[0]
    v = gaussian_velocity(x, t)
    assert torch.allclose(-((1 - t) * v + x) / t, score, atol=1e-10)


@pytest.mark.parametrize(
    "sampler,steps,tolerance", [("sde", 250, 0.03), ("ode", 250, 0.03), ("heun", 25, 0.03)]
)
def test_samplers_reproduce_a_gaussian(sampler, steps, tolerance):
    """8,000 points: standard error of a mean 0.011, of a variance 0.016 of itself."""
    ids = torch.arange(8000)

    def velocity(x, t):
        return gaussian_velocity(x.flatten(1).double(), t).view_as(x)

    z = sample.integrate(
        velocity,
        normal(0, "start", ids, (2, 1, 1)),
        sampler,
        steps,
        lambda i: normal(0, f"step {i}", ids, (2, 1, 1)),
    )
    z = z.flatten(1)
    assert torch.allclose(z.mean(0), MU, atol=tolerance) and torch.allclose(
        z.T.cov(), A, atol=tolerance
    )


def test_sde_noise_matters():
    """Without its noise the SDE's drift alone must miss the covariance: the test above can fail."""
    x = normal(0, "start", torch.arange(8000), (2, 1, 1))
    z = sample.integrate(
        lambda x, t: gaussian_velocity(x.flatten(1).double(), t).view_as(x),
        x,
        "sde",
        250,
        lambda i: torch.zeros_like(x),
    ).flatten(1)
    assert (z.T.cov() - A).abs().max() > 0.1


class TwoClasses(torch.nn.Module):
    """A velocity that tells which labels it was asked with; 2 is the null label."""

    num_classes = 2

    def forward(self, x, t, y):
        self.asked = len(x)
        return x * (y + 1).view(-1, 1, 1, 1)


def test_guidance():
    net, x, y = TwoClasses(), torch.randn(3, 1, 2, 2), torch.tensor([0, 1, 0])
    plain = net(x, None, y)
    assert (
        torch.equal(sample.guided_velocity(net, x, 0.5, y, 1.0, (0, 1)), plain) and net.asked == 3
    )
    assert (
        torch.equal(sample.guided_velocity(net, x, 0.8, y, 3.0, (0, 0.75)), plain)
        and net.asked == 3
    )
    guided = sample.guided_velocity(net, x, 0.75, y, 3.0, (0, 0.75))
    assert net.asked == 6 and torch.allclose(guided, 3 * x + 3 * (plain - 3 * x))


# ---- losses and averages ---------------------------------------------------------------------------------------------


def test_align_loss_is_one_minus_cosine_in_float64():
    a, b = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    want = np.mean(
        [
            [1 - np.dot(p, q) / np.linalg.norm(p) / np.linalg.norm(q) for p, q in zip(r, s)]
            for r, s in zip(a.double().numpy(), b.double().numpy())
        ]
    )
    assert math.isclose(train_vae.align_loss(a, b).item(), want, rel_tol=1e-5)
    assert math.isclose(train_sit.repa_loss(a, b).item(), want - 1, rel_tol=1e-5)


def test_kl_loss_is_torch_distributions():
    mean, logvar = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    want = (
        torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, (0.5 * logvar).exp()),
            torch.distributions.Normal(0.0, 1.0),
        )
        .sum((1, 2, 3))
        .mean()
    )
    assert torch.allclose(train_vae.kl_loss(mean, logvar), want, rtol=1e-5)


def test_label_dropout_rate():
    y = torch.arange(100000) % 10
    dropped = (
        train_sit.drop_labels(y, uniform(0, "label dropout", torch.arange(100000)), 0.1, 10) == 10
    )
    assert abs(dropped.float().mean() - 0.1) < 0.004  # 4 standard errors
    assert torch.equal(train_sit.drop_labels(y, torch.zeros(100000), 0.0, 10), y)


def test_ema_is_its_closed_form():
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    start, weights = a.weight.detach().clone().double(), []
    for _ in range(7):
        with torch.no_grad():
            b.weight.normal_()
        weights.append(b.weight.detach().clone().double())
        ema_update(a, b, 0.9)
    want = 0.9**7 * start + sum(0.1 * 0.9 ** (6 - i) * w for i, w in enumerate(weights))
    assert torch.allclose(a.weight.double(), want, atol=1e-6)


def test_a_bad_step_enters_neither_weights_nor_batch_statistics():
    """Steps 1 and 2 have a gradient that is not finite, step 4 a loss (with finite gradients); the rest is as if they had
    not been. More than two in a row, or a bad last step, stop a run."""
    args = argparse.Namespace(out="nowhere", max_bad_steps=2)

    def run(factors, skip=()):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.Conv2d(2, 1, 1))
        guard, finite = Guard(net, torch.optim.AdamW(net.parameters(), lr=0.1, fused=True), 1.0), []
        for step, factor in enumerate(factors):
            if step not in skip:
                x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(step))
                loss = net(x * factor if factor != "loss" else x).square().mean()
                loss.backward()
                guard.step(
                    torch.stack(
                        [
                            loss.detach() if factor != "loss" else loss.detach() * torch.inf,
                            torch.ones(()),
                        ]
                    ),
                    step,
                )
                finite.append(guard.finite.item())
        return guard, net.state_dict(), finite

    bad = float("nan")
    guard, state, finite = run([1.0, bad, float("inf"), 1.0, "loss", 1.0])
    _, want, _ = run([1.0] * 6, skip=(1, 2, 4))
    assert finite == [True, False, False, True, False, True]
    for name in ("0.running_mean", "0.running_var", "0.weight", "1.weight", "1.bias"):
        assert torch.equal(state[name], want[name]), name
    names = ["flow", "repa", "grad_norm"]
    assert guard.look(args, names, final=True) is False
    guard = run([1.0, "loss"])[0]
    assert guard.look(args, names, final=False) is True
    with pytest.raises(
        UserError, match="1 steps in a row, the last one 1, were not finite .flow. and did"
    ):
        guard.look(args, names, final=True)
    with pytest.raises(
        UserError,
        match="3 steps in a row, the last one 3, were not finite .flow, grad_norm.*none yet",
    ):
        run([1.0, bad, bad, bad, 1.0])[0].look(
            args, names, final=False
        )  # though the step after them was good


def test_each_group_of_parameters_is_clipped_by_itself():
    a, b = (torch.nn.Parameter(torch.tensor([x])) for x in (3.0, 40.0))
    guard = Guard(
        torch.nn.Module(),
        torch.optim.SGD([dict(params=[a]), dict(params=[b])], lr=1.0, fused=True),
        1.0,
    )
    (a.square() / 2 + b.square() / 2).sum().backward()
    norm = guard.step(torch.ones(1), 0)
    assert norm == 3 and (a.item(), b.item()) == pytest.approx((2, 39), abs=1e-5)


def test_means_of_metrics_are_over_good_steps(inside):
    """A loss that is 0 is written too; one that is not in use is not."""
    log = RunLog(
        argparse.Namespace(out="run", batch_size=4, accum=1),
        ["flow", "disc", "kl", "grad_norm"],
        None,
        0,
        9,
        2.0,
        "cpu",
    )
    losses, wrong = (
        torch.tensor([1.0, 0.0, 5.0, 3.0]),
        torch.tensor([torch.nan, 0.0, 5.0, torch.inf]),
    )
    for x, good in ((losses, True), (wrong, False), (wrong, False), (3 * losses, True)):
        log.add(x, torch.tensor(good))
    log.line(4, ["flow", "disc", "grad_norm"])
    with open("run/metrics.jsonl") as file:
        line = json.loads(file.read())
    assert line.pop("images_per_s") > 0
    assert line == dict(step=4, epoch=2.0, flow=2.0, disc=0.0, grad_norm=6.0, bad_steps=2)


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec,count", [("f8d4", 83653863), ("f16d32", 69836067)])
def test_vae_is_the_published_size(spec, count):
    """f8d4: the parameter count of SD-VAE's AutoencoderKL, as its model card and diffusers give it."""
    with torch.device("meta"):
        vae = models.VAE(spec)
        assert sum(p.numel() for p in vae.parameters()) == count
        mean, logvar = vae.encode(torch.zeros(1, 3, 256, 256))
        assert mean.shape == (1, vae.channels, 256 // vae.factor, 256 // vae.factor)
        assert vae.decode(mean).shape == (1, 3, 256, 256)


@pytest.mark.parametrize("size,millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sit_is_the_published_size(size, millions):
    """Table 1 of the SiT paper: 33, 130, 458 and 675 million with patch 2 on 4 x 32 x 32."""
    with torch.device("meta"):
        sit = models.SiT(size, 2, 4, 32)
    assert round(sum(p.numel() for p in sit.parameters()) / 1e6) == millions


def test_sit_starts_at_zero_velocity_and_knows_its_null_label():
    sit = models.SiT(
        "S", 2, 4, 8, num_classes=3, vfm_dim=10, depth=2, width=32, heads=2, repa_block=2
    )
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    v, tokens = sit(x, t, torch.tensor([0, 3]), tokens=True)
    assert v.abs().max() == 0 and tokens.shape == (2, 16, 10)


def test_sit_unpatchify_inverts_patchify():
    """With an identity from patch to patch the output must be the input, pixel for pixel."""
    sit = models.SiT("S", 2, 4, 8, num_classes=3, depth=1, width=32, heads=2)
    x = torch.randn(2, 4, 8, 8)
    patches = (
        F.unfold(x, 2, stride=2)
        .transpose(1, 2)
        .view(2, 16, 4, 2, 2)
        .permute(0, 1, 3, 4, 2)
        .reshape(2, 16, 16)
    )
    sit.final_layer.forward = lambda h, c: patches
    assert torch.equal(sit(x, torch.rand(2), torch.tensor([0, 1])), x)


def test_positions_are_sines_and_cosines_of_column_then_row():
    p = models.sincos_positions(16, 3)[0].double().numpy().reshape(3, 3, 16)
    for row in range(3):
        for column in range(3):
            omega = [1 / 10000 ** (k / 4) for k in range(4)]
            want = [f(c * o) for c in (column, row) for f in (math.sin, math.cos) for o in omega]
            assert np.allclose(p[row, column], want, atol=1e-6)


def test_attention_is_softmax_of_scaled_products():
    q, k, v = torch.randn(3, 2, 4, 9, 8).double()
    want = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1) @ v
    assert torch.allclose(models.attention(q, k, v), want)


def test_a_vision_model_whose_grid_cannot_match_is_refused(tmp_path):
    """pit_ti_224 has positions for 224 x 224 pictures only, and a grid of 2 x 2 tokens needs another size; a feature map at
    stride 8 does not exist in test_vit."""
    import timm
    from safetensors.torch import save_file

    for name, stride, message in (
        ("pit_ti_224", None, "takes no .* which a 2x2 grid of tokens needs .*choose another --vfm"),
        ("test_vit", 8, "test_vit has no feature map at stride 8, only"),
    ):
        save_file(
            {k: v.contiguous() for k, v in timm.create_model(name).state_dict().items()},
            tmp_path / f"{name}.safetensors",
        )
        with pytest.raises(UserError, match=message):
            models.VFM(name, str(tmp_path / f"{name}.safetensors"), 32, grid=2, stride=stride)
    torch.save({"head.weight": torch.zeros(())}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="odd.pt cannot be read as test_vit's weights"):
        models.VFM("test_vit", tmp_path / "odd.pt", 32)


def test_mapper_gradient_reaches_the_encoder_and_not_the_vision_model(vfm_weights):
    vae = models.VAE("f4d4", 32, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.1)  # zero-initialised branches would stop gradients
    vfm = models.VFM("test_vit", vfm_weights, 32, grid=4)
    mapper = models.Mapper(4, 8, 2, vfm.dim, 1, hidden=32)
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    mean, logvar = vae.encode(x)
    z = vae.sample(mean, logvar, torch.randn_like(mean))
    train_vae.align_loss(mapper(z, torch.rand(4), torch.randn_like(z)), vfm(x)).backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in mapper.parameters() if p.ndim > 1
    )
    assert all(
        p.grad.abs().sum() > 0 for p in vae.encoder.parameters() if p.ndim > 1 and p.shape[-1] == 3
    )
    assert (
        all(p.grad is None for p in vfm.parameters())
        and not vfm.training
        and not vfm.train().model.training
    )


def test_mapper_noises_normalised_latents():
    mapper = models.Mapper(4, 8, 2, 16, 1, depth=0, hidden=32)
    z, noise = 5 + 3 * torch.randn(64, 4, 8, 8), torch.randn(64, 4, 8, 8)
    seen = []
    mapper.embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mapper(z), mapper(z, torch.full((64,), 0.25), noise), mapper(z, torch.ones(64), noise)
    assert abs(seen[0].mean()) < 1e-3 and abs(seen[0].std() - 1) < 1e-2
    assert torch.allclose(seen[1], 0.75 * seen[0] + 0.25 * noise, atol=1e-5) and torch.allclose(
        seen[2], noise
    )


def test_vfm_tokens_are_timms(vfm_weights):
    import timm
    from safetensors.torch import load_file

    x = torch.rand(2, 3, 48, 48) * 2 - 1
    vfm = models.VFM("test_vit", vfm_weights, 48)
    net = timm.create_model("test_vit", img_size=48).eval()
    net.load_state_dict(
        timm.models.vision_transformer.checkpoint_filter_fn(load_file(vfm_weights), net)
    )
    want = net.forward_features(((x + 1) / 2 - vfm.mean) / vfm.std)[:, 1:]
    assert vfm.grid == 3 and vfm.dim == 64 and torch.allclose(vfm(x), want, atol=1e-5)


def test_grad_checkpoint_changes_nothing_but_memory():
    torch.manual_seed(0)
    vae = models.VAE("f4d4", 32, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)
    x, grads = torch.randn(2, 3, 32, 32), []
    for vae.grad_checkpoint in (False, True):
        vae.zero_grad()
        vae.decode(vae.encode(x)[0]).square().mean().backward()
        grads.append([p.grad.clone() for p in vae.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads))


def test_principal_components_are_those_of_sklearn_free_algebra():
    z = torch.randn(3, 5, 4, 4) * torch.tensor([3.0, 1, 0.2, 2, 0.5])[:, None, None]
    colours = train_vae.principal_components(z).float()
    flat = z.permute(0, 2, 3, 1).reshape(-1, 5).double().numpy()
    axes = np.linalg.eigh(np.cov(flat.T))[1][:, ::-1][:, :3]
    want = (flat - flat.mean(0)) @ axes
    got = colours.permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    inner = (got > 5) & (got < 250)  # not cut off at two standard deviations
    for k in range(3):
        assert abs(np.corrcoef(want[inner[:, k], k], got[inner[:, k], k])[0, 1]) > 0.99


def test_vavae_loss_is_its_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 7)), rng.normal(size=(2, 5, 7))
    b[0, 1] = a[0, 1] + 0.01  # one pair within both margins
    want = 0
    for x, y in zip(a, b):
        x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
        want += np.mean([max(0, 1 - 0.5 - x[i] @ y[i]) for i in range(5)]) / 2
        want += (
            np.mean(
                [max(0, abs(x[i] @ x[j] - y[i] @ y[j]) - 0.25) for i in range(5) for j in range(5)]
            )
            / 2
        )
    got = train_vae.vavae_loss(torch.from_numpy(a), torch.from_numpy(b))
    assert math.isclose(got.item(), want, rel_tol=1e-5)


def test_an_error_does_not_wait_for_threads_of_others(capsys):
    """A compiler's pool of threads lives as long as the process: only a checkpoint that is being written is waited for."""

    def fail():
        raise UserError("wrong")

    done, ready = [], threading.Event()
    pool = threading.Thread(target=ready.wait)
    saver = threading.Thread(name="saver", target=lambda: (time.sleep(0.3), done.append(1)))
    pool.start(), saver.start()
    with pytest.raises(SystemExit) as stop:
        run_main(fail)
    assert stop.value.code == 2 and done and pool.is_alive()
    ready.set()


@pytest.mark.parametrize(
    "saved, now",
    [
        (torch.channels_last, torch.contiguous_format),
        (torch.contiguous_format, torch.channels_last),
    ],
)
def test_moments_resumed_in_another_memory_format_give_the_same_update(saved, now):
    """Fused AdamW walks storage: moments of channels_last weights, loaded beside contiguous ones, moved the update by 0.58."""

    def convolution(layout):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(8, 6, 3).to(memory_format=layout)
        return conv, torch.optim.AdamW(conv.parameters(), lr=0.1, weight_decay=0.0, fused=True)

    def step(conv, optimizer, seed):
        x = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(seed))
        conv(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    before, optimizer = convolution(saved)
    step(before, optimizer, 0)
    after, resumed = convolution(now)
    after.load_state_dict(before.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # a load shares what it can
    match_memory_formats(resumed)
    step(before, optimizer, 1)
    step(after, resumed, 1)
    torch.testing.assert_close(after.weight, before.weight, rtol=1e-4, atol=1e-5)
