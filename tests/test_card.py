"""The report card (study/card.py): the prediction, its interval and the places on a planted scale,
against numpy and scipy; the command on drawn pictures, with and without a scale; refusals."""

import json
import os
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import refused, script
from PIL import Image
from scipy import stats

from common.files import UserError, state_hash, write_weights
from common.pictures import ImageSet, from_uint8, to_uint8
from common.weights import load_vae
import fid
from models import VAE
from study import attributes, card, judge, measures, scale
from study.scale import Scale

CARD = types.SimpleNamespace(__name__="study.card", main=card.main)
JUDGE = types.SimpleNamespace(__name__="study.judge", main=judge.main)


# --------------------------------------------------------------------------------------------------
# A planted scale: 25 VAEs, whose distance is 9 - 6 probe + 10 gini and a little noise


@pytest.fixture(scope="module")
def planted():
    rng = np.random.default_rng(0)
    vaes = {}
    for number in range(25):
        probe, gini, psnr = rng.uniform([0.4, 0.25, 29], [0.6, 0.35, 35])
        distance = 9 - 6 * probe + 10 * gini + 0.05 * rng.normal()
        vaes[f"vae{number}"] = {
            "psnr": psnr,
            "class probe": probe,
            "gini": gini,
            "distance 2000": distance,
        }
    vaes["vae0"]["ifid"] = 3.0  # the others have none
    return Scale("data", "classifier", {}, vaes)


def columns_of(planted, *names):
    return [np.array([row[name] for row in planted.vaes.values()]) for name in names]


def test_the_place_counts_the_vaes_that_are_worse(planted):
    psnr, gini = columns_of(planted, "psnr", "gini")
    assert scale.better_than(planted, "psnr", 31.0, True) == ((psnr < 31).sum(), 25)
    assert scale.better_than(planted, "gini", 0.3, False) == ((gini > 0.3).sum(), 25)
    assert scale.better_than(planted, "ifid", 2.0, False) == (1, 1)


def test_the_correlation_is_scipy_s(planted):
    gini, distance = columns_of(planted, "gini", "distance 2000")
    (value, low, high), count = scale.correlation(planted, "gini", "distance 2000")
    assert value == pytest.approx(stats.pearsonr(gini, distance).statistic)
    assert low < value < high
    assert count == 25
    assert scale.correlation(planted, "ifid", "distance 2000") is None


def test_the_planted_pair_is_found_and_its_prediction_is_that_of_least_squares(planted):
    values = {"psnr": 32.0, "class probe": 0.5, "gini": 0.3, "ifid": 3.0}
    found = scale.predict(planted, values, "distance 2000")
    assert found.measures == ("class probe", "gini")
    assert found.value == pytest.approx(9 - 3 + 3, abs=0.05)
    assert found.outside == ()
    probe, gini, distance = columns_of(planted, "class probe", "gini", "distance 2000")
    x = np.stack([np.ones(25), probe, gini], 1)
    new = np.array([1, 0.5, 0.3])
    assert found.value == pytest.approx(new @ np.linalg.pinv(x) @ distance)

    # The jackknife+ of that pair, which every 24 VAEs choose as well.
    lows, highs, errors = [], [], []
    for out in range(25):
        kept = np.arange(25) != out
        coefficients = np.linalg.pinv(x[kept]) @ distance[kept]
        error = distance[out] - x[out] @ coefficients
        errors.append(error)
        lows.append(new @ coefficients - abs(error))
        highs.append(new @ coefficients + abs(error))
    assert found.error == pytest.approx(np.mean(np.square(errors)) ** 0.5)
    # Of 25 numbers the second smallest and the second largest: 0.9 * 26 rounded up is 24.
    assert found.low == pytest.approx(sorted(lows)[1])
    assert found.high == pytest.approx(sorted(highs)[23])


def test_a_value_beyond_the_scale_is_named(planted):
    values = {"class probe": 0.9, "gini": 0.3}
    assert scale.predict(planted, values, "distance 2000").outside == ("class probe",)


def test_a_damaged_scale_is_refused_and_a_missing_one_is_said(inside):
    assert scale.read_scale("scale.json") is None
    (reason,) = card.reasons_against(None, None)
    assert "python -m study.run --report" in reason
    with open("scale.json", "w") as file:
        file.write('{"data": 1}')
    with pytest.raises(UserError, match="cannot be read as the study's scale"):
        scale.read_scale("scale.json")


def test_no_prediction_from_few_vaes(planted):
    few = planted._replace(vaes=dict(list(planted.vaes.items())[:7]))
    assert scale.predict(few, {"gini": 0.3}, "distance 2000") is None
    assert scale.predict(planted, {"ifid": 3.0}, "distance 2000") is None


