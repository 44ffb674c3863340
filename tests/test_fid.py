"""fid.py against independent references: torch-fidelity, pytorch-fid, mpmath, SciPy, torchmetrics, scikit-image, lpips and
plain NumPy; then its command: what it writes, several processes, what it refuses. Inception's weights are random, saved
in the published format.    python -m pytest tests/test_fid.py"""

import contextlib
import hashlib
import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from common.files import UserError, write_weights
from common.pictures import ImageSet, adm_crop, from_uint8, to_uint8
from common.weights import load_vae
import fid
import models
from conftest import SIT, VAE, refused, script, torchrun
from bench.evaluators import random_inception


def smooth(rng, height, width):
    """A drawn picture, uint8 (H,W,3): smooth colours, so that resizing matters."""
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.BICUBIC))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in the published file's format, which the other packages load from the same file."""
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
    """a/ and b/, 9 and 6 drawn pictures of 32x32; a.npz and b.npz of the same pixels; vae/, a tiny random VAE."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for name, count in (("a", 9), ("b", 6)):
        (root / name).mkdir()
        arrays = np.stack([smooth(rng, 32, 32) for _ in range(count)])
        for i, x in enumerate(arrays):
            Image.fromarray(x).save(root / name / f"{i:02d}.png")
        np.savez(
            root / f"{name}.npz",
            arr_0=arrays,
            labels=np.arange(count) % 3,
            settings=np.array(json.dumps(dict(cfg=1.5, steps=7))),
        )
    torch.manual_seed(0)
    vae = models.VAE("f4d4", 32, 32, [1, 1, 1], 1)
    write_weights(
        root / "vae" / "vae.safetensors", "vae", vae.state_dict(), vae.config, dict(step=3)
    )
    return root


def close(a, b, tolerance):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    assert ((a - b).norm() / b.norm()).item() < tolerance


# ---- Inception -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height,width", [(32, 32), (256, 256), (299, 299), (500, 333), (333, 500)])
def test_features_are_those_of_torch_fidelity(net, fidelity, height, width):
    rng = np.random.default_rng(height)
    x = torch.from_numpy(
        np.stack(
            [smooth(rng, height, width), rng.integers(0, 256, (height, width, 3), dtype=np.uint8)]
        )
    )
    x = x.permute(0, 3, 1, 2).contiguous()
    seen = {}
    hook = fidelity.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, i, output: seen.update(spatial=output)
    )
    with torch.no_grad():
        pool, logits = fidelity(x)
    hook.remove()
    ours = net(x)
    assert (
        ours["pool"].shape == (2, 2048)
        and ours["spatial"].shape == (2, 2023)
        and ours["logits"].shape == (2, 1008)
    )
    close(ours["pool"], pool, 1e-4)
    close(ours["logits"], logits, 1e-4)
    close(
        ours["spatial"], seen["spatial"][:, :7].permute(0, 2, 3, 1).reshape(2, -1), 1e-4
    )  # ADM: y, x, channel


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
    with torch.no_grad():
        pool = other(x.float() / 255)[0].flatten(1)
    close(
        net(x)["pool"], pool, 2e-2
    )  # its input is x / 127.5 - 1, ours (TensorFlow's) is (x - 128) / 128
    with torch.no_grad():
        pool = other(((x.float() - 128) / 128 + 1) / 2)[0].flatten(1)
    close(net(x)["pool"], pool, 1e-4)


def test_weights_are_taken_strictly(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    torch.save(
        {k: v for k, v in state.items() if "num_batches_tracked" not in k}, tmp_path / "short.pth"
    )
    fid.Inception(tmp_path / "short.pth")  # counters are no weights
    torch.save({k: v for k, v in state.items() if k != "fc.bias"}, tmp_path / "lacks.pth")
    with pytest.raises(UserError, match="lacks.pth does not fit: Missing.*fc.bias"):
        fid.Inception(tmp_path / "lacks.pth")


def test_only_the_published_file_is_taken_from_hubs_folder(weights, tmp_path, monkeypatch, capsys):
    """It is downloaded once and must have the published hash, downloaded or found there; --inception-weights takes any
    file, whose hash is recorded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    there = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    monkeypatch.setattr(fid, "WEIGHTS_URL", f"file://{tmp_path}/absent.pth")
    with pytest.raises(
        UserError, match=f"No such file.*fetch file:.*absent.pth.*put it at {there}.*--inception-w"
    ):
        fid.Inception()
    monkeypatch.setattr(fid, "WEIGHTS_URL", f"file://{weights}")
    with pytest.raises(UserError, match="invalid hash value"):
        fid.Inception()
    assert not there.exists()
    digest = hashlib.sha256(open(weights, "rb").read()).hexdigest()
    for content in (open(weights, "rb").read(), b"<html>"):
        there.write_bytes(content)
        found = hashlib.sha256(content).hexdigest()[:8]
        with pytest.raises(
            UserError,
            match=f"{there} is not.*begins with {found}, not 6726825d; remove.*--inception",
        ):
            fid.Inception()
    about = fid.Inception(weights).about
    assert (
        about["weights"] == digest
        and not about["published"]
        and "comparable" in capsys.readouterr().out
    )
    there.unlink()
    monkeypatch.setattr(fid, "WEIGHTS_HASH", digest[:8])  # as if these were the published ones
    for _ in range(2):  # downloaded, then found
        about = fid.Inception().about
        assert there.exists() and about["weights"] == digest and about["published"]
        monkeypatch.setattr(fid, "WEIGHTS_URL", "file:///absent")
    assert "warning" not in capsys.readouterr().out


