"""iFID (fid.py --interpolate) against a reference in float64 that compares everything with
everything; the cached latents of stage 2; several processes. The networks have random weights.

    python -m pytest tests/test_ifid.py
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import train_sit
from common.draws import uniform
from common.files import write_weights
from common.pictures import ImageSet, from_uint8, to_uint8
from common.weights import load_vae
from conftest import SIT, refused, script, torchrun
from models import VAE

CPU = torch.device("cpu")


@pytest.fixture
def folder(inside, pictures):
    """The current folder, with vae/, train/ of 24 pictures, and val/ of 9."""
    torch.manual_seed(0)
    vae = VAE("f4d4", 32, 32, [1, 1, 1], 1)
    vae.set_statistics([0.1, -0.2, 0.0, 0.3], [0.5, 1.0, 2.0, 0.8])
    write_weights(inside / "vae" / "vae.safetensors", "vae", vae.state_dict(), vae.config, {})
    shutil.copytree(pictures, "train")
    rng = np.random.default_rng(5)
    (inside / "val").mkdir()
    for i in range(9):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((40, 40), Image.BICUBIC).save(inside / "val" / f"{i}.png")
    return inside


# --------------------------------------------------------------------------------------------------
# The reference, in float64


def reference_neighbours(held_out, training, k):
    """Rows (M,D), (N,D), float64 -> positions (M,k), the nearest by cosine first, mean squared
    differences (M,k), and the drawn one of them (M,)."""
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (held_out, training)]
    cosines = units[0] @ units[1].T
    positions = np.argsort(-cosines, axis=1)[:, :k]
    differences = ((held_out[:, None] - training[positions]) ** 2).mean(2)
    drawn = []
    draws = uniform(0, "neighbour", torch.arange(len(held_out))).tolist()
    for row, difference, u in zip(positions, differences, draws, strict=True):
        probabilities = np.exp(-difference) / np.exp(-difference).sum()
        drawn.append(row[np.searchsorted(probabilities.cumsum(), u)])
    return positions, differences, np.array(drawn)


def reference_slerp(a, b):
    """Rows (D,), (D,) -> the middle of the arc from the one to the other."""
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin(angle / 2) * a + np.sin(angle / 2) * b) / np.sin(angle)


def blocks_of(rows, size):
    positions = torch.arange(len(rows))
    return zip(positions.split(size), rows.split(size), strict=True)


# --------------------------------------------------------------------------------------------------
# Neighbours and interpolation


@pytest.mark.parametrize("size", [7, 64, 500])
def test_neighbours_are_the_reference_s(size):
    """Twenty rows are there twice. Which of two equal ones comes first is a matter of rounding."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, 24))
    training = (centres[rng.integers(0, 30, 300)] + 0.3 * rng.normal(size=(300, 24))).astype("f4")
    training[200:220] = training[100:120]
    held_out = (centres[rng.integers(0, 30, 60)] + 0.3 * rng.normal(size=(60, 24))).astype("f4")
    positions, differences, drawn = reference_neighbours(
        held_out.astype(float), training.astype(float), 10
    )
    blocks = blocks_of(torch.from_numpy(training), size)
    found, found_differences = fid.nearest_latents(torch.from_numpy(held_out), blocks)
    assert np.array_equal(training[found], training[positions])
    np.testing.assert_allclose(found_differences, differences, rtol=1e-4)
    assert np.array_equal(training[fid.draw_neighbours(found, found_differences)], training[drawn])


def test_fewer_training_pictures_than_neighbours():
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    positions, differences = fid.nearest_latents(rows, blocks_of(rows, 2))
    assert positions[:, :3].sort(1).values.tolist() == [[0, 1, 2]] * 3
    assert positions[:, 0].tolist() == [0, 1, 2]
    assert differences[:, 3:].isinf().all()
    assert fid.draw_neighbours(positions, differences).max() < 3


def test_draws_have_the_probabilities():
    differences = torch.tensor([0.0, 0.5, 2.0]).expand(20000, 3)
    drawn = fid.draw_neighbours(torch.arange(3).expand(20000, 3), differences)
    shares = torch.bincount(drawn, minlength=3) / 20000
    torch.testing.assert_close(shares, torch.softmax(-differences[0], 0), atol=0.01, rtol=0)


def test_slerp():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 16))
    b[3] = 2 * a[3]  # no angle between them: the middle of the line
    b[4] = a[4]
    middle = fid.slerp_half(torch.from_numpy(a), torch.from_numpy(b)).double().numpy()
    expected = [reference_slerp(a[i], b[i]) for i in range(3)]
    np.testing.assert_allclose(middle, [*expected, 1.5 * a[3], a[4]], rtol=1e-6)
    # Between vectors of one length the middle has this length; on the line it would be shorter.
    one, other = np.eye(2)
    middle = fid.slerp_half(torch.from_numpy(one[None]), torch.from_numpy(other[None]))
    assert middle.norm().item() == pytest.approx(1)


# --------------------------------------------------------------------------------------------------
# The whole


