"""probe.py: metrics and fit against scikit-learn, the readers on miniature trees in the published formats, planted factors,
and the command from end to end.

    python -m pytest tests/test_probe.py
"""

import csv
import json
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import VAE, refused, script, torchrun
from PIL import Image
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

from common.files import write_weights
from common.pictures import from_uint8
from common.weights import load_vae
import models
import probe
import train_vae
from probing import benchmarks, multilabel, latent_shape as shape
from probing.benchmarks import read_benchmarks
from probing.correlation import correlate, report
from tools.pictures import draw_pictures


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- Metrics against scikit-learn ------------------------------------------------------------------------------------


def cases():
    rng = np.random.default_rng(0)
    for n, a, name in (
        (200, 7, "random"),
        (200, 7, "ties"),
        (50, 7, "all equal"),
        (1, 7, "one picture"),
    ):
        scores, targets = (
            rng.normal(size=(n, a)),
            (rng.random((n, a)) < rng.uniform(0.05, 0.9, a)).astype(np.int8),
        )
        if name == "ties":
            scores = scores.round()
        if name == "all equal":
            scores[:] = 0.3
        targets[:, 0], targets[:, 1], scores[:, 2], scores[:, 3] = (
            0,
            1,
            -1,
            1,
        )  # never, always there; never, always said
        yield pytest.param(scores, targets, id=name)


@pytest.mark.parametrize("scores,targets", list(cases()))
def test_metrics_are_those_of_scikit_learn(scores, targets):
    for threshold in (0.0, 0.3, np.linspace(-1, 1, scores.shape[1])):
        said, options = scores > threshold, dict(zero_division=0)
        macro, micro, each = multilabel.f1_scores(scores, targets, threshold)
        assert macro == pytest.approx(
            metrics.f1_score(targets, said, average="macro", **options), abs=1e-6
        )
        assert micro == pytest.approx(
            metrics.f1_score(targets, said, average="micro", **options), abs=1e-6
        )
        np.testing.assert_allclose(
            each, metrics.f1_score(targets, said, average=None, **options), atol=1e-6
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [metrics.average_precision_score(t, s) for t, s in zip(targets.T, scores.T)]
    np.testing.assert_allclose(multilabel.average_precision(scores, targets), theirs, atol=1e-6)
    for k in (1, 3, 5, 7, 9):
        top = np.zeros_like(targets)
        np.put_along_axis(top, np.argsort(-scores, axis=1, kind="stable")[:, :k], 1, 1)
        some = targets.any(1)
        theirs = metrics.recall_score(targets[some], top[some], average="samples", zero_division=0)
        assert multilabel.topk_recall(scores, targets, k) == pytest.approx(theirs, abs=1e-6)


def test_unknown_targets_do_not_count():
    rng = np.random.default_rng(1)
    scores, targets = rng.normal(size=(300, 3)), rng.integers(-1, 2, (300, 3)).astype(np.int8)
    each, precision = (
        multilabel.f1_scores(scores, targets)[2],
        multilabel.average_precision(scores, targets),
    )
    for a in range(3):
        known = targets[:, a] >= 0
        assert each[a] == pytest.approx(
            metrics.f1_score(targets[known, a], scores[known, a] > 0), abs=1e-6
        )
        assert precision[a] == pytest.approx(
            metrics.average_precision_score(targets[known, a], scores[known, a]), abs=1e-6
        )


def test_nothing_to_find():
    scores, targets = np.ones((4, 3)), np.zeros((4, 3), np.int8)
    assert (
        multilabel.f1_scores(scores, targets)[:2] == (0, 0)
        and multilabel.topk_recall(scores, targets, 2) == 0
    )
    assert multilabel.average_precision(scores, targets).tolist() == [0, 0, 0]


def test_bootstrap_weights_are_resampled_pictures():
    """A measure under the counts of a draw is the measure of the drawn pictures themselves."""
    rng = np.random.default_rng(2)
    scores, targets = (
        rng.normal(size=(80, 5)).round(1),
        rng.integers(-1, 2, (80, 5)).astype(np.int8),
    )
    draw = rng.integers(0, 80, 80)
    weights = np.stack([np.ones(80), np.bincount(draw, minlength=80)])
    drawn = scores[draw], targets[draw]
    macro, micro, each = multilabel.f1_scores(scores, targets, 0, weights)
    assert (macro[1], micro[1]) == pytest.approx(
        multilabel.f1_scores(*drawn)[:2]
    ) and each.shape == (2, 5)
    np.testing.assert_allclose(
        multilabel.average_precision(scores, targets, weights)[1],
        multilabel.average_precision(*drawn),
    )
    assert multilabel.topk_recall(scores, targets, 2, weights)[1] == pytest.approx(
        multilabel.topk_recall(*drawn, 2)
    )


def test_interval_is_about_the_binomial_one():
    rng = np.random.default_rng(3)
    scores, right = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 900)], rng.random(900) < 0.7
    targets = np.where(right, scores.argmax(1), (scores.argmax(1) + 1) % 4)
    value, low, high = probe.measure(scores, targets, None, None, 0, 1000)[0]["accuracy"]
    assert value == pytest.approx(right.mean()) and high - low == pytest.approx(
        2 * 1.96 * (0.21 / 900) ** 0.5, rel=0.1
    )