# ---- Frechet distance ------------------------------------------------------------------------------------------------


def exact(mu1, sigma1, mu2, sigma2):
    """The definition with 50 digits: S1^(1/2) by its eigenvectors, then the eigenvalues of S1^(1/2) S2 S1^(1/2)."""
    import mpmath

    mpmath.mp.dps = 50
    a, b = mpmath.matrix(sigma1.tolist()), mpmath.matrix(sigma2.tolist())
    values, vectors = mpmath.eigsy(a)
    root = vectors * mpmath.diag([mpmath.sqrt(max(v, 0)) for v in values]) * vectors.T
    product = root * b * root
    trace = sum(
        mpmath.sqrt(max(v, 0)) for v in mpmath.eigsy((product + product.T) / 2, eigvals_only=True)
    )
    diff = sum((mpmath.mpf(x) - mpmath.mpf(y)) ** 2 for x, y in zip(mu1.tolist(), mu2.tolist()))
    return float(diff + sum(a[i, i] + b[i, i] for i in range(len(mu1))) - 2 * trace)


def gaussian(rng, n, d, scale=1.0):
    x = rng.normal(size=(n, d)) * np.geomspace(1, scale, d)
    return x.mean(0), np.cov(x, rowvar=False)


@pytest.mark.parametrize(
    "n1,n2,scale", [(200, 100, 1.0), (200, 100, 1e-6), (12, 20, 1.0), (12, 200, 1e-2)]
)
def test_frechet_distance_is_right_to_50_digits(n1, n2, scale):
    """Also with fewer samples than features (12, 20 of 32) and with nearly singular products (the last feature 1e-6 of the
    first), where sqrtm breaks."""
    rng = np.random.default_rng(n1 + n2)
    one, two = gaussian(rng, n1, 32, scale), gaussian(rng, n2, 32, scale)
    assert fid.frechet_distance(*one, *two) == pytest.approx(exact(*one, *two), rel=1e-6)


def test_frechet_distance_is_scipys_where_that_is_healthy():
    import scipy.linalg

    rng = np.random.default_rng(1)
    one, two = gaussian(rng, 500, 64), gaussian(rng, 400, 64)
    root = scipy.linalg.sqrtm(one[1] @ two[1]).real
    theirs = ((one[0] - two[0]) ** 2).sum() + np.trace(one[1] + two[1] - 2 * root)
    assert fid.frechet_distance(*one, *two) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("n", [20, 2000])
