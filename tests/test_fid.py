"""fid.py against independent references: torch-fidelity, pytorch-fid, mpmath, SciPy, torchmetrics,
scikit-image, lpips and plain NumPy. Then its command: what it writes, several processes, and what
it refuses. Inception's weights are random and saved in the published format.

    python -m pytest tests/test_fid.py
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import models
from bench.evaluators import random_inception
from common.files import UserError, write_weights
from common.pictures import ImageSet, adm_crop, from_uint8, to_uint8
from common.weights import load_vae
from conftest import SIT, VAE, refused, script, torchrun

CPU = torch.device("cpu")


def smooth(rng, height, width):
    """A drawn picture, uint8 (H,W,3), with smooth colours, so that resizing matters."""
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.BICUBIC))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in the published file's format, which the other packages can load too."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    random_inception(path)
    return str(path)


@pytest.fixture(scope="module")
def net(weights):
    return fid.Inception(weights)


@pytest.fixture(scope="module")
def fidelity(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], weights)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """a/ and b/, 9 and 6 pictures of 32x32; a.npz and b.npz of the same pixels; vae/, a random VAE.

    The .npz files hold labels and settings as sample.py writes them.
    """
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for name, count in (("a", 9), ("b", 6)):
        (root / name).mkdir()
        arrays = np.stack([smooth(rng, 32, 32) for _ in range(count)])
        for i, array in enumerate(arrays):
            Image.fromarray(array).save(root / name / f"{i:02d}.png")
        settings = np.array(json.dumps({"cfg": 1.5, "steps": 7}))
        np.savez(root / f"{name}.npz", arr_0=arrays, labels=np.arange(count) % 3, settings=settings)
    torch.manual_seed(0)
    vae = models.VAE("f4d4", 32, 32, [1, 1, 1], 1)
    path = root / "vae" / "vae.safetensors"
    write_weights(path, "vae", vae.state_dict(), vae.config, {"step": 3})
    return root


def assert_close(a, b, tolerance):
    """The norm of the difference is less than this share of b's."""
    a = torch.as_tensor(a, dtype=torch.float64)
    b = torch.as_tensor(b, dtype=torch.float64)
    assert ((a - b).norm() / b.norm()).item() < tolerance


# --------------------------------------------------------------------------------------------------
# Inception


