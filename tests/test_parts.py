"""The mathematics, each against an independent formula: draws, crop, flow, samplers, losses,
averages, networks."""

import argparse
import copy
import json
import math
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats

import models
import sample
import train_sit
import train_vae
from common.draws import _mix, normal, uniform
from common.files import UserError
from common.pictures import (
    ImageSet,
    adm_crop,
    examine_picture,
    from_uint8,
    load_image,
    open_picture,
    save_grid,
    to_rgb,
    to_uint8,
)
from common.processes import run_main
from common.runs import RunLog, match_memory_formats, newest_checkpoint
from common.training import Guard, clip_gradient, ema_update, weight_of, weighted_sum

# --------------------------------------------------------------------------------------------------
# Random draws


def test_splitmix64_is_the_published_generator():
    """The first outputs of SplitMix64 from seed 1234567, as its published C code gives them."""
    golden = -0x61C8864680B583EB
    x = 1234567 + golden * torch.arange(1, 6)
    got = [int(value) & 0xFFFFFFFFFFFFFFFF for value in _mix(x)]
    assert got == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_normal_draws_are_normal():
    x = normal(3, "noise", torch.arange(400), (5, 10, 10)).double()
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 0.01


def test_uniform_draws_are_uniform():
    x = uniform(3, "time", torch.arange(50000))
    assert stats.kstest(x.numpy(), "uniform").pvalue > 0.01


def test_draws_are_independent():
    """Of one another, of those of another seed, and of those of another name."""
    ids, shape = torch.arange(400), (5, 10, 10)
    x = normal(3, "noise", ids, shape).double()
    correlations = x.flatten(1).corrcoef().fill_diagonal_(0)
    assert correlations.abs().max() < 0.25  # 5.6 standard errors of 1/sqrt(500)
    for other in (normal(4, "noise", ids, shape), normal(3, "eps", ids, shape)):
        assert abs(np.corrcoef(x.flatten(), other.flatten())[0, 1]) < 0.01


def test_draws_belong_to_the_sample_and_not_to_the_batch():
    whole = normal(0, "noise", torch.arange(20), (3, 4, 4))
    part = normal(0, "noise", torch.tensor([7, 2]), (3, 4, 4))
    assert torch.equal(whole[[7, 2]], part)


# --------------------------------------------------------------------------------------------------
# Pictures