def test_frechet_distance_of_equal_sets_is_zero(n):
    one = gaussian(np.random.default_rng(2), n, 300, 1e-3)
    assert abs(fid.frechet_distance(*one, *one)) < 1e-6


# ---- Inception Score, precision and recall ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [60, 103])
def test_inception_score_is_adms_and_torch_fidelitys(n):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(n, 40, generator=torch.Generator().manual_seed(n))
    probs = logits.double().softmax(1).numpy()
    scores = []
    for part in (probs[i : i + 20] for i in range(0, n, 20)):  # ADM, with splits of 20
        kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(kl.sum(1).mean()))
    assert fid.inception_score(probs, 20) == pytest.approx(np.mean(scores), rel=1e-6)
    if n == 60:
        theirs = isc_features_to_metric(logits, splits=3, shuffle=False)["inception_score_mean"]
        assert fid.inception_score(probs, 20) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("block", [7, 4096])
def test_precision_and_recall_are_adms_and_torch_fidelitys(block):
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    rng = np.random.default_rng(3)
    ref, samples = (
        rng.normal(size=(60, 6)).astype("float32"),
        (0.3 + 0.8 * rng.normal(size=(45, 6))).astype("float32"),
    )

    def distances(a, b):
        return ((a[:, None].astype("float64") - b[None]) ** 2).sum(2)

    def radii(x):
        return np.sort(distances(x, x), axis=1)[:, 3]  # column 0 is the picture itself

    precision = (distances(samples, ref) <= radii(ref)).any(1).mean()
    recall = (distances(ref, samples) <= radii(samples)).any(1).mean()
    assert 0.2 < recall < precision < 1
    ours = fid.precision_recall(torch.from_numpy(ref), torch.from_numpy(samples), block=block)
    np.testing.assert_allclose(ours, (precision, recall), atol=1e-6)
    theirs = calculate_precision_recall_full(
        torch.from_numpy(samples).double(), torch.from_numpy(ref).double()
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


# ---- PSNR, SSIM, LPIPS -----------------------------------------------------------------------------------------------


def test_psnr_and_ssim_are_torchmetrics_and_scikit_images():
    import skimage.metrics
    import torchmetrics.functional.image as theirs

    rng = np.random.default_rng(4)
    a = np.stack([smooth(rng, 40, 56) for _ in range(3)])
    b = np.clip(a + rng.normal(0, 12, a.shape), 0, 255).astype(np.uint8)
    x, y = (torch.from_numpy(v).permute(0, 3, 1, 2) for v in (a, b))
    psnr, ssim = fid.psnr(x, y).numpy(), fid.ssim(x, y).numpy()
    expected = [skimage.metrics.peak_signal_noise_ratio(u, v, data_range=255) for u, v in zip(a, b)]
    np.testing.assert_allclose(psnr, expected, atol=1e-4)
    how = dict(
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
    )
    expected = [
        skimage.metrics.structural_similarity(u.astype(float), v.astype(float), **how)
        for u, v in zip(a, b)
    ]
    np.testing.assert_allclose(ssim, expected, atol=1e-4)
    x, y = x.double(), y.double()
    expected = theirs.peak_signal_noise_ratio(
        x, y, data_range=255.0, dim=(1, 2, 3), reduction="none"
    )
    np.testing.assert_allclose(psnr, expected, atol=1e-4)
    full = theirs.structural_similarity_index_measure(
        x, y, data_range=255.0, reduction="none", return_full_image=True
    )[1]
    inside = full[..., 5:-5, 5:-5].mean(
        (1, 2, 3)
    )  # its own mean includes windows over a mirrored border
    np.testing.assert_allclose(ssim, inside, atol=1e-4)
    assert fid.ssim(x, x).tolist() == pytest.approx([1] * 3) and fid.psnr(x, x).isfinite().all()


def test_lpips_is_the_lpips_packages(tmp_path, capsys):
    import lpips

    torch.manual_seed(0)
    theirs = lpips.LPIPS(
        net="vgg", pnet_rand=True, verbose=False
    )  # its linear layers' weights, a random VGG16
    torch.save(theirs.state_dict(), tmp_path / "lpips.pth")
    a, b = torch.rand(2, 2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        close(models.LPIPS([tmp_path / "lpips.pth"])(a, b), theirs.eval()(a, b).flatten(), 1e-4)


# ---- the command -----------------------------------------------------------------------------------------------------

MEASURES = ["fid", "sfid", "inception_score", "precision", "recall"]


def result(path):
    with open(path) as file:
        return json.load(file)


def pixels(path):
    return torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)


def run(weights, *words):
    script(fid, *words, "--inception-weights", weights, "--workers", 0)


@pytest.fixture(scope="module")
def measured(weights, folders, tmp_path_factory):
    """What the command says of a/ against b/, and its result; run in the folder `where`."""
    before, where, told = os.getcwd(), tmp_path_factory.mktemp("measured"), io.StringIO()
    os.chdir(where)
    try:
        with contextlib.redirect_stdout(told):
            run(weights, folders / "a", "--ref", folders / "b", "--out", "folder.json")
    finally:
        os.chdir(before)
    return dict(result(where / "folder.json"), where=where, told=told.getvalue())


def test_two_folders_give_torch_fidelitys_numbers(measured, weights, folders):
    import torch_fidelity

    for words in ("distance is biased upwards", "comparable with each other only", "fid [weights "):
        assert words in measured["told"]
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
    ours = measured["precision"], measured["recall"]
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_the_result_tells_what_moves_it(net, measured, weights, folders, monkeypatch, capsys):
    """An .npz gives what its folder gives; the reference is computed once; the record is whole; sample.py's settings and
    the balance of the labels are in it."""
    monkeypatch.chdir(measured["where"])
    run(weights, folders / "a.npz", "--ref", folders / "b", "--batch-size", 5)
    assert "from runs/cache" in capsys.readouterr().out
    value = result(folders / "a.fid.json")
    for key in MEASURES:
        assert value[key] == pytest.approx(measured[key], rel=1e-5)
    samples, reference = value["samples"], value["reference"]
    assert samples["settings"] == dict(cfg=1.5, steps=7) and samples["labels"] == dict(
        classes=3, fewest=3, most=3
    )
    assert samples["pictures"] == 9 and len(samples["hash"]) == 64 and samples["size"] == 32
    assert reference["pictures"] == 6 and reference["hash"] == measured["reference"]["hash"]
    assert value["network"] == dict(
        name="Inception",
        weights=net.about["weights"],
        published=False,
        resize="TensorFlow 1 bilinear to 299x299",
    )
    assert {"torch", "pillow"} <= set(value["versions"]) and value["provenance"]["processes"] == 1
    assert value["arguments"]["pr_images"] == 50000
    os.utime(folders / "b" / "00.png", (1, 1))  # written over by another picture, perhaps
    run(weights, folders / "a.npz", "--ref", folders / "b", "--out", "again.json", "--num", 4)
    assert (
        "from runs/cache" not in capsys.readouterr().out
        and result("again.json")["samples"]["pictures"] == 4
    )


def test_adms_reference_and_streamed_statistics(net, folders, weights, inside):
    """What collect streams is NumPy's mean and covariance; mu and sigma of an .npz are believed; a set is at distance 0
    from itself, with all its pictures among it, and precision and recall are 1."""
    out = net(pixels(folders / "b.npz"))
    stats = {
        f"{name}{end}": f(out[key].double().numpy())
        for key, end in (("pool", ""), ("spatial", "_s"))
        for name, f in (("mu", lambda x: x.mean(0)), ("sigma", lambda x: np.cov(x, rowvar=False)))
    }
    pictures = fid.Pictures(str(folders / "b.npz"), batch_size=4)
    got = fid.collect(net, pictures.batches(torch.device("cpu"), 0), 6, keep=3)
    for key, value in stats.items():
        close(got[key], value, 1e-6)
    close(got["features"], out["pool"][1::2], 1e-6)
    np.savez("adm.npz", arr_0=np.load(folders / "b.npz")["arr_0"], **stats)
    run(weights, folders / "b.npz", "--ref", "adm.npz", "--out", "same.json")
    same, scale = result("same.json"), np.trace(stats["sigma"])
    assert abs(same["fid"]) < 1e-6 * scale and same["reference"]["statistics"] == "of the file"
    assert same["precision"] == same["recall"] == 1
    np.savez("adm.npz", **dict(stats, mu=stats["mu"] + 1))  # no arr_0: no precision and recall
    reference, record = fid.read_reference(net, "adm.npz", 32, keep=6)
    moved = fid.compare(net, got, reference)
    assert (
        moved["fid"] == pytest.approx(2048, rel=1e-6)
        and abs(moved["sfid"]) < 1e-6 * scale
        and "recall" not in moved
    )


def test_two_processes_give_the_numbers_of_one(measured, weights, folders, inside):
    torchrun(
        2,
        "fid",
        folders / "a.npz",
        "--ref",
        folders / "b",
        "--inception-weights",
        weights,
        "--workers",
        0,
        "--batch-size",
        4,
        "--device",
        "cpu",
        "--out",
        "2.json",
        cwd=inside,
    )
    two = result("2.json")
    for key in MEASURES:
        assert two[key] == pytest.approx(measured[key], rel=1e-6)
    assert two["provenance"]["processes"] == 2


def test_reconstruction(weights, folders, inside, capsys):
    run(weights, "--vae", folders / "vae", "--data", folders / "a", "--lpips", 0, "--num", 6)
    values = result(folders / "vae" / "reconstruction.rfid.json")
    data, vae = ImageSet(str(folders / "a")), load_vae(folders / "vae")
    x = torch.from_numpy(np.stack([data.load(i, 32) for i in (0, 1, 3, 4, 6, 7)])).permute(
        0, 3, 1, 2
    )
    with torch.no_grad():
        y = to_uint8(vae.decode(vae.encode(from_uint8(x))[0]))
    assert values["psnr"] == pytest.approx(fid.psnr(x, y).mean().item(), rel=1e-4)
    assert values["ssim"] == pytest.approx(fid.ssim(x, y).mean().item(), rel=1e-3)
    assert (
        values["rfid"] > 0 and values["samples"]["pictures"] == values["reference"]["pictures"] == 6
    )
    assert not {"lpips", "fid", "precision"} & set(values) and values["vae"]["step"] == 3
    assert "rfid" in capsys.readouterr().out


def test_other_features_are_never_called_fid(folders, inside, capsys):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), "vit.safetensors")
    script(
        fid,
        folders / "a",
        "--ref",
        folders / "b",
        "--features",
        "test_vit",
        "--features-weights",
        "vit.safetensors",
        "--workers",
        0,
    )
    values = result(folders / "a.fd-test_vit.json")
    assert values["fd-test_vit"] > 0 and not {"fid", "sfid", "inception_score"} & set(values)
    assert not any(line.startswith("fid") for line in capsys.readouterr().out.splitlines())