@pytest.mark.parametrize("height,width", [(32, 32), (256, 256), (299, 299), (500, 333), (333, 500)])
def test_features_are_those_of_torch_fidelity(net, fidelity, height, width):
    rng = np.random.default_rng(height)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    x = torch.from_numpy(np.stack([smooth(rng, height, width), noise]))
    x = x.permute(0, 3, 1, 2).contiguous()
    branch_outputs = []
    hook = fidelity.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, output: branch_outputs.append(output)
    )
    with torch.no_grad():
        pool, logits = fidelity(x)
    hook.remove()
    ours = net(x)
    assert ours["pool"].shape == (2, 2048)
    assert ours["spatial"].shape == (2, 2023)
    assert ours["logits"].shape == (2, 1008)
    assert_close(ours["pool"], pool, 1e-4)
    assert_close(ours["logits"], logits, 1e-4)
    # ADM flattens in the order y, x, channel.
    spatial = branch_outputs[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    assert_close(ours["spatial"], spatial, 1e-4)


def test_resize_equals_tensorflow_1(fidelity):
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    for shape in ((32, 32), (64, 48), (299, 299), (400, 301)):
        x = torch.randint(0, 256, (1, 3, *shape)).float()
        theirs = interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
        assert torch.equal(fid.tf_resize(x, 299), theirs)


def test_features_are_those_of_pytorch_fid_at_299(net, weights, monkeypatch):
    import pytorch_fid.inception as theirs

    monkeypatch.setattr(
        theirs, "load_state_dict_from_url", lambda *a, **k: torch.load(weights, weights_only=True)
    )
    other = theirs.InceptionV3().eval()
    x = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    # Its input is x / 127.5 - 1; ours, as TensorFlow's, is (x - 128) / 128.
    with torch.no_grad():
        pool = other(x.float() / 255)[0].flatten(1)
    assert_close(net(x)["pool"], pool, 2e-2)
    with torch.no_grad():
        pool = other(((x.float() - 128) / 128 + 1) / 2)[0].flatten(1)
    assert_close(net(x)["pool"], pool, 1e-4)


def test_weights_are_taken_strictly(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    # The counters of batch norms are not weights and may be missing.
    short = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    torch.save(short, tmp_path / "short.pth")
    fid.Inception(tmp_path / "short.pth")
    state.pop("fc.bias")
    torch.save(state, tmp_path / "lacks.pth")
    with pytest.raises(UserError, match=r"lacks.pth does not fit: Missing.*fc.bias"):
        fid.Inception(tmp_path / "lacks.pth")


@pytest.fixture
def hub_file(tmp_path, monkeypatch):
    """Where the published weights lie in an empty torch.hub folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"


def test_only_the_published_file_is_taken_from_hubs_folder(
    weights, hub_file, tmp_path, monkeypatch, capsys
):
    """A file in hub's folder must have the published hash, whether downloaded or found there.

    --inception-weights takes any file and records its hash.
    """
    monkeypatch.setattr(fid, "WEIGHTS_URL", f"file://{tmp_path}/absent.pth")
    message = rf"No such file.*fetch file:.*absent.pth.*put it at {hub_file}.*--inception-w"
    with pytest.raises(UserError, match=message):
        fid.Inception()
    monkeypatch.setattr(fid, "WEIGHTS_URL", f"file://{weights}")
    with pytest.raises(UserError, match="invalid hash value"):
        fid.Inception()
    assert not hub_file.exists()
    good = pathlib.Path(weights).read_bytes()
    for content in (good, b"<html>"):
        hub_file.write_bytes(content)
        found = hashlib.sha256(content).hexdigest()[:8]
        message = rf"{hub_file} is not.*begins with {found}, not 6726825d; remove.*--inception"
        with pytest.raises(UserError, match=message):
            fid.Inception()
    about = fid.Inception(weights).about
    assert about["weights"] == hashlib.sha256(good).hexdigest()
    assert not about["published"]
    assert "comparable" in capsys.readouterr().out


def test_the_published_file_is_downloaded_once(weights, hub_file, monkeypatch, capsys):
    digest = hashlib.sha256(pathlib.Path(weights).read_bytes()).hexdigest()
    monkeypatch.setattr(fid, "WEIGHTS_HASH", digest[:8])  # as if these were the published weights
    for url in (f"file://{weights}", "file:///absent"):
        monkeypatch.setattr(fid, "WEIGHTS_URL", url)
        about = fid.Inception().about
        assert hub_file.exists()
        assert about["weights"] == digest
        assert about["published"]
    assert "warning" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Frechet distance


def exact_distance(mu1, sigma1, mu2, sigma2):
    """The definition to 50 digits: S1^(1/2) by its eigenvectors, then the eigenvalues of
    S1^(1/2) S2 S1^(1/2)."""
    import mpmath

    mpmath.mp.dps = 50
    a = mpmath.matrix(sigma1.tolist())
    b = mpmath.matrix(sigma2.tolist())
    values, vectors = mpmath.eigsy(a)
    root = vectors * mpmath.diag([mpmath.sqrt(max(v, 0)) for v in values]) * vectors.T
    product = root * b * root
    eigenvalues = mpmath.eigsy((product + product.T) / 2, eigvals_only=True)
    trace_of_root = sum(mpmath.sqrt(max(v, 0)) for v in eigenvalues)
    size = len(mu1)
    means = sum((mpmath.mpf(mu1[i]) - mpmath.mpf(mu2[i])) ** 2 for i in range(size))
    traces = sum(a[i, i] + b[i, i] for i in range(size))
    return float(means + traces - 2 * trace_of_root)


def gaussian(rng, n, d, scale=1.0):
    """Mean and covariance of n draws; the last of the d features is `scale` times the first."""
    x = rng.normal(size=(n, d)) * np.geomspace(1, scale, d)
    return x.mean(0), np.cov(x, rowvar=False)


@pytest.mark.parametrize(
    "n1,n2,scale", [(200, 100, 1.0), (200, 100, 1e-6), (12, 20, 1.0), (12, 200, 1e-2)]
)
def test_frechet_distance_is_right_to_50_digits(n1, n2, scale):
    """Also with fewer samples than features (12, 20 of 32), and with nearly singular products (the
    last feature 1e-6 of the first), where sqrtm breaks."""
    rng = np.random.default_rng(n1 + n2)
    one = gaussian(rng, n1, 32, scale)
    two = gaussian(rng, n2, 32, scale)
    expected = exact_distance(*one, *two)
    assert fid.frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_is_scipys_where_that_is_healthy():
    import scipy.linalg

    rng = np.random.default_rng(1)
    mu1, sigma1 = gaussian(rng, 500, 64)
    mu2, sigma2 = gaussian(rng, 400, 64)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    theirs = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert fid.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("n", [20, 2000])
def test_frechet_distance_of_equal_sets_is_zero(n):
    one = gaussian(np.random.default_rng(2), n, 300, 1e-3)
    assert abs(fid.frechet_distance(*one, *one)) < 1e-6


# --------------------------------------------------------------------------------------------------
# Inception Score, precision and recall


def inception_score(probabilities, split_size):
    """The score of class probabilities (N,C), summed over each split as collect does."""
    splits = torch.from_numpy(probabilities).split(split_size)
    return fid.inception_score(torch.stack([fid.score_terms(p).sum(0) for p in splits]))


@pytest.mark.parametrize("n", [60, 103])
def test_inception_score_is_adms_and_torch_fidelitys(n):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(n, 40, generator=torch.Generator().manual_seed(n))
    probabilities = logits.double().softmax(1).numpy()
    scores = []
    for start in range(0, n, 20):  # ADM's formula, with splits of 20
        part = probabilities[start : start + 20]
        kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(kl.sum(1).mean()))
    assert inception_score(probabilities, 20) == pytest.approx(np.mean(scores), rel=1e-6)
    if n == 60:  # torch-fidelity's splits are of equal size
        theirs = isc_features_to_metric(logits, splits=3, shuffle=False)["inception_score_mean"]
        assert inception_score(probabilities, 20) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("block", [7, 4096])
def test_precision_and_recall_are_adms_and_torch_fidelitys(block):
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    rng = np.random.default_rng(3)
    ref = rng.normal(size=(60, 6)).astype("float32")
    samples = (0.3 + 0.8 * rng.normal(size=(45, 6))).astype("float32")

    def distances(a, b):
        return ((a[:, None].astype("float64") - b[None]) ** 2).sum(2)

    def radii(x):
        return np.sort(distances(x, x), axis=1)[:, 3]  # column 0 is the picture itself

    precision = (distances(samples, ref) <= radii(ref)).any(1).mean()
    recall = (distances(ref, samples) <= radii(samples)).any(1).mean()
    assert 0.2 < recall < precision < 1
    ref = torch.from_numpy(ref)
    samples = torch.from_numpy(samples)
    ours = fid.precision_recall(ref, samples, block=block)
    np.testing.assert_allclose(ours, (precision, recall), atol=1e-6)
    theirs = calculate_precision_recall_full(samples.double(), ref.double())
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


class TwoColours(torch.nn.Module):
    """Stands for Inception, and tells red from blue pictures with certainty."""

    def __init__(self):
        super().__init__()
        self.dims = {"pool": 3}
        self.parameter = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        pool = images.float().mean((2, 3))  # (b,3)
        logits = torch.full((len(images), 1008), -50.0)
        logits[:, 0] = pool[:, 0]
        logits[:, 1] = pool[:, 2]
        return {"pool": pool, "logits": logits}


@pytest.mark.parametrize("in_order,scores", [(False, (2, 2)), (True, (1, 2))])
def test_inception_score_does_not_depend_on_the_order(in_order, scores, monkeypatch):
    """400 pictures of two classes, sorted by class and in mixed order, in splits of 200. ADM's
    evaluator takes the splits in file order: a sorted set has one class in each."""
    monkeypatch.setattr(fid, "SPLIT_SIZE", 200)
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    by_class = torch.cat([red.expand(200, 3, 2, 2), red.flip(1).expand(200, 3, 2, 2)])
    mixed = by_class.view(2, 200, 3, 2, 2).transpose(0, 1).flatten(0, 1)
    for images, score in zip((by_class, mixed), scores, strict=True):
        batches = zip(torch.arange(400).split(16), images.split(16), strict=True)
        statistics = fid.collect(TwoColours(), batches, 400, in_order=in_order)
        assert fid.inception_score(statistics["splits"]) == pytest.approx(score, rel=1e-2)


def adm_precision_and_recall(ref, samples, dtype):
    """ADM's evaluator in NumPy: every number is rounded to dtype, float16 or float32."""

    def distances(a, b):
        a = a.astype(dtype)
        b = b.astype(dtype)
        a_squared = (a * a).sum(1)[:, None]
        b_squared = (b * b).sum(1)
        product = (a.astype("float32") @ b.T.astype("float32")).astype(dtype)
        return np.maximum(a_squared - dtype(2) * product + b_squared, dtype(0)).astype("float32")

    def radii(x):
        return np.partition(distances(x, x), 3, axis=1)[:, 3]

    near = distances(ref, samples)
    return (near <= radii(ref)[:, None]).any(0).mean(), (near <= radii(samples)).any(1).mean()


def test_adms_precision_and_recall_to_the_digit():
    """Distances of some hundreds, as Inception's are, have steps of 0.25 in float16. Equal ones
    count as inside, so more pictures do."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(12, 256))
    ref = np.maximum(0, 1 + rng.normal(size=(300, 12)) @ basis / 3).astype("float32")
    samples = np.maximum(0, 1 + rng.normal(size=(280, 12)) @ basis / 3.2).astype("float32")
    expected = adm_precision_and_recall(ref, samples, np.float16)
    ours = fid.precision_recall(
        torch.from_numpy(ref), torch.from_numpy(samples), block=64, adm=True
    )
    assert ours == expected
    assert ours != fid.precision_recall(torch.from_numpy(ref), torch.from_numpy(samples))

    # A squared norm above 65504 is infinite in float16: ADM then takes float32.
    ref *= 20
    samples *= 20
    expected = adm_precision_and_recall(ref, samples, np.float32)
    ours = fid.precision_recall(torch.from_numpy(ref), torch.from_numpy(samples), adm=True)
    assert ours == pytest.approx(expected, abs=0.01)


# --------------------------------------------------------------------------------------------------
# PSNR, SSIM, LPIPS


@pytest.fixture
def noisy_pair():
    """Three pictures and the same with noise, uint8 (3,40,56,3)."""
    rng = np.random.default_rng(4)
    a = np.stack([smooth(rng, 40, 56) for _ in range(3)])
    b = np.clip(a + rng.normal(0, 12, a.shape), 0, 255).astype(np.uint8)
    return a, b


def to_tensor(arrays):
    """(N,H,W,3) -> (N,3,H,W)."""
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def test_psnr_is_torchmetrics_and_scikit_images(noisy_pair):
    import skimage.metrics
    import torchmetrics.functional.image as theirs

    a, b = noisy_pair
    x = to_tensor(a)
    y = to_tensor(b)
    ours = fid.psnr(x, y).numpy()
    expected = [
        skimage.metrics.peak_signal_noise_ratio(a[i], b[i], data_range=255) for i in (0, 1, 2)
    ]
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    expected = theirs.peak_signal_noise_ratio(
        x.double(), y.double(), data_range=255.0, dim=(1, 2, 3), reduction="none"
    )
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert fid.psnr(x, x).isfinite().all()


def test_ssim_is_torchmetrics_and_scikit_images(noisy_pair):
    import skimage.metrics
    import torchmetrics.functional.image as theirs

    a, b = noisy_pair
    x = to_tensor(a)
    y = to_tensor(b)
    ours = fid.ssim(x, y).numpy()
    expected = [
        skimage.metrics.structural_similarity(
            a[i].astype(float),
            b[i].astype(float),
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        for i in range(3)
    ]
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    _, full = theirs.structural_similarity_index_measure(
        x.double(), y.double(), data_range=255.0, reduction="none", return_full_image=True
    )
    # torchmetrics' own mean includes windows over a mirrored border.
    inside = full[..., 5:-5, 5:-5].mean((1, 2, 3))
    np.testing.assert_allclose(ours, inside, atol=1e-4)
    assert fid.ssim(x, x).tolist() == pytest.approx([1] * 3)


def test_lpips_is_the_lpips_packages(tmp_path, capsys):
    import lpips

    torch.manual_seed(0)
    # The package's trained linear layers on a random VGG16.
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    torch.save(theirs.state_dict(), tmp_path / "lpips.pth")
    a, b = torch.rand(2, 2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        ours = models.LPIPS([tmp_path / "lpips.pth"])(a, b)
        assert_close(ours, theirs.eval()(a, b).flatten(), 1e-4)


# --------------------------------------------------------------------------------------------------
# The command: its numbers

MEASURES = ["fid", "sfid", "inception_score", "precision", "recall"]


def read_json(path):
    with open(path) as file:
        return json.load(file)


def run(weights, *words):
    script(fid, *words, "--inception-weights", weights, "--workers", 0)


@pytest.fixture(scope="module")
def measured(weights, folders, tmp_path_factory):
    """The result of a/ against b/, its output as "output", the folder it was run in as "folder"."""
    folder = tmp_path_factory.mktemp("measured")
    output = io.StringIO()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(output):
            run(weights, folders / "a", "--ref", folders / "b", "--out", "folder.json")
    finally:
        os.chdir(before)
    result = read_json(folder / "folder.json")
    return {**result, "folder": folder, "output": output.getvalue()}


def test_two_folders_give_torch_fidelitys_numbers(measured, weights, folders):
    import torch_fidelity

    for words in ("distance is biased upwards", "comparable with each other only", "fid [weights "):
        assert words in measured["output"]
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders / "a"),
        input2=str(folders / "b"),
        feature_extractor="inception-v3-compat",
        cuda=False,
        fid=True,
        feature_extractor_weights_path=weights,
        isc=True,
        isc_splits=1,
        prc=True,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert measured["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert measured["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert measured["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert measured["recall"] == pytest.approx(theirs["recall"], abs=1e-6)


def test_an_npz_gives_what_its_folder_gives(net, measured, weights, folders, monkeypatch, capsys):
    """The reference is computed once, and the result records all that moves it."""
    monkeypatch.chdir(measured["folder"])
    run(weights, folders / "a.npz", "--ref", folders / "b", "--batch-size", 5)
    assert "from runs/cache" in capsys.readouterr().out
    result = read_json(folders / "a.fid.json")
    for key in MEASURES:
        assert result[key] == pytest.approx(measured[key], rel=1e-5)

    samples = result["samples"]
    assert samples["settings"] == {"cfg": 1.5, "steps": 7}
    assert samples["labels"] == {"classes": 3, "fewest": 3, "most": 3}
    assert samples["pictures"] == 9
    assert samples["size"] == 32
    assert len(samples["hash"]) == 64
    assert result["reference"]["pictures"] == 6
    assert result["reference"]["hash"] == measured["reference"]["hash"]
    assert result["network"] == {
        "name": "Inception",
        "weights": net.about["weights"],
        "published": False,
        "resize": "TensorFlow 1 bilinear to 299x299",
    }
    assert {"torch", "pillow"} <= set(result["versions"])
    assert result["provenance"]["processes"] == 1
    assert result["arguments"]["pr_images"] == 50000


def test_a_reference_that_has_changed_is_computed_again(
    measured, weights, folders, monkeypatch, capsys
):
    """A picture of the same size in bytes under the same name and time is another picture. A copy
    of the pictures elsewhere, with new times, is the same reference."""
    monkeypatch.chdir(measured["folder"])
    words = [folders / "a.npz", "--ref", "changing", "--out", "again.json", "--num", 4]
    os.makedirs("changing")
    for i in range(6):
        Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(f"changing/{i}.bmp")
    run(weights, *words)
    shutil.copytree("changing", "copy", copy_function=shutil.copyfile)
    run(weights, *[word if word != "changing" else "copy" for word in words])
    assert capsys.readouterr().out.count("from runs/cache") == 1
    status = os.stat("changing/0.bmp")
    Image.new("RGB", (32, 32), (0, 0, 40)).save("changing/0.bmp")
    os.utime("changing/0.bmp", ns=(status.st_atime_ns, status.st_mtime_ns))
    run(weights, *words)
    assert "from runs/cache" not in capsys.readouterr().out
    assert read_json("again.json")["samples"]["pictures"] == 4


def test_the_command_measures_as_adm(net, weights, folders, inside, monkeypatch):
    monkeypatch.setattr(fid, "SPLIT_SIZE", 4)
    run(weights, folders / "a.npz", "--ref", folders / "b.npz", "--adm", "--out", "adm.json")
    result = read_json("adm.json")
    assert result["arguments"]["adm"] is True
    outputs = {}
    for name in "ab":
        outputs[name] = net(to_tensor(np.load(folders / f"{name}.npz")["arr_0"]))
    probabilities = outputs["a"]["logits"].softmax(1).numpy()
    assert result["inception_score"] == pytest.approx(inception_score(probabilities, 4), rel=1e-6)
    precision, recall = fid.precision_recall(outputs["b"]["pool"], outputs["a"]["pool"], adm=True)
    assert result["precision"] == precision
    assert result["recall"] == recall


@pytest.fixture(scope="module")
def numpy_statistics(net, folders):
    """Statistics of b.npz by NumPy, under the names of ADM's files."""
    outputs = net(to_tensor(np.load(folders / "b.npz")["arr_0"]))
    pool = outputs["pool"].double().numpy()
    spatial = outputs["spatial"].double().numpy()
    return {
        "mu": pool.mean(0),
        "sigma": np.cov(pool, rowvar=False),
        "mu_s": spatial.mean(0),
        "sigma_s": np.cov(spatial, rowvar=False),
    }


def collect_b(net, folders, keep=3):
    pictures = fid.Pictures(str(folders / "b.npz"), batch_size=4)
    return fid.collect(net, pictures.batches(CPU, 0), 6, keep)


def test_streamed_statistics_are_numpys(net, folders, numpy_statistics):
    streamed = collect_b(net, folders, keep=3)
    for key, value in numpy_statistics.items():
        assert_close(streamed[key], value, 1e-6)
    pool = net(to_tensor(np.load(folders / "b.npz")["arr_0"]))["pool"]
    assert_close(streamed["features"], pool[1::2], 1e-6)


def test_a_reference_with_statistics_and_pictures(weights, folders, numpy_statistics, inside):
    """As ADM's: the statistics are believed, precision and recall are of the pictures. A set is at
    distance 0 from itself, and its precision and recall are 1."""
    np.savez("adm.npz", arr_0=np.load(folders / "b.npz")["arr_0"], **numpy_statistics)
    run(weights, folders / "b.npz", "--ref", "adm.npz", "--out", "same.json")
    same = read_json("same.json")
    assert abs(same["fid"]) < 1e-6 * np.trace(numpy_statistics["sigma"])
    assert same["reference"]["statistics"] == "of the file"
    assert same["precision"] == same["recall"] == 1


def test_a_reference_with_statistics_alone(net, folders, numpy_statistics, inside):
    """There are no pictures for precision and recall."""
    moved = {**numpy_statistics, "mu": numpy_statistics["mu"] + 1}
    np.savez("adm.npz", **moved)
    reference, record = fid.read_reference(net, "adm.npz", 32, keep=6)
    assert record["statistics"] == "of the file"
    values = fid.compare(net, collect_b(net, folders), reference)
    assert values["fid"] == pytest.approx(2048, rel=1e-6)
    assert abs(values["sfid"]) < 1e-6 * np.trace(numpy_statistics["sigma"])
    assert "recall" not in values


def test_two_processes_give_the_numbers_of_one(measured, weights, folders, inside):
    words = ["--inception-weights", weights, "--workers", 0, "--batch-size", 4, "--device", "cpu"]
    words += ["--out", "2.json"]
    torchrun(2, "fid", folders / "a.npz", "--ref", folders / "b", *words, cwd=inside)
    two = read_json("2.json")
    for key in MEASURES:
        assert two[key] == pytest.approx(measured[key], rel=1e-6)
    assert two["provenance"]["processes"] == 2


def test_reconstruction(weights, folders, inside, capsys):
    run(weights, "--vae", folders / "vae", "--data", folders / "a", "--lpips", 0, "--num", 6)
    values = read_json(folders / "vae" / "reconstruction.rfid.json")
    data = ImageSet(str(folders / "a"))
    vae = load_vae(folders / "vae")
    x = to_tensor(np.stack([data.load(i, 32) for i in (0, 1, 3, 4, 6, 7)]))
    with torch.no_grad():
        mean, _ = vae.encode(from_uint8(x))
        y = to_uint8(vae.decode(mean))
    assert values["psnr"] == pytest.approx(fid.psnr(x, y).mean().item(), rel=1e-4)
    assert values["ssim"] == pytest.approx(fid.ssim(x, y).mean().item(), rel=1e-3)
    assert values["rfid"] > 0
    assert values["samples"]["pictures"] == values["reference"]["pictures"] == 6
    assert not {"lpips", "fid", "precision"} & set(values)
    assert values["vae"]["step"] == 3
    assert "rfid" in capsys.readouterr().out


def test_other_features_are_never_called_fid(folders, inside, capsys):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), "vit.safetensors")
    features = ["--features", "test_vit", "--features-weights", "vit.safetensors"]
    script(fid, folders / "a", "--ref", folders / "b", *features, "--workers", 0)
    values = read_json(folders / "a.fd-test_vit.json")
    assert values["fd-test_vit"] > 0
    assert not {"fid", "sfid", "inception_score"} & set(values)
    assert not any(line.startswith("fid") for line in capsys.readouterr().out.splitlines())