def test_best_threshold_is_the_best():
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(60, 4)).round(1).astype(np.float32)
    targets = (rng.random((60, 4)) < [0.1, 0.5, 0.9, 0.0]).astype(np.int8)
    found = multilabel.f1_scores(scores, targets, multilabel.best_thresholds(scores, targets))[2]
    every = [
        multilabel.f1_scores(scores, targets, t)[2]
        for t in np.arange(-4, 4, 0.05, dtype=np.float32)
    ]
    np.testing.assert_allclose(found, np.max(every, 0), atol=1e-9)


def test_gini_is_the_mean_difference_over_twice_the_mean():
    x = np.random.default_rng(5).exponential(size=300)
    assert shape.gini(x) == pytest.approx(np.abs(x[:, None] - x).mean() / (2 * x.mean()))
    assert shape.gini(np.ones(9)) == pytest.approx(0) and shape.gini(
        [0] * 99 + [1]
    ) == pytest.approx(0.99)


# ---- The fit ---------------------------------------------------------------------------------------------------------


def latents(n, d, a, seed=0, noise=0.5):
    """Correlated features of very different variances, off centre, and attributes of different rarity."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) / np.sqrt(d) * np.exp(-np.arange(d) / 20)
    x = (rng.normal(size=(n, d)) @ mix.T + 0.3).astype(np.float32)
    z = (x - x.mean(0)) / x.std(0) @ rng.normal(size=(d, a)) / np.sqrt(d) + noise * rng.normal(
        size=(n, a)
    )
    return x, z


@pytest.mark.parametrize("n,d", [(1500, 60), (100, 150)])  # the second: fewer rows than features
@pytest.mark.parametrize("strength", [1e-1, 1e-2, 1e-4])
def test_fit_is_scikit_learns(n, d, strength):
    x, z = latents(n + 500, d, 4)
    y = (z > [0, 0.5, 1, -1]).astype(np.int8)
    y[:, 3][::7] = -1  # unknown
    ours = probe.fit_linear_probe(x[:n], y[:n], x[n:], y[n:], [strength])
    assert ours.info["unconverged"] == 0 and ours.scores(x).shape == y.shape
    scaled, theirs = (x - x[:n].mean(0)) / x[:n].std(0), np.zeros((500, 4))
    for a in range(4):
        known = y[:n, a] >= 0
        fit = LogisticRegression(C=1 / (strength * known.sum()), tol=1e-8, max_iter=10000)
        theirs[:, a] = fit.fit(scaled[:n][known], y[:n, a][known]).decision_function(scaled[n:])
    np.testing.assert_allclose(ours.scores(x[n:]), theirs, atol=0.02 * np.abs(theirs).mean())
    np.testing.assert_allclose(
        multilabel.f1_scores(ours.scores(x[n:]), y[n:])[:2],
        multilabel.f1_scores(theirs, y[n:])[:2],
        atol=0.002,
    )


def test_softmax_is_scikit_learns(monkeypatch):
    x, z = latents(1500, 40, 5)
    y = z.argmax(1)
    for width in (512, 1):  # all strengths at once, or one by one
        monkeypatch.setattr(probe, "OUTPUTS_AT_ONCE", width)
        ours = probe.fit_linear_probe(x[:1000], y[:1000], x[1000:], y[1000:], [1e-3, 1e6])
        assert ours.strength == pytest.approx([1e-3] * 5)  # 1e6 lets nothing through
        fit = LogisticRegression(C=1, tol=1e-8, max_iter=10000)
        scaled = (x - x[:1000].mean(0)) / x[:1000].std(0)
        theirs = fit.fit(scaled[:1000], y[:1000]).predict_proba(scaled[1000:])
        np.testing.assert_allclose(
            torch.from_numpy(ours.scores(x[1000:])).softmax(1), theirs, atol=0.005
        )


def test_fit_in_parts_and_from_disk_is_the_same(tmp_path, monkeypatch):
    """Attributes in chunks, rows streamed from an fp16 file; and each attribute gets the strength it would get alone."""
    x, z = latents(1200, 30, 6)
    np.save(tmp_path / "x.npy", x.astype(np.float16))
    x, y = np.load(tmp_path / "x.npy", mmap_mode="r"), (z > 0.3).astype(np.int8)
    whole = probe.fit_linear_probe(x[:800], y[:800], x[800:], y[800:])
    monkeypatch.setattr(probe, "PICTURES_AT_ONCE", 64)
    monkeypatch.setattr(probe, "OUTPUTS_AT_ONCE", 7)
    parts = probe.fit_linear_probe(x[:800], y[:800], x[800:], y[800:])
    np.testing.assert_array_equal(whole.strength, parts.strength)
    np.testing.assert_allclose(whole.scores(x), parts.scores(x), atol=0.02)


def test_fit_with_rows_in_bf16(monkeypatch):
    """As for 200,000 x 8192 features, which in fp32 would not fit."""
    x, z = latents(6000, 60, 8)
    y = (z > [0, 0.5, 1, 1.5, 2, 2.5, -1, -2]).astype(np.int8)
    monkeypatch.setattr(probe, "FP32_BYTES", 0)
    whole = probe.whiten(x[:3000], torch.device("cpu"))[-1]
    assert whole.dtype == torch.bfloat16 and (whole.float().square().mean(0) - 1).abs().max() < 0.01
    ours = probe.fit_linear_probe(x[:3000], y[:3000], x[3000:4000], y[3000:4000])
    scaled, theirs = (x - x[:3000].mean(0)) / x[:3000].std(0), np.zeros((2000, 8))
    for a, strength in enumerate(ours.strength):
        fit = LogisticRegression(C=1 / (float(strength) * 3000), tol=1e-8, max_iter=10000)
        theirs[:, a] = fit.fit(scaled[:3000], y[:3000, a]).decision_function(scaled[4000:])
    np.testing.assert_allclose(
        multilabel.f1_scores(ours.scores(x[4000:]), y[4000:])[:2],
        multilabel.f1_scores(theirs, y[4000:])[:2],
        atol=0.002,
    )


def test_fit_is_converged_and_repeats():
    x, z = latents(2000, 60, 5)
    y = (z > [0, 0.5, 1, 1.5, -1]).astype(np.int8)
    fits = [
        probe.fit_linear_probe(x[:1000], y[:1000], x[1000:1500], y[1000:1500], **more)
        for more in (dict(), dict(), dict(iterations=600, tolerance=1e-10))
    ]
    f1 = [multilabel.f1_scores(f.scores(x[1500:]), y[1500:])[0] for f in fits]
    assert f1[0] == f1[1] and abs(f1[0] - f1[2]) < 0.002
    assert torch.equal(fits[0].weight, fits[1].weight)


def test_attributes_that_never_change_and_dead_features():
    x, z = latents(300, 10, 3)
    x[:, 4], y = 7, (z > 0).astype(np.int8)
    y[:200, 0], y[:200, 1] = 0, 1
    scores = probe.fit_linear_probe(x[:200], y[:200], x[200:], y[200:]).scores(x)
    assert np.isfinite(scores).all() and (scores[:, 0] < -3).all() and (scores[:, 1] > 3).all()


def test_planted_factors_are_found_only_where_a_line_finds_them():
    """Eight binary factors, mixed by a rotation, are all there for a linear map; bent by a random network they are not."""
    rng = np.random.default_rng(6)
    factors = rng.integers(0, 2, (3000, 8)).astype(np.int8)
    linear = (
        np.hstack([2.0 * factors - 1, rng.normal(size=(3000, 24))])
        @ np.linalg.qr(rng.normal(size=(32, 32)))[0]
    )
    bent = linear
    for _ in range(3):
        bent = np.sin(bent @ rng.normal(size=(32, 32)) * 0.5)

    def score(x):
        x = x.astype(np.float32)
        fit = probe.fit_linear_probe(x[:2000], factors[:2000], x[2000:2500], factors[2000:2500])
        return multilabel.f1_scores(fit.scores(x[2500:]), factors[2500:])[0]

    assert score(linear) > 0.99 and score(bent) < 0.75


# ---- Readers ---------------------------------------------------------------------------------------------------------


def options(*more, **changes):
    args = probe.parse_arguments(["--task", "attributes", *map(str, more)])
    vars(args).update(changes)
    return args


def paint(path, number=0):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.new("RGB", (20, 16), (number * 37 % 256, number * 91 % 256, 90)).save(path)


def write(path, text, end="\n"):
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w", newline="") as file:
        file.write(text.replace("\n", end))


NAMES = [f"{i:06d}.jpg" for i in range(1, 7)]
ROWS = {
    "000001.jpg": "-1  1 -1",
    "000002.jpg": "-1 -1  1",
    "000003.jpg": " 1  1  1",
    "000004.jpg": " 1 -1 -1",
    "000005.jpg": "-1 -1 -1",
    "000006.jpg": " 1  1 -1",
}
SPLIT = [0, 0, 0, 1, 2, 2]
VALUES = [[0, 1, 0], [0, 0, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]


def celeba(root, form="txt", end="\n", change=lambda text: text):
    for i, name in enumerate(NAMES):
        paint(
            os.path.join(
                root, "img_align_celeba" + ("/img_align_celeba" if form == "csv" else ""), name
            ),
            i,
        )
    if form == "txt":
        notes = "6\n5_o_Clock_Shadow Bald Eyeglasses \n" + "".join(
            f"{n} {r}\n" for n, r in ROWS.items()
        )
        parts = "".join(f"{n} {s}\n" for n, s in zip(NAMES, SPLIT))
    else:
        lines = [
            ["image_id", "5_o_Clock_Shadow", "Bald", "Eyeglasses"],
            *([n, *r.split()] for n, r in ROWS.items()),
        ]
        notes = "".join(",".join(line) + "\n" for line in lines)
        parts = "image_id,partition\n" + "".join(f"{n},{s}\n" for n, s in zip(NAMES, SPLIT))
    write(os.path.join(root, f"list_attr_celeba.{form}"), change(notes), end)
    write(os.path.join(root, f"list_eval_partition.{form}"), parts, end)
    return str(root)


@pytest.mark.parametrize(
    "form,end", [("txt", "\n"), ("txt", "\r\n"), ("csv", "\n"), ("csv", "\r\n")]
)
def test_celeba(tmp_path, form, end):
    bench = read_benchmarks(options("--data", celeba(tmp_path / "celeba", form, end)))[0]
    assert bench.attributes == ["5_o_Clock_Shadow", "Bald", "Eyeglasses"] and bench.names == NAMES
    assert bench.targets.tolist() == VALUES and bench.parts == [
        slice(0, 3),
        slice(3, 4),
        slice(4, 6),
    ]
    assert bench.load([0, 5], 16).shape == (2, 3, 16, 16)


def test_celeba_without_header_lines_and_with_a_byte_order_mark(tmp_path):
    """Attributes then go by their numbers."""
    root = celeba(tmp_path / "celeba", change=lambda text: "\ufeff" + text.split("\n", 2)[2])
    bench = read_benchmarks(options("--data", root))[0]
    assert (
        bench.attributes == ["0", "1", "2"]
        and bench.names == NAMES
        and bench.targets.tolist() == VALUES
    )


@pytest.mark.parametrize(
    "change,says",
    [
        (lambda t: t.replace("6\n", "7\n", 1), "lists 6 pictures, but its first line says 7"),
        (lambda t: t.replace("000002.jpg -1", "000002.jpg"), "line 4: 2 values instead of 3"),
        (lambda t: t.replace("-1 -1  1", "-1 maybe 1"), "line 4: 'maybe' is not one of 1, -1, 0"),
        (lambda t: t.replace("000002", "000001"), "line 4: 000001.jpg is listed twice"),
        (lambda t: t.replace("000003", "000013"), "differ in 1 pictures, the first is 000003.jpg"),
        (
            lambda t: t.replace("6\n", "7\n", 1) + "000007.jpg 1 1 1\n",
            "differ in 1 pictures, the first is 000007.jpg",
        ),
        (lambda t: "", "lists 0 pictures"),
    ],
)
def test_bad_annotations_are_named(tmp_path, inside, capsys, change, says):
    root = celeba(tmp_path / "celeba", change=change)
    assert says in refused(capsys, probe, "--data", root, "--vae", "unused")


def test_missing_pictures(tmp_path, inside, capsys):
    root = celeba(tmp_path / "celeba")
    os.remove(os.path.join(root, "img_align_celeba", NAMES[1]))
    assert (
        f"1 annotated pictures are not in {root}/img_align_celeba, the first is {NAMES[1]}"
        in refused(capsys, probe, "--data", root, "--vae", "unused")
    )
    bench = read_benchmarks(options("--data", root, "--skip-missing"))[0]
    assert (
        bench.skipped == 1
        and bench.names == NAMES[:1] + NAMES[2:]
        and bench.targets.tolist() == VALUES[:1] + VALUES[2:]
    )
    os.remove(os.path.join(root, "img_align_celeba", NAMES[3]))
    assert "gives 2, 0, 2 pictures for training, validation and test" in refused(
        capsys, probe, "--data", root, "--vae", "unused", "--skip-missing"
    )
    assert "gives 0, 0, 2 pictures" in refused(
        capsys, probe, "--data", root, "--vae", "unused", "--skip-missing", "--train-images", "0"
    )


def test_train_images_limit_the_training_split_only(tmp_path):
    root = celeba(tmp_path / "celeba")
    bench = read_benchmarks(options("--data", root, "--train-images", 2))[0]
    assert [p.stop - p.start for p in bench.parts] == [2, 1, 2]
    assert bench.fingerprint != read_benchmarks(options("--data", root))[0].fingerprint


def deepfashion(root, notes="Anno_coarse", end="\n"):
    names = [f"img/Sheer_Blouse/img_{i:08d}.jpg" for i in range(1, 6)]
    for i, name in enumerate(names):
        paint(os.path.join(root, "Img", name), i)
    write(
        os.path.join(root, notes, "list_attr_cloth.txt"),
        "3\nattribute_name  attribute_type\na-line         3\n"
        "abstract chevron print            1\nzip-up  4\n",
        end,
    )
    values = ["-1  1 -1", " 0 -1  1", " 1  0  1", "-1 -1 -1", " 1  1  0"]
    if notes == "Anno_fine":
        values = [v.replace("-1", " 0") for v in values]
        for k, split in enumerate(("train", "val", "test")):
            write(
                os.path.join(root, notes, f"{split}.txt"),
                "\n".join((names[:3], names[3:4], names[4:])[k]) + "\n",
                end,
            )
    else:
        statuses = ["train", "train", "train", "val", "test"]
        write(
            os.path.join(root, "Eval", "list_eval_partition.txt"),
            "5\nimage_name  evaluation_status\n"
            + "".join(f"{n}    {s}\n" for n, s in zip(names, statuses)),
            end,
        )
    write(
        os.path.join(root, notes, "list_attr_img.txt"),
        "5\nimage_name  attribute_labels\n"
        + "".join(f"{n}     {v}\n" for n, v in zip(names, values)),
        end,
    )
    return str(root)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_deepfashion(tmp_path, end):
    root = deepfashion(tmp_path / "deepfashion", end=end)
    bench = read_benchmarks(options("--data", root))[0]
    assert bench.attributes == ["a-line", "abstract chevron print", "zip-up"]
    assert bench.targets.tolist() == [
        [0, 1, 0],
        [-1, 0, 1],
        [1, -1, 1],
        [0, 0, 0],
        [1, 1, -1],
    ]  # 0 is unknown
    assert bench.parts == [slice(0, 3), slice(3, 4), slice(4, 5)] and bench.name == "deepfashion"
    deepfashion(tmp_path / "deepfashion", "Anno_fine", end)  # both are there now
    assert read_benchmarks(options("--data", root))[0].name == "deepfashion"
    fine = read_benchmarks(options("--data", os.path.join(root, "Anno_fine")))[0]
    assert fine.name == "deepfashion fine" and fine.parts == bench.parts
    assert fine.targets.tolist() == [
        [0, 1, 0],
        [0, 0, 1],
        [1, 0, 1],
        [0, 0, 0],
        [1, 1, 0],
    ]  # here 0 is no


def test_deepfashion_names_what_is_wrong(tmp_path, inside, capsys):
    root = deepfashion(tmp_path / "deepfashion")
    first = "img/Sheer_Blouse/img_00000001.jpg"
    os.rename(os.path.join(root, "Img", first), os.path.join(root, "away.jpg"))
    assert f"1 annotated pictures are not in {root}/Img, the first is {first}" in refused(
        capsys, probe, "--data", root, "--vae", "unused"
    )
    os.rename(os.path.join(root, "away.jpg"), os.path.join(root, "Img", first))
    parts = os.path.join(root, "Eval", "list_eval_partition.txt")
    with open(parts) as file:
        text = file.read()
    write(parts, text.replace("    val", "    valid"))
    assert "list_eval_partition.txt, line 6: 'valid' is not one of train, val, test" in refused(
        capsys, probe, "--data", root, "--vae", "unused"
    )
    write(parts, text)
    write(
        os.path.join(root, "Anno_coarse", "list_attr_cloth.txt"),
        "4\nattribute_name  attribute_type\na-line  3\n",
    )
    assert "lists 1 attributes, but its first line is '4'" in refused(
        capsys, probe, "--data", root, "--vae", "unused"
    )


def awa2(root, end="\n"):
    classes = ["antelope", "grizzly+bear", "killer+whale"]
    write(
        os.path.join(root, "classes.txt"),
        "".join(f"{i:6d}\t{c}\n" for i, c in enumerate(classes, 1)),
        end,
    )
    write(
        os.path.join(root, "predicates.txt"),
        "".join(f"{i:6d}\t{p}\n" for i, p in enumerate(["black", "furry"], 1)),
        end,
    )
    write(os.path.join(root, "predicate-matrix-binary.txt"), "0 1\n1 1\n1 0\n", end)
    write(os.path.join(root, "trainclasses.txt"), "antelope\nkiller+whale\n", end)
    write(os.path.join(root, "testclasses.txt"), "grizzly+bear\n", end)
    for k, c in enumerate(classes):
        for i in range(20):
            paint(os.path.join(root, "JPEGImages", c, f"{c}_{10001 + i}.jpg"), 20 * k + i)
    write(os.path.join(root, "JPEGImages", "antelope", "notes.txt"), "not a picture")
    return str(root)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_awa2(tmp_path, end):
    root = awa2(tmp_path / "awa2", end)
    bench = read_benchmarks(options("--data", root))[0]
    assert bench.attributes == ["black", "furry"] and [p.stop - p.start for p in bench.parts] == [
        42,
        6,
        12,
    ]
    table = {"antelope": [0, 1], "grizzly+bear": [1, 1], "killer+whale": [1, 0]}
    assert all(table[n.split("/")[0]] == t for n, t in zip(bench.names, bench.targets.tolist()))
    test = [n.split("/")[0] for n in bench.names[bench.parts[2]]]
    assert all(test.count(c) == 4 for c in table)  # a fifth of each class
    assert read_benchmarks(options("--data", root))[0].names == bench.names
    assert read_benchmarks(options("--data", root, "--seed", 1))[0].names != bench.names
    unseen = read_benchmarks(options("--data", root, "--zero-shot"))[0]
    assert {n.split("/")[0] for n in unseen.names[unseen.parts[2]]} == {"grizzly+bear"}
    assert [p.stop - p.start for p in unseen.parts] == [36, 4, 20]


def test_awa2_names_a_bad_line(tmp_path, inside, capsys):
    root = awa2(tmp_path / "awa2")
    write(os.path.join(root, "predicate-matrix-binary.txt"), "0 1\n1 -1\n1 0\n")
    assert "binary.txt: line 2 is not 2 times 0 or 1" in refused(
        capsys, probe, "--data", root, "--vae", "unused"
    )
    write(os.path.join(root, "predicate-matrix-binary.txt"), "0 1\n1 1\n")
    assert "2 lines for 3 classes" in refused(capsys, probe, "--data", root, "--vae", "unused")
    write(os.path.join(root, "predicate-matrix-binary.txt"), "0 1\n1 1\n1 0\n")
    write(os.path.join(root, "testclasses.txt"), "polar+bear\n")
    assert "testclasses.txt: 'polar+bear' is not in classes.txt" in refused(
        capsys, probe, "--data", root, "--vae", "unused", "--zero-shot"
    )
    os.rename(os.path.join(root, "JPEGImages", "killer+whale"), os.path.join(root, "away"))
    assert "has no JPEGImages/killer+whale/" in refused(
        capsys, probe, "--data", root, "--vae", "unused"
    )


def test_classes(pictures, inside, capsys):
    args = options(task=["classes"], data=[str(pictures)])
    bench = read_benchmarks(args)[0]  # one folder: a seeded fifth is the test
    assert [p.stop - p.start for p in bench.parts] == [18, 2, 4] and bench.attributes == ["a", "b"]
    assert [n.split("/")[-2] for n in bench.names] == [bench.attributes[t] for t in bench.targets]
    os.makedirs("set")
    for part in ("train", "val"):
        os.symlink(pictures, os.path.join("set", part))
    bench = read_benchmarks(options(task=["classes"], data=["set"]))[0]  # train and val
    assert [p.stop - p.start for p in bench.parts] == [22, 2, 24]
    assert all("val" in n for n in bench.names[bench.parts[2]])
    os.remove("set/val")
    paint("set/val/000001.png")
    assert "2 class folders for training, 1 to test" in refused(
        capsys, probe, "--data", "set", "--task", "classes", "--vae", "unused"
    )


def test_what_is_not_there_is_named(inside, capsys):
    assert "no benchmark under data/" in refused(capsys, probe, "--vae", "unused")
    assert "python demo.py" in refused(capsys, probe)  # no VAE either
    assert "no such folder" in refused(capsys, probe, "--vae", "unused", "--data", "nowhere")
    assert "cannot write into /proc/nowhere" in refused(
        capsys, probe, "--vae", "unused", "--data", celeba("celeba"), "--out", "/proc/nowhere"
    )
    os.makedirs("empty")
    assert "has no annotations in CelebA's" in refused(
        capsys, probe, "--vae", "unused", "--data", "empty"
    )
    write("fid.csv", "vae,fid\na,3.5\nb,nothing\n")
    assert "fid.csv, line 3" in refused(capsys, probe, "--vae", "a", "b", "c", "--gfid", "fid.csv")
    write("fid.csv", "a,3.5\nb,4\n")
    assert "c has none" in refused(capsys, probe, "--vae", "a", "b", "c", "--gfid", "fid.csv")
    write("fid.csv", "a,3.5\nb,nan\nc,2\n")
    assert "b has none" in refused(capsys, probe, "--vae", "a", "b", "c", "--gfid", "fid.csv")
    assert "three VAEs or more" in refused(capsys, probe, "--vae", "a", "c", "--gfid", "fid.csv")


# ---- Shape of the latent space, correlation --------------------------------------------------------------------------


def test_shape_tells_clusters_from_one_cloud():
    rng = np.random.default_rng(7)
    cloud = rng.normal(size=(2000, 3, 4))
    centres = rng.normal(size=(4, 3, 1)) * 4
    clusters = centres[rng.integers(0, 4, 2000)] + cloud
    even, odd = (shape.latent_points(x.reshape(2000, 12), 3, 0) for x in (cloud, clusters))
    assert even.shape == (2000, 3) and np.allclose(np.cov(odd.T, bias=True), np.eye(3), atol=1e-6)
    gains = [shape.mixture(p, 0, (1, 2, 4)) for p in (even, odd)]
    assert gains[0][0]["mixture of 4"][0] < 0.03 and gains[1][0]["mixture of 4"][0] > 0.2
    assert gains[0][1]["log_likelihood"][1] == pytest.approx(
        -0.5 * (1 + np.log(2 * np.pi)), abs=0.05
    )
    measure, about = shape.uniformity(even, 0)
    assert 0 < measure["Gini of density"][0] < 1 and about["points"] == 2000
    heavy = np.concatenate([even[:1000] * 0.05, even[1000:]])
    assert shape.uniformity(heavy, 0)[0]["Gini of density"] > measure["Gini of density"]


def test_correlations_are_scipys():
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=7), rng.normal(size=7)
    found = correlate(x, y, 0)
    assert found["Pearson"][0] == pytest.approx(pearsonr(x, y)[0]) and found["Spearman"][
        0
    ] == pytest.approx(spearmanr(x, y)[0])
    assert all(low <= value <= high for value, low, high in found.values())
    assert correlate([1, 1, 1], [1, 2, 3], 0)["Pearson"] == [0, 0, 0]


def test_a_missing_matplotlib_costs_the_plot_only(inside, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fids = {"runs/a": 3.0, "runs/b": 2.0, "runs/c": 1.0}
    results = {"faces": {"F1 macro": {"runs/a": [0.1], "runs/b": [0.2], "runs/c": [0.3]}}}
    found = report(results, fids, ".", 0)
    assert found["faces, F1 macro"]["Pearson"][0] == pytest.approx(-1)
    assert "needs `pip install matplotlib`" in capsys.readouterr().out
    assert not os.path.exists("correlation.png")


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's folder with three tiny random VAEs, newest last, and the demo's pictures, few of them."""
    root = tmp_path_factory.mktemp("made")
    draw_pictures(str(root / "runs" / "demo" / "pictures"), per_class=20)
    for i in range(3):
        torch.manual_seed(i)
        vae = models.VAE("f4d4", 32, 32, [1, 1, 1], 1)
        write_weights(
            root / "runs" / f"vae{i}" / "vae.safetensors",
            "vae",
            vae.state_dict(),
            vae.config,
            dict(step=i),
        )
        os.utime(root / "runs" / f"vae{i}" / "vae.safetensors", (i + 1, i + 1))
    return root