def test_a_folders_pictures_are_cut_to_the_samples_side(net, tmp_path):
    """As ADM's reference was made: 150x70 and 64x90 pictures, for samples of side 32, are halved, resized and cut."""
    rng = np.random.default_rng(5)
    for i, shape in enumerate([(70, 150), (90, 64)]):
        Image.fromarray(smooth(rng, *shape)).save(tmp_path / f"{i}.png")
    [(index, images)] = fid.Pictures(str(tmp_path), size=32).batches(torch.device("cpu"), 0)
    for i, image in enumerate(images):
        cut = adm_crop(Image.open(tmp_path / f"{i}.png"), 32)
        assert index[i] == i and torch.equal(
            image, torch.from_numpy(np.array(cut)).permute(2, 0, 1)
        )
    assert fid.Pictures(str(tmp_path)).size == 64


def test_a_set_as_adm_writes_it(folders, inside):
    """Labels are the second array; the hash is of the content, however it is packed."""
    arrays, labels = np.load(folders / "a.npz")["arr_0"], np.array([0, 0, 0, 0, 1, 1, 5, 5, 5])
    np.savez("adm.npz", arrays, labels)
    np.savez_compressed("packed.npz", arr_1=labels, arr_0=arrays)
    plain, packed = fid.Pictures("adm.npz", batch_size=4), fid.Pictures("packed.npz", batch_size=4)
    assert plain.record["labels"] == dict(classes=3, fewest=2, most=4)
    assert plain.record["hash"] == packed.record["hash"] and len(plain.record["hash"]) == 64
    for pictures in (plain, packed):
        images = torch.cat([images for _, images in pictures.batches(torch.device("cpu"), 0)])
        assert torch.equal(images, torch.from_numpy(arrays).permute(0, 3, 1, 2))
    arrays[8, 31, 31, 2] ^= 1
    np.savez("adm.npz", arrays, labels)
    assert fid.Pictures("adm.npz").record["hash"] != plain.record["hash"]