def bicubic_matrix(n_in, n_out):
    """Weights (n_out, n_in), float64, of a bicubic (a = -1/2) resize whose filter is widened when
    it shrinks."""
    scale = n_in / n_out
    width = max(scale, 1.0)
    centres_in = np.arange(n_in)[None] + 0.5
    centres_out = (np.arange(n_out)[:, None] + 0.5) * scale
    d = np.abs((centres_in - centres_out) / width)
    near = 1.5 * d**3 - 2.5 * d**2 + 1
    far = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    weights = np.where(d < 1, near, np.where(d < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def box_matrix(n):
    """Weights (n // 2, n) that halve n pixels: the mean of those whose centres lie within half an
    output pixel."""
    scale = n / (n // 2)
    d = ((np.arange(n)[None] + 0.5) - (np.arange(n // 2)[:, None] + 0.5) * scale) / scale
    weights = ((d > -0.5) & (d <= 0.5)).astype(float)
    return weights / weights.sum(1, keepdims=True)


def two_passes(y, rows, columns):
    """Resizes y (H,W,3) along its rows, then its columns, and rounds half up to 8 bits after each,
    as Pillow does on 8-bit pictures."""
    for equation, weights in (("ec,bcd->bed", columns), ("ab,bcd->acd", rows)):
        y = np.floor(np.einsum(equation, weights, y) + 0.5).clip(0, 255)
    return y


def reference_crop(image, size):
    """adm_crop in float64 -> (size,size,3)."""
    y = np.asarray(image).astype(np.float64)
    while min(y.shape[:2]) >= 2 * size:
        y = two_passes(y, box_matrix(y.shape[0]), box_matrix(y.shape[1]))
    scale = size / min(y.shape[:2])
    h = round(y.shape[0] * scale)
    w = round(y.shape[1] * scale)
    y = two_passes(y, bicubic_matrix(y.shape[0], h), bicubic_matrix(y.shape[1], w))
    top = (h - size) // 2
    left = (w - size) // 2
    return y[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "width,height,size", [(500, 333, 64), (48, 40, 32), (20, 31, 32), (64, 64, 32), (131, 300, 32)]
)
def test_adm_crop_against_float_reference(width, height, size):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.BICUBIC)
    got = adm_crop(image, size)
    assert got.shape == (size, size, 3)
    assert got.dtype == np.uint8
    error = np.abs(got - reference_crop(image, size))
    assert error.max() <= 1  # exact halves may round either way
    assert error.mean() < 0.25


def grey_ramp():
    """(32,256), every row 0 to 255."""
    return np.tile(np.arange(256), (32, 1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA", "YCbCr", "I;16"])
def test_every_kind_of_picture_becomes_rgb(mode, tmp_path):
    if mode == "I;16":
        image = Image.fromarray(grey_ramp().astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey_ramp().astype(np.uint8)).convert("RGB").convert(mode)
    # PNG has no CMYK, and Pillow 12.3 cannot read the YCbCr TIFFs that it writes.
    ending = {"CMYK": "tif", "YCbCr": "jpg"}.get(mode, "png")
    path = tmp_path / f"picture.{ending}"
    image.save(path)
    assert isinstance(examine_picture(path)[1], tuple)
    x = load_image(path, 32)
    assert x.shape == (32, 32, 3)
    assert mode == "1" or np.ptp(x) > 20


def test_16_bits_are_scaled_to_8(tmp_path):
    """Pillow alone clips them to white."""
    path = tmp_path / "grey16.png"
    Image.fromarray(grey_ramp().astype(np.uint16) * 257).save(path)
    x = np.asarray(to_rgb(Image.open(path))).astype(int)
    assert np.abs(x - grey_ramp()[..., None]).max() == 0


def tiff(pixels, bits=16, **tags):
    """The bytes of a grey TIFF file of whole numbers (H,W). tags: {t<number>: a whole number}."""
    height, width = pixels.shape
    if bits == 12:
        packed = "".join(f"{number:012b}" for number in pixels.flat)
        data = int(packed, 2).to_bytes(len(packed) // 8, "big")
    else:
        data = pixels.astype(f"<i{bits // 8}").tobytes()
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 277: 1, 278: height}
    entries |= {279: len(data)} | {int(name[1:]): value for name, value in tags.items()}
    entries[273] = 8 + 2 + 12 * (len(entries) + 1) + 4
    file = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for number, value in sorted(entries.items()):
        file += struct.pack("<HHII", number, 4, 1, value)
    return file + bytes(4) + data


# {kind: a file whose greys are grey_ramp()}
DEEP_GREYS = {
    "12 bits, packed": (lambda: tiff(grey_ramp() * 4095 // 255, 12)),
    "12 of 16 bits, stated": (lambda: tiff(grey_ramp() * 4095 // 255, t281=4095)),
    "16 bits": (lambda: tiff(grey_ramp() * 257)),
    "16 bits, the largest number stated": (lambda: tiff(grey_ramp() * 257, t281=65535 - 257)),
    "16 bits, white is 0": (lambda: tiff(65535 - grey_ramp() * 257, t262=0)),
    "32 bits, stated": (lambda: tiff(grey_ramp() * 257, 32, t281=65535)),
    "PGM up to 4095": (
        lambda: b"P5 256 32 4095\n" + (grey_ramp() * 4095 // 255).astype(">u2").tobytes()
    ),
}


@pytest.mark.parametrize("kind", DEEP_GREYS)
def test_deep_greys_have_the_range_that_their_file_tells(kind, tmp_path):
    path = tmp_path / "grey.tif"
    path.write_bytes(DEEP_GREYS[kind]())
    assert examine_picture(path)[1] == (256, 32)
    with open_picture(path) as image:
        x = np.asarray(to_rgb(image))
    assert np.array_equal(x, np.repeat(grey_ramp()[..., None], 3, 2))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("I", r"whole numbers of 32 bits \(mode I\), whose range is not known; save it"),
        ("signed", r"whole numbers of 16 bits \(mode I\), whose range is not known; save it"),
        ("F", r"floating-point numbers \(mode F\), whose range is not known; save it"),
    ],
)
def test_greys_of_unknown_range_are_refused(kind, words, tmp_path):
    """They came out black: 255 of 65535 is next to nothing."""
    path = tmp_path / "a" / "grey.tif"
    path.parent.mkdir()
    path.write_bytes(tiff(grey_ramp(), 32 if kind == "I" else 16, t339=2))
    if kind == "F":
        Image.fromarray((grey_ramp() / 255).astype(np.float32)).save(path)
    with pytest.raises(UserError, match=f"a/grey.tif': its pixels are {words}"):
        ImageSet(tmp_path)
    with pytest.raises(UserError, match=f"grey.tif': its pixels are {words}"):
        load_image(path, 32)


def png_with_16_bits(pixels):
    """The bytes of a PNG file of whole numbers (H,W,3), which Pillow cannot write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    file = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        file += struct.pack(">I", len(data)) + kind + data
        file += struct.pack(">I", zlib.crc32(kind + data))
    return file


@pytest.mark.parametrize("form", ["grey TIFF", "colour PNG"])
def test_sets_of_12_bits_in_16_are_refused(form, tmp_path, monkeypatch):
    """Nothing in such a file tells its range. One brighter picture in the set does."""
    monkeypatch.chdir(tmp_path)

    def write(name, pixels):
        data = tiff(pixels) if form == "grey TIFF" else png_with_16_bits(np.stack([pixels] * 3, 2))
        (tmp_path / "p" / name).write_bytes(data)

    (tmp_path / "p").mkdir()
    write("0.tif", grey_ramp() * 4095 // 255)
    with pytest.raises(UserError, match=r"reach only \d+ of 65535, as numbers of 12 bits do"):
        ImageSet("p")
    write("1.tif", grey_ramp() * 257)
    assert len(ImageSet("p")) == 2
    write("2.tif", grey_ramp())
    assert len(ImageSet("p")) == 3


def test_uint8_and_back():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    y = from_uint8(x)
    assert y.min() == -1
    assert y.max() == 1
    assert torch.equal(to_uint8(y), x)
    # Rounded, while REPA and REPA-E truncate.
    step = 2 / 255
    assert torch.equal(to_uint8(y + 0.4 * step), x)
    assert torch.equal(to_uint8(y - 0.4 * step), x)


def test_a_grid_shows_every_pixel(tmp_path):
    """Pictures of 32 pixels are enlarged fourfold, on white."""
    pixels = torch.arange(2 * 3 * 3 * 32 * 32).remainder(251).to(torch.uint8)
    pictures = pixels.view(2, 3, 3, 32, 32)  # two rows of three
    save_grid(str(tmp_path / "a.png"), pictures)
    x = np.asarray(Image.open(tmp_path / "a.png"))
    assert x.shape == (2 * 136 + 8, 3 * 136 + 8, 3)
    assert (x[:8] == 255).all()
    assert (x[:, -8:] == 255).all()
    for i in range(2):
        for j in range(3):
            cell = x[8 + 136 * i : 136 * (i + 1), 8 + 136 * j : 136 * (j + 1)]
            picture = pictures[i, j].permute(1, 2, 0).numpy()
            assert np.array_equal(cell, picture.repeat(4, 0).repeat(4, 1))


# --------------------------------------------------------------------------------------------------
# Flow: velocity, score and samplers on Gaussian data, where all is known

# The data is N(MU, A).
MU = torch.tensor([0.7, -0.4]).double()
A = torch.tensor([[0.9, 0.2], [0.2, 0.5]]).double()
IDENTITY = torch.eye(2).double()


def moments(t):
    """Mean and covariance of x_t = (1-t) x + t eps."""
    return (1 - t) * MU, (1 - t) ** 2 * A + t**2 * IDENTITY


def gaussian_velocity(x, t):
    """E[eps - x | x_t = x] for points x (B,2), float64."""
    mean, covariance = moments(t)
    # The covariance of eps - x with x_t, times the inverse of that of x_t.
    gain = (t * IDENTITY - (1 - t) * A) @ torch.linalg.inv(covariance)
    return -MU + (x - mean) @ gain.T


def picture_velocity(x, t, step_time=None):
    """The same for the samplers: x (B,2,1,1). The time of the step, which decides on guidance, has
    no effect here."""
    return gaussian_velocity(x.flatten(1).double(), t).view_as(x)


def test_interpolate_is_the_path_and_its_derivative():
    x = torch.randn(4, 2, 3, 3).double()
    eps = torch.randn(4, 2, 3, 3).double()
    t = torch.rand(4).double()

    def path(t):
        return train_sit.interpolate(x, eps, t)[0]

    _, derivative = torch.func.jvp(path, (t,), (torch.ones_like(t),))
    assert torch.allclose(derivative, train_sit.interpolate(x, eps, t)[1])
    assert torch.equal(path(torch.zeros_like(t)), x)
    assert torch.equal(path(torch.ones_like(t)), eps)


@pytest.mark.parametrize("t", [0.05, 0.4, 0.97])
def test_score_from_velocity_is_the_gradient_of_log_density(t):
    x = torch.randn(6, 2).double().requires_grad_()
    mean, covariance = moments(t)
    density = torch.distributions.MultivariateNormal(mean, covariance)
    score = torch.autograd.grad(density.log_prob(x).sum(), x)[0]
    v = gaussian_velocity(x, t)
    assert torch.allclose(-((1 - t) * v + x) / t, score, atol=1e-10)


@pytest.mark.parametrize(
    "sampler,steps,tolerance", [("sde", 250, 0.03), ("ode", 250, 0.03), ("heun", 25, 0.03)]
)
def test_samplers_reproduce_a_gaussian(sampler, steps, tolerance):
    """8,000 points: the standard error of a mean is 0.011, of a variance 0.016 of itself."""
    ids = torch.arange(8000)
    start = normal(0, "start", ids, (2, 1, 1))

    def noise(i):
        return normal(0, f"step {i}", ids, (2, 1, 1))

    z = sample.integrate(picture_velocity, start, sampler, steps, noise).flatten(1)
    assert torch.allclose(z.mean(0), MU, atol=tolerance)
    assert torch.allclose(z.T.cov(), A, atol=tolerance)


def test_sde_noise_matters():
    """Without its noise the SDE's drift alone must miss the covariance: the test above can fail."""
    start = normal(0, "start", torch.arange(8000), (2, 1, 1))

    def no_noise(i):
        return torch.zeros_like(start)

    z = sample.integrate(picture_velocity, start, "sde", 250, no_noise).flatten(1)
    assert (z.T.cov() - A).abs().max() > 0.1


class TwoClasses(torch.nn.Module):
    """A velocity that shows the labels it was computed for; 2 is the null label. batch_size is that
    of the last call."""

    num_classes = 2

    def forward(self, x, t, y):
        self.batch_size = len(x)
        return x * (y + 1).view(-1, 1, 1, 1)


def test_guidance():
    net = TwoClasses()
    x = torch.randn(3, 1, 2, 2)
    y = torch.tensor([0, 1, 0])
    plain = net(x, None, y)
    unconditional = 3 * x

    # Without guidance, and outside the interval, the network is evaluated once for each sample.
    assert torch.equal(sample.guided_velocity(net, x, 0.5, y, 1.0, (0, 1)), plain)
    assert net.batch_size == 3
    assert torch.equal(sample.guided_velocity(net, x, 0.8, y, 3.0, (0, 0.75)), plain)
    assert net.batch_size == 3

    guided = sample.guided_velocity(net, x, 0.75, y, 3.0, (0, 0.75))
    assert net.batch_size == 6
    assert torch.allclose(guided, unconditional + 3 * (plain - unconditional))


# --------------------------------------------------------------------------------------------------
# Losses


def test_align_loss_is_one_minus_cosine_in_float64():
    a = torch.randn(3, 5, 7)
    b = torch.randn(3, 5, 7)
    x = a.double().numpy()
    y = b.double().numpy()
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    expected = np.mean(1 - (x * y).sum(-1) / norms)
    assert math.isclose(train_vae.align_loss(a, b).item(), expected, rel_tol=1e-5)
    assert math.isclose(train_sit.repa_loss(a, b).item(), expected - 1, rel_tol=1e-5)


def test_kl_loss_is_torch_distributions():
    mean = torch.randn(4, 2, 3, 3)
    logvar = torch.randn(4, 2, 3, 3)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    prior = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(posterior, prior).sum((1, 2, 3)).mean()
    assert torch.allclose(train_vae.kl_loss(mean, logvar), expected, rtol=1e-5)


def unit_rows(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def vavae_loss_of_one(x, y):
    """VA-VAE's loss for the tokens x and y (N,D) of one picture, with margins 0.5 and 0.25."""
    x = unit_rows(x)
    y = unit_rows(y)
    n = len(x)
    by_token = []
    by_pair = []
    for i in range(n):
        by_token.append(max(0, 1 - 0.5 - x[i] @ y[i]))
        for j in range(n):
            by_pair.append(max(0, abs(x[i] @ x[j] - y[i] @ y[j]) - 0.25))
    return np.mean(by_token) + np.mean(by_pair)


def test_vavae_loss_is_its_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 5, 7))
    b[0, 1] = a[0, 1] + 0.01  # a pair within both margins
    expected = np.mean([vavae_loss_of_one(x, y) for x, y in zip(a, b, strict=True)])
    got = train_vae.vavae_loss(torch.from_numpy(a), torch.from_numpy(b))
    assert math.isclose(got.item(), expected, rel_tol=1e-5)


def test_label_dropout_rate():
    y = torch.arange(100000) % 10
    u = uniform(0, "label dropout", torch.arange(100000))
    dropped = train_sit.drop_labels(y, u, 0.1, 10) == 10
    assert abs(dropped.float().mean() - 0.1) < 0.004  # 4 standard errors
    assert torch.equal(train_sit.drop_labels(y, torch.zeros(100000), 0.0, 10), y)


# --------------------------------------------------------------------------------------------------
# Averages, and steps that are not finite


def test_the_weights_of_losses_are_their_flags():
    """A term that was named otherwise than its flag would be trained with a weight that nobody
    chose."""
    args = train_vae.parse_arguments(["--align-weight", "2", "--lpips", "3", "--recon", "l1"])
    weights = {term: weight_of(term, args) for term in ("align", "recon", "lpips", "kl", "gan")}
    assert weights == dict(align=2.0, recon=1.0, lpips=3.0, kl=1e-6, gan=0.1)
    assert weight_of("disc", args) == 1.0
    losses = dict(align=torch.tensor(1.0), lpips=torch.tensor(10.0), disc=torch.tensor(100.0))
    assert weighted_sum(losses, args) == 132.0
    for term in ("fft", "freeze", "data"):
        with pytest.raises(ValueError, match=f"'{term}' has no weight: add a flag --{term}"):
            weight_of(term, args)
    args = train_sit.parse_arguments(["--repa", "0.25"])
    assert weight_of("flow", args) == 1.0
    assert weight_of("repa", args) == 0.25


def test_ema_is_its_closed_form():
    ema = torch.nn.Linear(3, 2)
    net = torch.nn.Linear(3, 2)
    start = ema.weight.detach().clone().double()
    weights = []
    for _ in range(7):
        with torch.no_grad():
            net.weight.normal_()
        weights.append(net.weight.detach().clone().double())
        ema_update(ema, net, 0.9)
    expected = 0.9**7 * start
    for i, weight in enumerate(weights):
        expected += 0.1 * 0.9 ** (6 - i) * weight
    assert torch.allclose(ema.weight.double(), expected, atol=1e-6)


class GuardedRun:
    """A small network trained by a Guard. kinds: of the steps, "good", "nan" or "inf" in the
    inputs, so that the gradients are not finite, or "loss": the loss is not finite and the
    gradients are. Steps in `skip` are left out."""

    def __init__(self, kinds, skip=()):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.Conv2d(2, 1, 1))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
        self.guard = Guard(net, optimizer, 1.0)
        self.finite = []
        for step, kind in enumerate(kinds):
            if step in skip:
                continue
            x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(step))
            if kind in ("nan", "inf"):
                x = x * float(kind)
            loss = net(x).square().mean()
            loss.backward()
            if kind == "loss":
                loss = loss * torch.inf
            self.guard.step({"flow": loss.detach(), "repa": torch.ones(())}, step)
            self.finite.append(self.guard.finite.item())
        self.state = net.state_dict()


GUARD_ARGUMENTS = argparse.Namespace(out="nowhere", max_bad_steps=2)


def no_listing(folder):
    """Stands in for newest_checkpoint, which reads a folder and so is not for every line."""
    raise AssertionError("the checkpoints were listed although there is no message")


def test_a_bad_step_enters_neither_weights_nor_batch_statistics():
    """Steps 1 and 2 have gradients that are not finite, step 4 a loss; the rest is as if they had
    not been."""
    run = GuardedRun(["good", "nan", "inf", "good", "loss", "good"])
    without = GuardedRun(["good"] * 6, skip=(1, 2, 4))
    assert run.finite == [True, False, False, True, False, True]
    for name in ("0.running_mean", "0.running_var", "0.weight", "1.weight", "1.bias"):
        assert torch.equal(run.state[name], without.state[name]), name
    run.guard.check(GUARD_ARGUMENTS, no_listing, final=True)
    assert run.guard.good


def test_a_bad_last_step_stops_a_run():
    guard = GuardedRun(["good", "loss"]).guard
    guard.check(GUARD_ARGUMENTS, no_listing, final=False)
    assert not guard.good
    message = "1 steps in a row, the last one 1, were not finite .flow. and did.*is nowhere/5.pt"
    with pytest.raises(UserError, match=message):
        guard.check(GUARD_ARGUMENTS, "{}/5.pt".format, final=True)


def test_too_many_bad_steps_in_a_row_stop_a_run():
    """Although the step after them was good."""
    guard = GuardedRun(["good", "nan", "nan", "nan", "good"]).guard
    message = "3 steps in a row, the last one 3, were not finite .flow, grad_norm.*none yet"
    with pytest.raises(UserError, match=message):
        guard.check(GUARD_ARGUMENTS, newest_checkpoint, final=False)


def test_each_group_of_parameters_is_clipped_by_itself():
    a = torch.nn.Parameter(torch.tensor([3.0]))
    b = torch.nn.Parameter(torch.tensor([40.0]))
    groups = [dict(params=[a]), dict(params=[b])]
    guard = Guard(torch.nn.Module(), torch.optim.SGD(groups, lr=1.0, fused=True), 1.0)
    (a.square() / 2 + b.square() / 2).sum().backward()
    norm = guard.step({"loss": torch.ones(())}, 0)
    assert norm == 3
    assert (a.item(), b.item()) == pytest.approx((2, 39), abs=1e-5)


def test_a_norm_without_gradients_is_a_zero_on_their_device():
    """A zero on the CPU has to be uploaded, and so the host waits for the GPU at every step before
    --gan-start. The meta device stands in for the GPU."""
    parameters = [torch.nn.Parameter(torch.empty(3, device="meta")) for _ in range(2)]
    assert clip_gradient(parameters, 1.0).device.type == "meta"
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    assert clip_gradient(parameters, 1.0) == 0
    parameters[0].grad = torch.tensor([0.0, 3.0, 4.0])
    assert clip_gradient(parameters, 1.0) == 5
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.0, 0.6, 0.8]))


def test_a_line_of_metrics_is_read_at_once(inside, monkeypatch):
    """Each reading waits for the GPU."""
    args = argparse.Namespace(out="run", batch_size=4, accum=1)
    log = RunLog(args, None, start=0, total=9, steps_per_epoch=2.0)
    losses = {term: torch.ones(()) for term in ("align", "recon", "kl", "grad_norm")}
    log.add(losses, torch.tensor(True))
    read = []
    for name in ("__float__", "__int__", "__bool__", "item", "tolist"):
        method = getattr(torch.Tensor, name)

        def counted(tensor, name=name, method=method):
            read.append(name)
            return method(tensor)

        monkeypatch.setattr(torch.Tensor, name, counted)
    log.line(1)
    assert read == ["tolist"]


def test_means_of_metrics_are_over_good_steps(inside):
    """A loss that is 0 is written too; one that is not in use is not."""
    args = argparse.Namespace(out="run", batch_size=4, accum=1)
    log = RunLog(args, None, start=0, total=9, steps_per_epoch=2.0)

    def add(flow, disc, grad_norm, finite):
        losses = {"flow": flow, "disc": disc, "grad_norm": grad_norm}
        tensors = {term: torch.tensor(value) for term, value in losses.items()}
        log.add(tensors, torch.tensor(finite))

    add(1.0, 0.0, 3.0, finite=True)
    add(math.nan, 0.0, math.inf, finite=False)
    add(math.nan, 0.0, math.inf, finite=False)
    add(3.0, 0.0, 9.0, finite=True)
    log.line(4)
    with open("run/metrics.jsonl") as file:
        line = json.loads(file.read())
    assert line.pop("images_per_s") > 0
    assert line == dict(step=4, epoch=2.0, flow=2.0, disc=0.0, grad_norm=6.0, bad_steps=2)


# --------------------------------------------------------------------------------------------------
# VAE


@pytest.mark.parametrize("spec,count", [("f8d4", 83653863), ("f16d32", 69836067)])
def test_vae_is_the_published_size(spec, count):
    """f8d4: the parameter count of SD-VAE's AutoencoderKL, as its model card and diffusers give
    it."""
    with torch.device("meta"):
        vae = models.VAE(spec)
        assert sum(p.numel() for p in vae.parameters()) == count
        mean, logvar = vae.encode(torch.zeros(1, 3, 256, 256))
        assert mean.shape == (1, vae.channels, 256 // vae.factor, 256 // vae.factor)
        assert logvar.shape == mean.shape
        assert vae.decode(mean).shape == (1, 3, 256, 256)


def test_group_norm_keeps_bf16_and_has_the_statistics_of_fp32():
    torch.manual_seed(0)
    norm = models.GroupNorm(64, 8)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    torch.nn.init.normal_(norm.bias)
    x = (2 + torch.randn(2, 64, 16, 16)).bfloat16().requires_grad_()
    exact = copy.deepcopy(norm).double()
    x_exact = x.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    wanted = F.group_norm(x_exact, 8, exact.weight, exact.bias, 1e-6)
    assert y.dtype == torch.bfloat16
    assert norm(x.float()).dtype == torch.float32
    torch.testing.assert_close(y.double(), wanted, rtol=2**-7, atol=2**-6)

    direction = torch.randn(y.shape)
    (y * direction).sum().backward()
    (wanted * direction).sum().backward()
    for found, gradient in (
        (x.grad, x_exact.grad),
        (norm.weight.grad, exact.weight.grad),
        (norm.bias.grad, exact.bias.grad),
    ):
        error = (found.double() - gradient).norm() / gradient.norm()
        assert error < 0.01


def test_compiled_group_norm_is_one_graph():
    norm = models.GroupNorm(8, 2)
    x = torch.randn(2, 8, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, norm(x))
    torch._dynamo.reset()


def test_grad_checkpoint_changes_nothing_but_memory():
    torch.manual_seed(0)
    vae = models.VAE("f4d4", 32, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)
    x = torch.randn(2, 3, 32, 32)
    grads = []
    for grad_checkpoint in (False, True):
        vae.grad_checkpoint = grad_checkpoint
        vae.zero_grad()
        vae.decode(vae.encode(x)[0]).square().mean().backward()
        grads.append([p.grad.clone() for p in vae.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


def test_principal_components_are_those_of_plain_linear_algebra():
    stds = torch.tensor([3.0, 1, 0.2, 2, 0.5])
    z = torch.randn(3, 5, 4, 4) * stds[:, None, None]
    colours = train_vae.principal_components(z).float()  # (3,3,4,4), 0 to 255
    rows = z.permute(0, 2, 3, 1).reshape(-1, 5).double().numpy()
    axes = np.linalg.eigh(np.cov(rows.T))[1][:, ::-1][:, :3]
    expected = (rows - rows.mean(0)) @ axes
    got = colours.permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    for k in range(3):
        inner = (got[:, k] > 5) & (got[:, k] < 250)  # not cut off at two standard deviations
        assert abs(np.corrcoef(expected[inner, k], got[inner, k])[0, 1]) > 0.99


@pytest.mark.parametrize(
    "saved, now",
    [
        (torch.channels_last, torch.contiguous_format),
        (torch.contiguous_format, torch.channels_last),
    ],
)
def test_moments_resumed_in_another_memory_format_give_the_same_update(saved, now):
    """Fused AdamW walks through memory in the order of storage: moments of channels_last weights,
    loaded beside contiguous ones, once moved the update by 0.58."""

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
    # load_state_dict shares tensors where it can, so it gets a copy.
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    match_memory_formats(resumed)
    step(before, optimizer, 1)
    step(after, resumed, 1)
    torch.testing.assert_close(after.weight, before.weight, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Transformers: SiT and Mapper


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
    x = torch.randn(2, 4, 8, 8)
    v, tokens = sit(x, torch.rand(2), torch.tensor([0, 3]), tokens=True)
    assert v.abs().max() == 0
    assert tokens.shape == (2, 16, 10)


def test_sit_unpatchify_inverts_patchify(monkeypatch):
    """Where the last layer returns the patches of the input, the output must be the input."""
    sit = models.SiT("S", 2, 4, 8, num_classes=3, depth=1, width=32, heads=2)
    x = torch.randn(2, 4, 8, 8)
    patches = F.unfold(x, 2, stride=2).transpose(1, 2).view(2, 16, 4, 2, 2)
    patches = patches.permute(0, 1, 3, 4, 2).reshape(2, 16, 16)
    monkeypatch.setattr(sit.final_layer, "forward", lambda h, c: patches)
    assert torch.equal(sit(x, torch.rand(2), torch.tensor([0, 1])), x)


def test_positions_are_sines_and_cosines_of_column_then_row():
    positions = models.sincos_positions(16, 3)[0].double().numpy().reshape(3, 3, 16)
    omega = np.array([1 / 10000 ** (k / 4) for k in range(4)])
    for row in range(3):
        for column in range(3):
            waves = [np.sin(column * omega), np.cos(column * omega)]
            waves += [np.sin(row * omega), np.cos(row * omega)]
            assert np.allclose(positions[row, column], np.concatenate(waves), atol=1e-6)


def test_attention_is_softmax_of_scaled_products():
    q, k, v = torch.randn(3, 2, 4, 9, 8).double()
    expected = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1) @ v
    assert torch.allclose(models.attention(q, k, v), expected)


def test_mapper_noises_normalised_latents():
    mapper = models.Mapper(4, 8, 2, 16, 1, depth=0, hidden=32)
    z = 5 + 3 * torch.randn(64, 4, 8, 8)
    noise = torch.randn(64, 4, 8, 8)
    embedded = []
    mapper.embed.register_forward_pre_hook(lambda module, inputs: embedded.append(inputs[0]))
    mapper(z)
    mapper(z, torch.full((64,), 0.25), noise)
    mapper(z, torch.ones(64), noise)
    clean, noised, pure_noise = embedded
    assert abs(clean.mean()) < 1e-3
    assert abs(clean.std() - 1) < 1e-2
    assert torch.allclose(noised, 0.75 * clean + 0.25 * noise, atol=1e-5)
    assert torch.allclose(pure_noise, noise)


def test_mapper_gradient_reaches_the_encoder_and_not_the_vision_model(vfm_weights):
    vae = models.VAE("f4d4", 32, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.1)  # branches that start at zero would stop gradients
    vfm = models.VFM("test_vit", vfm_weights, 32, grid=4)
    mapper = models.Mapper(4, 8, 2, vfm.dim, 1, hidden=32)
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    mean, logvar = vae.encode(x)
    z = vae.sample(mean, logvar, torch.randn_like(mean))
    tokens = mapper(z, torch.rand(4), torch.randn_like(z))
    train_vae.align_loss(tokens, vfm(x)).backward()

    matrices = [p for p in mapper.parameters() if p.ndim > 1]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in matrices)
    convolutions = [p for p in vae.encoder.parameters() if p.ndim > 1 and p.shape[-1] == 3]
    assert all(p.grad.abs().sum() > 0 for p in convolutions)
    assert all(p.grad is None for p in vfm.parameters())
    assert not vfm.training
    assert not vfm.train().model.training


# --------------------------------------------------------------------------------------------------
# Vision models


def test_vfm_tokens_are_timms(vfm_weights):
    x = torch.rand(2, 3, 48, 48) * 2 - 1
    vfm = models.VFM("test_vit", vfm_weights, 48)
    net = timm.create_model("test_vit", img_size=48).eval()
    adapt = timm.models.vision_transformer.checkpoint_filter_fn
    net.load_state_dict(adapt(load_file(vfm_weights), net))
    expected = net.forward_features(((x + 1) / 2 - vfm.mean) / vfm.std)[:, 1:]
    assert vfm.grid == 3
    assert vfm.dim == 64
    assert torch.allclose(vfm(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "name, stride, message",
    [
        ("pit_ti_224", None, "takes no .* which a 2x2 grid of tokens needs .*choose another --vfm"),
        ("test_vit", 8, "test_vit has no feature map at stride 8, only"),
    ],
)
def test_a_vision_model_whose_grid_cannot_match_is_refused(name, stride, message, tmp_path):
    """pit_ti_224 has positions for pictures of 224 x 224 only, and a grid of 2 x 2 tokens needs
    another size; test_vit has no feature map at stride 8."""
    path = str(tmp_path / "weights.safetensors")
    state = timm.create_model(name).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    with pytest.raises(UserError, match=message):
        models.VFM(name, path, 32, grid=2, stride=stride)


def test_weights_that_are_no_vision_models_are_refused(tmp_path):
    torch.save({"head.weight": torch.zeros(())}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"odd\.pt cannot be read as test_vit's weights"):
        models.VFM("test_vit", tmp_path / "odd.pt", 32)


# --------------------------------------------------------------------------------------------------
# The end of a script


def test_an_error_does_not_wait_for_threads_of_others(capsys):
    """A compiler's pool of threads lives as long as the process. Only a checkpoint that is being
    written is waited for."""

    def fail():
        raise UserError("wrong")

    saved = threading.Event()
    stop_pool = threading.Event()

    def save():
        time.sleep(0.3)
        saved.set()

    pool = threading.Thread(target=stop_pool.wait)
    saver = threading.Thread(name="saver", target=save)
    pool.start()
    saver.start()
    with pytest.raises(SystemExit) as stop:
        run_main(fail)
    assert stop.value.code == 2
    assert saved.is_set()
    assert pool.is_alive()
    stop_pool.set()