@torch.no_grad()
def reference_interpolations(vae, val, train):
    """ImageSets -> the drawn neighbours (M,), and pictures uint8 (M,3,32,32)."""
    rows = []
    for data in (val, train):
        images = from_uint8(data.stack(range(len(data)), 32))
        means = vae.encode(images)[0]
        if data is train:
            means = means.half().float()  # as stage 2 keeps them
        normalised = (means - vae.latent_mean[:, None, None]) / vae.latent_std[:, None, None]
        rows.append(normalised.flatten(1).double().numpy())
    _, _, drawn = reference_neighbours(*rows, 10)
    middle = [reference_slerp(a, rows[1][i]) for a, i in zip(rows[0], drawn, strict=True)]
    latents = torch.tensor(np.array(middle)).float().view(-1, 4, 8, 8)
    latents = latents * vae.latent_std[:, None, None] + vae.latent_mean[:, None, None]
    return drawn, to_uint8(vae.decode(latents))


def features(vfm_weights):
    return ["--features", "test_vit", "--features-weights", vfm_weights, "--lpips", 0]


def words(vfm_weights, out):
    sets = ["--vae", "vae", "--data", "val", "--interpolate", "train", "--workers", 0]
    return [*sets, *features(vfm_weights), "--device", "cpu", "--out", out]


def read_json(path):
    with open(path) as file:
        return json.load(file)


def test_ifid_is_the_reference_s(folder, vfm_weights):
    vae = load_vae("vae")
    drawn, pictures = reference_interpolations(vae, ImageSet("val"), ImageSet("train"))
    training = fid.TrainingLatents(vae, fid.Pictures("train", size=32), CPU, 0)
    ours = fid.Interpolations(vae, fid.Pictures("val", size=32, batch_size=4), training)
    assert np.array_equal(ours.neighbours, drawn)
    found = torch.cat([images for _, images in ours.batches()])
    difference = (found.int() - pictures.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.01


def test_the_command_reports_it_beside_rfid(folder, vfm_weights):
    _, pictures = reference_interpolations(load_vae("vae"), ImageSet("val"), ImageSet("train"))
    script(fid, *words(vfm_weights, "result.json"))
    result = read_json("result.json")
    net = fid.TimmFeatures("test_vit", vfm_weights)
    originals = ImageSet("val").stack(range(9), 32)
    got = [fid.collect(net, [(torch.arange(9), x)], 9) for x in (pictures, originals)]
    assert result["ifd-test_vit"] == pytest.approx(fid.set_distance(*got), rel=2e-2)
    assert result["rfd-test_vit"] != result["ifd-test_vit"]
    assert result["interpolation"].pop("training")["pictures"] == 24
    assert result["interpolation"].pop("seconds") > 0
    assert result["interpolation"] == {
        "neighbours": 10,
        "nearest by": "cosine of normalised posterior means",
        "weights": "softmax(-mean squared difference)",
        "interpolation": "slerp at 0.5",
        "seed": 0,
        "held out": 9,
        "latents": "encoded",
        "precision": "fp32",
    }
    # iFID beside rFID, and a picture of eight columns and four rows.
    assert list(result)[:3] == ["rfd-test_vit", "ifd-test_vit", "psnr"]
    width, height = Image.open("result.interpolation.png").size
    assert width > 1.5 * height > 0


def test_two_processes_have_the_neighbours_of_one(folder, vfm_weights):
    """A block has 256 pictures, so that 12 copies of the set are two, one for each process."""
    for i in range(12):
        shutil.copytree("train", f"many/{i:02d}", dirs_exist_ok=True)
    common = [*words(vfm_weights, "one.json"), "--interpolate", "many"]
    script(fid, *common)
    torchrun(2, "fid", *common, "--out", "two.json", cwd=folder)
    one = read_json("one.json")
    two = read_json("two.json")
    assert one["interpolation"]["training"]["pictures"] == 288
    for name in ("rfd-test_vit", "ifd-test_vit"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)
    assert two["provenance"]["processes"] == 2


def test_cached_latents_are_used(folder, vfm_weights):
    """Stage 2 leaves them in the VAE's folder. An interrupted cache is not used."""
    script(fid, *words(vfm_weights, "encoded.json"))
    script(train_sit, *SIT, "--data", "train", "--vae", "vae", "--repa", 0, "--steps", 1)
    script(fid, *words(vfm_weights, "cached.json"))
    encoded = read_json("encoded.json")
    cached = read_json("cached.json")
    assert encoded["interpolation"]["latents"] == "encoded"
    source = cached["interpolation"]["latents"]
    assert source.startswith("vae/latents-")
    assert cached["ifd-test_vit"] == pytest.approx(encoded["ifd-test_vit"], rel=1e-3)
    done = np.load(f"{source}/done.npy")
    np.save(f"{source}/done.npy", 0 * done)
    pictures = fid.Pictures("train", size=32)
    assert fid.find_cached_latents(load_vae("vae"), pictures) == ("encoded", None)


def test_interpolation_needs_a_vae(folder, capsys):
    message = refused(capsys, fid, "val", "--ref", "train", "--size", 32, "--interpolate", "train")
    assert "name it with --vae" in message