def test_training_measures_with_it(weights, folders, inside):
    """--fid-every of both training scripts writes the numbers into metrics.jsonl."""
    import train_sit
    import train_vae

    words = [
        "--fid-every",
        1,
        "--fid-num",
        4,
        "--fid-ref",
        folders / "b.npz",
        "--inception-weights",
        weights,
        "--data",
        folders / "a",
        "--steps",
        1,
    ]
    script(
        train_vae,
        *VAE,
        *words,
        "--val",
        folders / "a",
        "--align",
        "none",
        "--gan",
        0,
        "--out",
        "runs/v",
    )
    script(train_sit, *SIT, *words, "--vae", folders / "vae", "--repa", 0, "--out", "runs/s")
    for name, keys in (("v", {"rfid"}), ("s", {"fid", "sfid", "inception_score"})):
        with open(f"runs/{name}/metrics.jsonl") as file:
            lines = [json.loads(line) for line in file]
        assert (
            any(keys <= set(line) for line in lines)
            and np.isfinite([v for line in lines for v in line.values()]).all()
        )


def test_memory_does_not_hold_the_set(tmp_path):
    """Only what is read is held; and no header is believed that claims more than there is."""
    import tracemalloc
    import zipfile

    def write(path, claimed, blocks=20):
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as file,
        ):
            np.lib.format.write_array_header_1_0(
                file, dict(descr="|u1", fortran_order=False, shape=(claimed, 256, 256, 3))
            )
            for _ in range(blocks):
                file.write(bytes(16 * 256 * 256 * 3))
        return str(path)

    path = write(tmp_path / "big.npz", 320)
    tracemalloc.start()
    pictures = fid.Pictures(path)
    batches = pictures.batches(torch.device("cpu"), 0)
    assert len(next(batches)[1]) == len(next(batches)[1]) == 16
    assert tracemalloc.get_traced_memory()[1] < 320 * 256 * 256 * 3 / 4
    tracemalloc.stop()
    with pytest.raises(
        UserError, match="arr_0.npy is cut, or claims the wrong shape .16000, 256, 256, 3"
    ):
        fid.Pictures(write(tmp_path / "lie.npz", 16000))