def test_training_measures_with_it(weights, folders, inside):
    """--fid-every of both training scripts and --ifid-every of the first write the numbers into
    metrics.jsonl."""
    import train_sit
    import train_vae

    words = ["--fid-every", 1, "--fid-num", 4, "--fid-ref", folders / "b.npz"]
    words += ["--inception-weights", weights, "--data", folders / "a", "--steps", 1]
    vae_words = ["--val", folders / "a", "--align", "none", "--gan", 0, "--out", "runs/v"]
    vae_words += ["--ifid-every", 1]
    sit_words = ["--vae", folders / "vae", "--repa", 0, "--out", "runs/s"]
    script(train_vae, *VAE, *words, *vae_words)
    script(train_sit, *SIT, *words, *sit_words)
    for name, keys in (("v", {"rfid"}), ("v", {"ifid"}), ("s", {"fid", "sfid", "inception_score"})):
        with open(f"runs/{name}/metrics.jsonl") as file:
            lines = [json.loads(line) for line in file]
        assert any(keys <= set(line) for line in lines)
        for line in lines:
            assert np.isfinite(list(line.values())).all()


def test_training_measures_on_two_processes(weights, folders, inside):
    """Only the first process has the numbers; the second one once ended with a KeyError. They are
    what fid.py measures of the VAE that training has left."""
    words = ["--fid-every", 1, "--ifid-every", 1, "--fid-num", 9, "--device", "cpu"]
    words += ["--inception-weights", weights]
    words += ["--data", folders / "a", "--val", folders / "a", "--steps", 1]
    torchrun(2, "train_vae", *VAE, *words, "--align", "none", "--gan", 0, cwd=inside)
    with open("runs/vae/metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    [rfid] = [line["rfid"] for line in lines if "rfid" in line]
    [ifid] = [line["ifid"] for line in lines if "ifid" in line]
    sets = ["--data", folders / "a", "--interpolate", folders / "a", "--lpips", 0]
    run(weights, "--vae", "runs/vae", *sets, "--out", "after.json")
    after = read_json("after.json")
    assert rfid == pytest.approx(after["rfid"], rel=1e-3)
    assert ifid == pytest.approx(after["ifid"], rel=1e-3)


# --------------------------------------------------------------------------------------------------
# The command: its sets


def test_a_folders_pictures_are_cut_to_the_samples_side(net, tmp_path):
    """As ADM's reference was made: pictures of 150x70 and 64x90, for samples of side 32, are
    halved, resized and cropped."""
    rng = np.random.default_rng(5)
    for i, shape in enumerate([(70, 150), (90, 64)]):
        Image.fromarray(smooth(rng, *shape)).save(tmp_path / f"{i}.png")
    [(index, images)] = fid.Pictures(str(tmp_path), size=32).batches(CPU, 0)
    assert index.tolist() == [0, 1]
    for i, image in enumerate(images):
        cropped = np.array(adm_crop(Image.open(tmp_path / f"{i}.png"), 32))
        assert torch.equal(image, torch.from_numpy(cropped).permute(2, 0, 1))


@pytest.fixture
def sizes(inside):
    """The folders big/ of 64 pixels and mixed/, with a thumbnail of 16 in it, and the same pictures
    as big.npz and, of 32 pixels, as small.npz."""
    rng = np.random.default_rng(6)
    arrays = np.stack([smooth(rng, 64, 64) for _ in range(4)])
    for folder in ("big", "mixed"):
        os.mkdir(folder)
        for i, array in enumerate(arrays):
            Image.fromarray(array).save(f"{folder}/{i}.png")
    Image.fromarray(arrays[0]).resize((16, 16)).save("mixed/thumb.png")
    np.savez("big.npz", arr_0=arrays)
    np.savez("small.npz", arr_0=np.ascontiguousarray(arrays[:, ::2, ::2]))
    return inside


def test_sets_of_several_sizes_are_refused(sizes):
    """One thumbnail would bring all the pictures to its size."""
    message = r"mixed holds pictures of several sizes, .* from 16 to 64 pixels; say with --size"
    with pytest.raises(UserError, match=message):
        fid.Pictures("mixed")
    pictures = fid.Pictures("mixed", size=64)
    assert pictures.size == 64
    assert pictures.record["shorter sides"] == [16, 64]
    assert fid.Pictures("big").record["shorter sides"] == [64, 64]


@pytest.mark.parametrize(
    "words,said",
    [
        (
            ("mixed", "--size", 64, "--ref", "big"),
            "note: some pictures of mixed are enlarged to 64",
        ),
        (("small.npz", "--ref", "big.npz"), "warning: big.npz has pictures of 64 pixels"),
        (("small.npz", "--ref", "big"), "note: pictures of big are reduced to 32 pixels"),
        (("big.npz", "--ref", "mixed"), "note: some pictures of mixed are enlarged to 64"),
        (("big.npz", "--ref", "big"), None),
    ],
)
def test_other_sizes_are_said(words, said, sizes, capsys, monkeypatch):
    """Stands for Inception: a network that only averages colours."""
    net = TwoColours()
    net.about = {"name": "stub", "weights": "0" * 64, "published": False}
    monkeypatch.setattr(fid, "feature_network", lambda args, count, device: net)
    script(fid, *words, "--workers", 0, "--pr-images", 0, "--out", "result.json")
    lines = capsys.readouterr().out.splitlines()
    notes = [line for line in lines if line.startswith(("note", "warning"))]
    assert len(notes) == (0 if said is None else 1)
    assert said is None or notes[0].startswith(said)


def test_a_set_as_adm_writes_it(folders, inside):
    """Labels are the second array. The hash is of the content, however it is packed."""
    arrays = np.load(folders / "a.npz")["arr_0"]
    labels = np.array([0, 0, 0, 0, 1, 1, 5, 5, 5])
    np.savez("adm.npz", arrays, labels)
    np.savez_compressed("packed.npz", arr_1=labels, arr_0=arrays)
    plain = fid.Pictures("adm.npz", batch_size=4)
    packed = fid.Pictures("packed.npz", batch_size=4)
    assert plain.record["labels"] == {"classes": 3, "fewest": 2, "most": 4}
    assert plain.record["hash"] == packed.record["hash"]
    assert len(plain.record["hash"]) == 64
    for pictures in (plain, packed):
        images = torch.cat([images for _, images in pictures.batches(CPU, 0)])
        assert torch.equal(images, to_tensor(arrays))
    arrays[8, 31, 31, 2] ^= 1
    np.savez("adm.npz", arrays, labels)
    assert fid.Pictures("adm.npz").record["hash"] != plain.record["hash"]


def write_big_set(path, claimed, blocks=20):
    """An .npz of 16 black pictures a block, whose header claims to hold `claimed` pictures."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (claimed, 256, 256, 3)}
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(blocks):
            file.write(bytes(16 * 256 * 256 * 3))
    return str(path)


def test_memory_does_not_hold_the_set(tmp_path):
    path = write_big_set(tmp_path / "big.npz", 320)
    tracemalloc.start()
    batches = fid.Pictures(path).batches(CPU, 0)
    for _ in range(2):
        _, images = next(batches)
        assert len(images) == 16
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 320 * 256 * 256 * 3 / 4


def test_no_header_is_believed_that_claims_more_than_there_is(tmp_path):
    path = write_big_set(tmp_path / "lie.npz", 16000)
    message = re.escape("arr_0.npy is cut, or claims the wrong shape (16000, 256, 256, 3")
    with pytest.raises(UserError, match=message):
        fid.Pictures(path)


# --------------------------------------------------------------------------------------------------
# The command: every mistake is answered in one sentence


@pytest.fixture
def error(weights, inside, capsys):
    """error(*words) -> the sentence with which the command refuses them."""

    def sentence(*words):
        return refused(capsys, fid, *words, "--inception-weights", weights, "--workers", 0)

    return sentence


def test_arrays_that_are_no_set_are_refused(folders, error):
    good = folders / "a.npz"
    arrays = np.load(good)["arr_0"]
    np.savez("grey.npz", arr_0=arrays[..., 0])
    np.savez("float.npz", arr_0=arrays.astype("float32") / 255)
    np.savez("planes.npz", arr_0=arrays.transpose(0, 3, 1, 2))
    np.savez("none.npz", arr_0=arrays[:0])
    np.savez("other.npz", pictures=arrays)
    np.savez("code.npz", arr_0=np.array([{}, {}], dtype=object))
    np.savez("flat.npz", arr_0=arrays[:, :0])
    data = good.read_bytes()
    pathlib.Path("empty.npz").write_bytes(b"")
    pathlib.Path("cut.npz").write_bytes(data[: len(data) // 2])
    pathlib.Path("text.npz").write_text("no archive")
    with open("array.npz", "wb") as file:
        np.save(file, arrays)
    expected = {
        "grey": "uint8 of shape",
        "float": "float32",
        "planes": "(9, 3, 32, 32)",
        "none": "has 0 pictures",
        "other": "has 0 pictures",
        "code": "object",
        "flat": "(9, 0, 32, 3)",
        "empty": "not a zip file",
        "cut": "not a zip file",
        "text": "not a zip file",
        "array": "not a zip file",
    }
    for name, words in expected.items():
        sentence = error(f"{name}.npz", "--ref", folders / "b")
        assert words in sentence
        assert "uint8 of shape (N,H,W,3)" in sentence
        assert f"{name}.npz" in sentence


def test_labels_that_do_not_fit_are_refused(folders, error):
    good = folders / "a.npz"
    ref = folders / "b"
    arrays = np.load(good)["arr_0"]
    np.savez("few.npz", arr_0=arrays, labels=np.zeros(5, dtype=int))
    np.savez("onehot.npz", arr_0=arrays, labels=np.eye(9))
    np.savez("pair.npz", arrays, arrays)
    message = error("few.npz", "--ref", ref)
    assert "few.npz: labels has shape (5,), but arr_0 holds 9 pictures" in message
    assert "onehot.npz: labels has shape (9, 9)" in error(good, "--ref", "onehot.npz")
    assert "pair.npz: arr_1 has shape (9, 32, 32, 3)" in error("pair.npz", "--ref", ref)


def test_files_that_cannot_be_read_are_refused(folders, error):
    good = folders / "a.npz"
    ref = folders / "b"
    data = bytearray(good.read_bytes())
    pathlib.Path("cut.npz").write_bytes(data[: len(data) // 2])
    data[5000:6000] = bytes(1000)
    pathlib.Path("damaged.npz").write_bytes(data)
    os.mkdir("bare")
    shutil.copytree(ref, "torn")
    picture = pathlib.Path("torn/02.png")
    picture.write_bytes(picture.read_bytes()[:200])
    assert "No such file" in error("absent.npz", "--ref", ref)
    assert "damaged" in error("damaged.npz", "--ref", ref)
    assert "cannot be read as .npz" in error(good, "--ref", "cut.npz")
    assert "No such file" in error(good, "--ref", "absent.npz")
    assert "has no pictures" in error(good, "--ref", "bare")
    assert "torn/02.png" in error(good, "--ref", "torn")
    assert "cannot be written to bare" in error(good, "--ref", ref, "--out", "bare")


def test_references_without_statistics_are_refused(folders, error):
    good = folders / "a.npz"
    np.savez("other.npz", pictures=np.load(good)["arr_0"])
    np.savez("wrong.npz", mu=np.zeros(5), sigma=np.eye(5))
    assert "may have Inception's mu and sigma" in error(good, "--ref", "other.npz")
    message = error(good, "--ref", "wrong.npz")
    assert "mu (5,), sigma (5, 5) are not finite statistics" in message


def test_flags_that_do_not_fit_are_refused(folders, error, capsys):
    good = folders / "a.npz"
    ref = folders / "b"
    assert "has 9 pictures, but 20 are needed" in error(good, "--ref", ref, "--num", 20)
    for flag, value, least in (
        ("--num", 1, 2),
        ("--batch-size", 0, 1),
        ("--size", 0, 1),
        ("--pr-images", -1, 0),
    ):
        message = error(good, "--ref", ref, flag, value)
        assert f"argument {flag}: {value} is less than {least}" in message
    assert "--ref" in error(good)
    assert "--data" in error("--vae", folders / "vae")
    assert "no set of samples" in error("--ref", ref)
    assert "no_such_model" in error(good, "--ref", ref, "--features", "no_such_model")
    message = refused(capsys, fid, good, "--ref", ref, "--inception-weights", "absent.pth")
    assert "No such file" in message