def test_a_family_of_vaes_is_left_out_together():
    """A measure that tells six families apart has no error on their other members, but a large one
    on a new family."""
    rng = np.random.default_rng(0)
    vaes = {}
    for family in range(6):
        label, distance = rng.normal(size=2)
        for seed in range(3):
            row = {"label": label, "distance 2000": distance}
            vaes[f"f{family}_s{seed}"] = {**row, "family": f"f{family}"}
    found = scale.predict(Scale("", "", {}, vaes), {"label": 0.0}, "distance 2000")
    label, distance = (np.array([row[name] for row in vaes.values()]) for name in row)
    errors = []
    for k in range(6):
        kept = np.arange(18) // 3 != k
        line = np.polyfit(label[kept], distance[kept], 1)
        errors.append(distance[~kept] - np.polyval(line, label[~kept]))
    assert found.error == pytest.approx(np.sqrt(np.square(errors).mean()))
    without = Scale("", "", {}, {vae: vaes[vae] for vae in list(vaes)[:9]})
    assert scale.predict(without, {"label": 0.0}, "distance 2000") is None


def test_a_vae_of_the_study_is_no_part_of_its_own_scale(planted, capsys):
    vaes = {vae: dict(row, hash=f"hash of {vae}") for vae, row in planted.vaes.items()}
    found = planted._replace(vaes=vaes)
    measured = types.SimpleNamespace(info={"hash": "hash of vae3"})
    kept = card.scale_without(found, {"runs/mine": measured})
    assert list(kept.vaes) == [vae for vae in vaes if vae != "vae3"]
    assert "runs/mine is the study's vae3" in capsys.readouterr().out
    measured.info["hash"] = "another"
    assert card.scale_without(found, {"runs/mine": measured}).vaes == vaes
    assert capsys.readouterr().out == ""