FEW = ["--workers", "0", "--device", "cpu"]


def test_from_end_to_end(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    script(
        probe,
        *FEW,
        "--task",
        "attributes",
        "--task",
        "classes",
        "--task",
        "uniformity",
        "--pictures",
        "3",
    )
    printed = capsys.readouterr().out
    assert (
        "using the newest VAE: runs/vae2" in printed
        and "F1 macro" in printed
        and "majority" in printed
    )
    with open("runs/probe/result.json") as file:
        result = json.load(file)
    row = result["results"]["pictures"]["F1 macro"]
    assert set(row) == {"runs/vae2", "256 pixels", "majority"} and all(
        low <= v <= high for v, low, high in row.values()
    )
    about = result["benchmarks"]["pictures"]
    assert (
        about["pictures"] == [108, 12, 600]
        and about["attributes"] == 20
        and len(about["fingerprint"]) == 16
    )
    assert (
        result["vaes"]["runs/vae2"]["hash"]
        and result["arguments"]["seed"] == 0
        and "commit" in result["provenance"]
    )
    assert result["fits"]["pictures, runs/vae2"]["uniformity"]["bandwidth"] > 0
    with open("runs/probe/pictures-runs-vae2.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 20 and np.mean([float(x["f1"]) for x in lines]) == pytest.approx(
        row["runs/vae2"][0]
    )
    assert Image.open("runs/probe/pictures/pictures-runs-vae2/Red.png").size[0] > 300

    # again, with the features that are kept: no picture is opened, nothing else changes
    monkeypatch.setattr(benchmarks.Benchmark, "load", None)
    script(probe, *FEW, "--out", "again", "--pictures", "0")
    with open("again/result.json") as file:
        again = json.load(file)
    assert again["results"]["pictures"]["F1 macro"] == row


def test_fit_on_latents_is_scikit_learns(made, monkeypatch):
    """Real latents, real pictures' attributes; more features (256) than the 200 rows, and fewer."""
    monkeypatch.chdir(made)
    [bench], vae = read_benchmarks(options("--data", "runs/demo/pictures")), load_vae("runs/vae0")
    with torch.no_grad():
        x = vae.encode(from_uint8(bench.load(range(720), 32)))[0].flatten(1).numpy()
    x, y = (v[np.random.default_rng(0).permutation(720)] for v in (x, bench.targets))
    for n in (200, 400):
        ours = probe.fit_linear_probe(x[:n], y[:n], x[n : n + 100], y[n : n + 100])
        scaled, theirs = (x - x[:n].mean(0)) / x[:n].std(0), np.zeros((620 - n, y.shape[1]))
        for a in range(y.shape[1]):
            fit = LogisticRegression(C=1 / (float(ours.strength[a]) * n), tol=1e-8, max_iter=20000)
            theirs[:, a] = fit.fit(scaled[:n], y[:n, a]).decision_function(scaled[n + 100 :])
        np.testing.assert_allclose(
            multilabel.f1_scores(ours.scores(x[n + 100 :]), y[n + 100 :])[:2],
            multilabel.f1_scores(theirs, y[n + 100 :])[:2],
            atol=0.002,
        )


def test_pictures_are_those_of_extreme_scores(made, monkeypatch, tmp_path):
    monkeypatch.chdir(made)
    [bench] = read_benchmarks(options("--data", "runs/demo/pictures"))
    x = np.random.default_rng(9).normal(size=(720, 1)).astype(np.float32)
    bench.targets[:, 0] = x[:, 0] > 0
    probe.probe_one(
        bench, x, "label", 32, options("--out", str(tmp_path), "--pictures", "2"), "cpu"
    )
    drawn = np.asarray(
        Image.open(tmp_path / "pictures" / "pictures-label" / f"{bench.attributes[0]}.png")
    )[::4, ::4]
    order = bench.parts[2].start + np.argsort(-x[bench.parts[2], 0])
    for row, picks in enumerate((order[:2], order[:-3:-1])):
        for column, picture in enumerate(bench.load(picks, 32).permute(0, 2, 3, 1).numpy()):
            np.testing.assert_array_equal(
                drawn[2 + 34 * row : 34 + 34 * row, 2 + 34 * column : 34 + 34 * column], picture
            )


def test_classes_and_fid(made, monkeypatch, capsys):
    """Three VAEs, accuracy of classes, correlation with FIDs given by the folders' names."""
    monkeypatch.chdir(made)
    write("fid.csv", "vae,fid\nvae0,30.5\nvae1,20\nruns/vae2,10\n")
    script(
        probe,
        *FEW,
        "--vae",
        "runs/vae0",
        "runs/vae1/",
        "runs/vae2",
        "--data",
        "runs/demo/pictures",
        "--task",
        "classes",
        "--task",
        "mixture",
        "--gfid",
        "fid.csv",
        "--out",
        "fids",
        "--pictures",
        "0",
    )
    with open("fids/result.json") as file:
        result = json.load(file)
    found = result["correlations"]["pictures classes, accuracy"]
    values = [
        result["results"]["pictures classes"]["accuracy"][v][0]
        for v in ("runs/vae0", "runs/vae1/", "runs/vae2")
    ]
    assert found["Pearson"][0] == pytest.approx(
        pearsonr(values, [30.5, 20, 10])[0] if np.ptp(values) else 0
    )
    assert Image.open("fids/correlation.png").size[1] >= 320
    assert "FID and pictures classes, accuracy: Pearson" in capsys.readouterr().out


def test_two_processes_give_the_same_result(made, monkeypatch):
    monkeypatch.chdir(made)
    words = [*FEW, "--vae", "runs/vae0", "--data", "runs/demo/pictures", "--pictures", "0"]
    script(probe, *words, "--out", "one", "--cache", "one")
    torchrun(2, "probe", *words, "--out", "two", "--cache", "two", cwd=made)
    results = []
    for folder in ("one", "two"):
        with open(os.path.join(folder, "result.json")) as file:
            results.append(json.load(file)["results"])
    assert results[0] == results[1]


def test_quick_probe(made, monkeypatch):
    """What train_vae.py calls between steps: few pictures, the same numbers each time, the training's seed untouched."""
    monkeypatch.chdir(made)
    vae = load_vae("runs/vae0")
    measures = [
        probe.training_probe("runs/demo/pictures", 32, train_images=100, test_images=80)
        for _ in range(2)
    ]
    monkeypatch.setattr(benchmarks.Benchmark, "load", None)  # its pictures are in memory by now
    values = [measures[0](vae), measures[0](vae), measures[1](vae)]
    assert (
        values[0] == values[1] == values[2]
        and 0 < values[0]["probe_f1_macro"] < 1
        and set(values[0]) == {"probe_f1_macro", "probe_f1_micro"}
    )


def test_probe_during_training_changes_nothing_else(made, monkeypatch):
    """train_vae.py --probe-every: finite F1 in metrics.jsonl at its steps and the last; the weights are those without it."""
    monkeypatch.chdir(made)
    words = [
        *VAE,
        "--device",
        "cpu",
        "--data",
        "runs/demo/pictures/train",
        "--align",
        "none",
        "--gan",
        "0",
        "--steps",
        "5",
        "--stats-images",
        "16",
        "--save-every",
        "100",
        "--sample-every",
        "100",
    ]
    script(train_vae, *words, "--out", "without")
    script(
        train_vae,
        *words,
        "--out",
        "with",
        "--probe-every",
        "2",
        "--probe-data",
        "runs/demo/pictures",
    )
    with open("with/metrics.jsonl") as file:
        lines = [line for line in map(json.loads, file) if "probe_f1_macro" in line]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert all(
        0 <= line[k] <= 1 for line in lines for k in ("probe_f1_macro", "probe_f1_micro")
    )  # NaN is not
    ours, theirs = (load_vae(folder).state_dict() for folder in ("with", "without"))
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_probe_during_training_needs_its_data(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    words = [
        *VAE,
        "--device",
        "cpu",
        "--data",
        "runs/demo/pictures/train",
        "--align",
        "none",
        "--gan",
        "0",
        "--steps",
        "1",
    ]
    assert "--probe-every needs --probe-data" in refused(
        capsys, train_vae, *words, "--out", "needs", "--probe-every", "1"
    )