def test_every_mistake_is_one_sentence(weights, folders, inside, capsys):
    good, ref = folders / "a.npz", folders / "b"
    arrays = np.load(good)["arr_0"]
    np.savez("grey.npz", arr_0=arrays[..., 0])
    np.savez("float.npz", arr_0=arrays.astype("float32") / 255)
    np.savez("planes.npz", arr_0=arrays.transpose(0, 3, 1, 2))
    np.savez("none.npz", arr_0=arrays[:0])
    np.savez("other.npz", pictures=arrays)
    np.savez("code.npz", arr_0=np.array([{}, {}], dtype=object))
    np.savez("flat.npz", arr_0=arrays[:, :0])
    np.savez("wrong.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez("few.npz", arr_0=arrays, labels=np.zeros(5, dtype=int))
    np.savez("onehot.npz", arr_0=arrays, labels=np.eye(9))
    np.savez("pair.npz", arrays, arrays)
    open("text.npz", "w").write("no archive")
    with open("array.npz", "wb") as file:
        np.save(file, arrays)
    open("empty.npz", "wb").close()
    data = open(good, "rb").read()
    open("cut.npz", "wb").write(data[: len(data) // 2])
    middle = bytearray(data)
    middle[5000:6000] = bytes(1000)
    open("damaged.npz", "wb").write(middle)
    os.mkdir("bare")
    os.mkdir("torn")
    Image.fromarray(arrays[0]).save("torn/1.png")
    open("torn/2.png", "wb").write(open("torn/1.png", "rb").read()[:200])

    def error(*words):
        return refused(capsys, fid, *words, "--inception-weights", weights, "--workers", 0)

    for name, words in dict(
        grey="uint8 of shape",
        float="float32",
        planes="(9, 3, 32, 32)",
        none="has 0 pictures",
        other="has 0 pictures",
        code="object",
        flat="(9, 0, 32, 3)",
        empty="not a zip file",
        cut="not a zip file",
        text="not a zip file",
        array="not a zip file",
    ).items():
        sentence = error(f"{name}.npz", "--ref", ref)
        assert (
            words in sentence
            and "uint8 of shape (N,H,W,3)" in sentence
            and f"{name}.npz" in sentence
        )
    assert "few.npz: labels has shape (5,), but arr_0 holds 9 pictures" in error(
        "few.npz", "--ref", ref
    )
    assert "onehot.npz: labels has shape (9, 9)" in error(good, "--ref", "onehot.npz")
    assert "pair.npz: arr_1 has shape (9, 32, 32, 3)" in error("pair.npz", "--ref", ref)
    assert "No such file" in error("absent.npz", "--ref", ref)
    assert "damaged" in error("damaged.npz", "--ref", ref)
    assert "has 9 pictures, but 20 are needed" in error(good, "--ref", ref, "--num", 20)
    for flag, value, least in (
        ("--num", 1, 2),
        ("--batch-size", 0, 1),
        ("--size", 0, 1),
        ("--pr-images", -1, 0),
    ):
        assert f"argument {flag}: {value} is less than {least}" in error(
            good, "--ref", ref, flag, value
        )
    assert "cannot be kept in bare" in error(good, "--ref", ref, "--out", "bare")
    assert "may have Inception's mu and sigma" in error(good, "--ref", "other.npz")
    assert "mu, sigma are no finite statistics" in error(good, "--ref", "wrong.npz")
    assert "cannot be read as .npz" in error(good, "--ref", "cut.npz")
    assert "No such file" in error(good, "--ref", "absent.npz")
    assert "has no pictures" in error(good, "--ref", "bare")
    assert "torn/2.png" in error(good, "--ref", "torn")
    assert "--ref" in error(good)
    assert "--data" in error("--vae", folders / "vae")
    assert "no set of samples" in error("--ref", ref)
    assert "no_such_model" in error(good, "--ref", ref, "--features", "no_such_model")
    assert "No such file" in refused(
        capsys, fid, good, "--ref", ref, "--inception-weights", "absent.pth"
    )