def test_the_interval_holds_for_new_vaes():
    """As often as promised, though the measures are chosen on the same VAEs and most of them tell
    nothing."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(30):
        x = rng.normal(size=(15, 3))
        y = x[:, 0] + rng.normal(size=15)
        rows = [dict(zip("abc", row, strict=True)) for row in x]
        vaes = {f"v{k}": {**rows[k], "distance 1": y[k]} for k in range(14)}
        found = scale.predict(Scale("", "", {}, vaes), rows[14], "distance 1")
        inside += found.low <= y[14] <= found.high
    assert 24 <= inside < 30


# --------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def vae(inside):
    """The current folder, with vae/ and other/, two VAEs of random weights."""
    for seed, name in enumerate(("vae", "other")):
        torch.manual_seed(seed)
        net = VAE("f4d4", 32, 32, [1, 1, 1], 1)
        path = inside / "vaes" / name / "vae.safetensors"
        write_weights(path, "vae", net.state_dict(), net.config, {})
    return inside


def draw_classes(folder, names, count, side=32):
    """Pictures of a colour for each class, with noise."""
    rng = np.random.default_rng(0)
    for name in names:
        os.makedirs(f"{folder}/{name}")
        colour = rng.integers(60, 190, 3)
        for i in range(count):
            pixels = colour + rng.integers(-60, 60, (side, side, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(f"{folder}/{name}/{i:02d}.png")


def write_classifier(path, classes):
    torch.manual_seed(0)
    net = judge.Classifier(classes)
    # Its batch norms see some pictures, so that its features are not tiny.
    with torch.no_grad():
        for _ in range(30):
            net(torch.randint(0, 256, (4, 3, 16, 16)))
    net.eval()
    torch.save(net.state_dict(), path)
    return state_hash(net.state_dict())


def read_card():
    with open("runs/card/card.json") as file:
        return json.load(file)


def run(*words):
    script(CARD, "--workers", 0, "--device", "cpu", *words)


def write_scale(found):
    with open("scale.json", "w") as file:
        json.dump(found._asdict(), file)


@pytest.fixture
def own(vae, planted, monkeypatch):
    """Data of two classes of our own, of 24 and 6 pictures each, a classifier, and a scale of other
    pictures."""
    monkeypatch.setattr(scale, "PATH", "scale.json")
    write_scale(planted)
    draw_classes("data/train", "ab", 24, 40)
    draw_classes("data/val", "ab", 6, 40)
    write_classifier("classifier.pt", 2)
    return vae


def test_two_vaes_on_one_s_own_data_and_no_scale(own, capsys):
    run("--vae", "vaes/vae", "vaes/other", "--data", "data", "--classifier", "classifier.pt")
    printed = capsys.readouterr().out
    assert "No scale beside it: the pictures are not those of the study" in printed
    assert "better than" not in printed
    assert "predicted" not in printed
    assert "| vae " in printed
    assert "| other " in printed
    result = read_card()
    assert result["settings"]["size"] == 32
    ours, other = result["vaes"].values()
    assert set(ours["measures"]) == {"psnr", "ssim", "rfid", "floor", "ifid", "class probe", "gini"}
    assert ours["measures"] != other["measures"]
    assert ours["predictions"] == {}
    assert sum(ours["seconds"].values()) > 0
    with Image.open("runs/card/card.png") as picture:
        assert picture.width > 500
    check_reconstructions(ours["measures"])
    sets = [fid.Pictures(f"data/{part}", None, 32) for part in ("val", "train")]
    classifier = judge.load_classifier("classifier.pt")
    study_s = judge.measure_ifid(load_vae("vaes/vae"), classifier, *sets)
    for name in ("ifid", "rfid"):
        assert ours["measures"][name] == pytest.approx(study_s[name], rel=1e-3)


def check_reconstructions(values):
    """Of pictures read, encoded, decoded and compared here."""
    net = load_vae("vaes/vae")
    sets = [ImageSet(f"data/{part}") for part in ("val", "train")]
    originals, real = (data.stack(range(len(data)), 32) for data in sets)
    classifier = judge.load_classifier("classifier.pt")
    with torch.no_grad():
        decoded = to_uint8(net.decode(net.encode(from_uint8(originals))[0]))
        features = [classifier(x)[1].double() for x in (decoded, real)]
    assert values["psnr"] == pytest.approx(fid.psnr(originals, decoded).mean().item(), rel=1e-4)
    assert values["ssim"] == pytest.approx(fid.ssim(originals, decoded).mean().item(), rel=1e-4)
    statistics = [judge.mean_and_covariance(x) for x in features]
    expected = fid.frechet_distance(*statistics[0], *statistics[1])
    assert values["floor"] == pytest.approx(expected, rel=1e-3)


def test_beside_the_scale(vae, planted, capsys, monkeypatch):
    """The planted scale is of these pictures and this classifier."""
    draw_classes("data/train", attributes.CLASSES, 12)
    draw_classes("data/test", attributes.CLASSES, 2)
    monkeypatch.setattr(card, "CLASSIFIER", "classifier.pt")
    monkeypatch.setattr(scale, "PATH", "scale.json")
    found = planted._replace(
        data=ImageSet("data/test").fingerprint, classifier=write_classifier("classifier.pt", 10)
    )
    write_scale(found)
    run("--vae", "vaes/vae", "--data", "data")
    printed = capsys.readouterr().out
    result = read_card()
    assert result["no scale because"] == []
    (ours,) = result["vaes"].values()
    values = ours["measures"]
    assert {"attribute F1", "dci disentanglement", "dci completeness"} < set(values)
    worse, _ = scale.better_than(found, "psnr", values["psnr"], True)
    assert f"{values['psnr']:.2f}, better than {worse} of 25" in printed
    expected = scale.predict(found, values, "distance 2000")
    assert ours["predictions"]["distance 2000"]["value"] == pytest.approx(expected.value)
    assert f"predicted distance at SiT step 2000: {expected.value:.1f}" in printed
    assert "no promise for other data" in printed


def test_the_study_s_pictures_are_recognised_in_other_files(vae, planted, monkeypatch):
    """By the features of the same pixels, in any order; with another picture it is another set."""
    draw_classes("data/train", attributes.CLASSES, 4)
    draw_classes("data/test", attributes.CLASSES, 2)
    trained = write_classifier("classifier.pt", 10)
    words = ["ship", "classifier.pt", "--data", "data", "--out", "shipped.safetensors"]
    script(JUDGE, *words)
    monkeypatch.setattr(card, "CLASSIFIER", "shipped.safetensors")
    found = planted._replace(data=ImageSet("data/test").fingerprint, classifier=trained)

    def reasons():
        args = card.parse_arguments(["--vae", "vaes/vae", "--data", "data", "--workers", "0"])
        bench = measures.Bench(args, 32, torch.device("cpu"))
        bench.compare_in(card.feature_network(args, bench))
        return card.reasons_against(found, bench)

    assert reasons() == []
    for name in attributes.CLASSES:
        with Image.open(f"data/test/{name}/00.png") as picture:
            picture.save(f"data/test/{name}/99.bmp")
        os.remove(f"data/test/{name}/00.png")
    assert ImageSet("data/test").fingerprint != found.data
    assert reasons() == []
    Image.new("RGB", (32, 32), "white").save("data/test/cat/99.bmp")
    (reason,) = reasons()
    assert "the test pictures are at distance" in reason
    found = found._replace(classifier="another", settings={"size": 64})
    assert "the features are not those of the study's classifier" in reasons()
    assert "size is 32, where the study has 64" in reasons()


def test_a_classifier_is_trained_on_one_s_own_classes_once(own, monkeypatch, capsys):
    monkeypatch.setattr(judge, "MIN_STEPS", 2)
    args = card.parse_arguments(["--vae", "vaes/vae", "--data", "data", "--workers", "0"])
    bench = measures.Bench(args, 32, torch.device("cpu"))
    first = card.feature_network(args, bench)
    assert "held-out pictures are classified correctly" in capsys.readouterr().out
    second = card.feature_network(args, bench)
    assert "classif" not in capsys.readouterr().out
    assert first.about == second.about


def test_large_pictures_are_reduced_for_the_classifier(inside):
    torch.manual_seed(0)
    write_classifier("classifier.pt", 2)
    net = card.ClassifierFeatures(judge.load_classifier("classifier.pt"))
    small = torch.randint(0, 256, (2, 3, 64, 64)).to(torch.uint8)
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(net(large)["pool"], net(small)["pool"])


def test_no_prediction_for_latents_of_another_side_or_from_few_vaes(planted):
    found = planted._replace(settings={"latent size": 8})
    ours = {"latents": "4x4x4", "measures": {"class probe": 0.5, "gini": 0.3}, "predictions": {}}
    assert card.verdicts(found, ours) == {}
    (line,) = card.verdict_lines("vaes/x", ours, found)
    assert line == (
        "x: no prediction, because its latents are 4x4x4, and those of the study's VAEs are 8 a "
        "side."
    )
    ours["latents"] = "16x8x8"
    assert list(card.verdicts(found, ours)) == ["distance 2000"]
    few = found._replace(vaes=dict(list(found.vaes.items())[:5]))
    assert card.verdicts(few, ours) == {}
    (line,) = card.verdict_lines("vaes/x", ours, few)
    assert "too few of the study's 5 VAEs" in line


def test_the_shipped_form_of_a_classifier_has_its_features(vae):
    """fp16's rounding moves a distance by less than 1%, and the hash tells what it was."""
    draw_classes("data/test", "ab", 12)
    trained = write_classifier("classifier.pt", 2)
    words = ["ship", "classifier.pt", "--data", "data", "--out", "shipped.safetensors"]
    script(JUDGE, *words)
    first = judge.load_classifier("classifier.pt")
    shipped = judge.load_classifier("shipped.safetensors")
    assert shipped.trained == first.trained == trained
    assert state_hash(shipped.state_dict()) != trained
    data = ImageSet("data/test")
    images = data.stack(range(len(data)), 32)
    half = images[:12]
    distances = [
        judge.feature_distance(*(judge.pooled_features(net, [x]) for x in (half, images)))
        for net in (first, shipped)
    ]
    assert distances[0] > 0
    assert distances[1] == pytest.approx(distances[0], rel=0.01)
    mean, covariance = judge.mean_and_covariance(judge.pooled_features(first, [images]))
    torch.testing.assert_close(shipped.reference[0].double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shipped.reference[1].double(), covariance, rtol=1e-3, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Refusals


def test_data_without_held_out_pictures_are_refused(own, capsys):
    shutil.rmtree("data/val")
    message = refused(capsys, CARD, "--vae", "vaes/vae", "--data", "data")
    assert "data/val or data/test" in message


def test_data_of_one_class_need_another_network(own, vfm_weights, capsys):
    shutil.rmtree("data/train/b")
    shutil.rmtree("data/val/b")
    words = ["--vae", "vaes/vae", "--data", "data", "--device", "cpu"]
    message = refused(capsys, CARD, *words)
    assert "has one class" in message
    assert "--features" in message
    run(*words, "--features", "test_vit", "--features-weights", vfm_weights)
    (ours,) = read_card()["vaes"].values()
    assert set(ours["measures"]) == {"psnr", "ssim", "rfid", "floor", "ifid", "gini"}
    assert read_card()["network"]["name"] == "test_vit"


def test_one_picture_for_each_class_is_refused_before_anything_is_measured(vae, capsys):
    for part in ("train", "val"):
        draw_classes(f"data/{part}", "abc", 1)
    message = refused(capsys, CARD, "--vae", "vaes/vae", "--data", "data")
    assert "gives 0, 3, 3 pictures for training" in message
    assert "without a class probe" in message


def test_two_vaes_of_one_name_are_refused(own, capsys):
    os.makedirs("more")
    shutil.copytree("vaes/vae", "more/vae")
    message = refused(capsys, CARD, "--vae", "vaes/vae", "more/vae", "--data", "data")
    assert "the same last part" in message


def test_several_processes_are_refused(own, capsys, monkeypatch):
    """Each would measure its share of the pictures only."""
    monkeypatch.setattr(card, "world", lambda: 2)
    assert "one process" in refused(capsys, CARD, "--vae", "vaes/vae", "--data", "data")


def test_a_file_that_is_no_classifier_is_refused(own, capsys):
    words = ["--vae", "vaes/vae", "--data", "data", "--classifier", "vaes/vae/vae.safetensors"]
    assert "cannot be read as a classifier" in refused(capsys, CARD, *words)
