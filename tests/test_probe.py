"""probe.py: its measures and its fit against scikit-learn, the readers on miniature benchmarks in
the published formats, latents with known contents, and the command from end to end.

    python -m pytest tests/test_probe.py
"""

import csv
import json
import os
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

import models
import probe
import train_vae
from common.files import write_weights
from common.pictures import from_uint8
from common.weights import load_vae
from conftest import PLAIN_VAE, command, refused, script, torchrun
from probing import benchmarks, editing, latent_shape, multilabel
from probing.benchmarks import read_benchmarks
from probing.correlation import correlate, report
from tools.pictures import ATTRIBUTES, SHAPES, draw_picture, draw_pictures


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------
# Measures against scikit-learn


def scores_and_targets(n, change_scores):
    """Random scores and targets (n,7). Attribute 0 never occurs and 1 always does; 2 is never
    predicted and 3 always is."""
    rng = np.random.default_rng(0)
    scores = change_scores(rng.normal(size=(n, 7)))
    frequency = rng.uniform(0.05, 0.9, 7)
    targets = (rng.random((n, 7)) < frequency).astype(np.int8)
    targets[:, 0] = 0
    targets[:, 1] = 1
    scores[:, 2] = -1
    scores[:, 3] = 1
    return scores, targets


CASES = {
    "random": scores_and_targets(200, lambda scores: scores),
    "ties": scores_and_targets(200, np.round),
    "all equal": scores_and_targets(50, lambda scores: np.full_like(scores, 0.3)),
    "one picture": scores_and_targets(1, lambda scores: scores),
}
all_cases = pytest.mark.parametrize("scores,targets", CASES.values(), ids=CASES.keys())


@all_cases
def test_f1_is_that_of_scikit_learn(scores, targets):
    for threshold in (0.0, 0.3, np.linspace(-1, 1, scores.shape[1])):
        predicted = scores > threshold
        macro, micro, each = multilabel.f1_scores(scores, targets, threshold)

        def theirs(average, predicted=predicted):
            return metrics.f1_score(targets, predicted, average=average, zero_division=0)

        assert macro == pytest.approx(theirs("macro"), abs=1e-6)
        assert micro == pytest.approx(theirs("micro"), abs=1e-6)
        np.testing.assert_allclose(each, theirs(None), atol=1e-6)


@all_cases
def test_average_precision_is_that_of_scikit_learn(scores, targets):
    with warnings.catch_warnings():
        # scikit-learn warns of an attribute that never occurs.
        warnings.simplefilter("ignore")
        theirs = [
            metrics.average_precision_score(target, score)
            for target, score in zip(targets.T, scores.T, strict=True)
        ]
    np.testing.assert_allclose(multilabel.average_precision(scores, targets), theirs, atol=1e-6)


@all_cases
def test_topk_recall_is_that_of_scikit_learn(scores, targets):
    has_any = targets.any(1)
    order = np.argsort(-scores, axis=1, kind="stable")
    for k in (1, 3, 5, 7, 9):
        highest = np.zeros_like(targets)
        np.put_along_axis(highest, order[:, :k], 1, axis=1)
        theirs = metrics.recall_score(
            targets[has_any], highest[has_any], average="samples", zero_division=0
        )
        assert multilabel.topk_recall(scores, targets, k) == pytest.approx(theirs, abs=1e-6)


def test_unknown_targets_do_not_count():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(300, 3))
    targets = rng.integers(-1, 2, (300, 3)).astype(np.int8)
    f1 = multilabel.f1_scores(scores, targets)[2]
    precision = multilabel.average_precision(scores, targets)
    for a in range(3):
        known = targets[:, a] >= 0
        target = targets[known, a]
        score = scores[known, a]
        assert f1[a] == pytest.approx(metrics.f1_score(target, score > 0), abs=1e-6)
        theirs = metrics.average_precision_score(target, score)
        assert precision[a] == pytest.approx(theirs, abs=1e-6)


def test_measures_are_0_where_nothing_occurs():
    scores = np.ones((4, 3))
    targets = np.zeros((4, 3), np.int8)
    assert multilabel.f1_scores(scores, targets)[:2] == (0, 0)
    assert multilabel.topk_recall(scores, targets, 2) == 0
    assert multilabel.average_precision(scores, targets).tolist() == [0, 0, 0]


def test_bootstrap_weights_are_resampled_pictures():
    """A measure with the counts of a draw as weights is the measure of the drawn pictures."""
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(80, 5)).round(1)
    targets = rng.integers(-1, 2, (80, 5)).astype(np.int8)
    draw = rng.integers(0, 80, 80)
    weights = np.stack([np.ones(80), np.bincount(draw, minlength=80)])
    drawn = (scores[draw], targets[draw])

    macro, micro, each = multilabel.f1_scores(scores, targets, 0, weights)
    assert (macro[1], micro[1]) == pytest.approx(multilabel.f1_scores(*drawn)[:2])
    assert each.shape == (2, 5)
    precision = multilabel.average_precision(scores, targets, weights)
    np.testing.assert_allclose(precision[1], multilabel.average_precision(*drawn))
    recall = multilabel.topk_recall(scores, targets, 2, weights)
    assert recall[1] == pytest.approx(multilabel.topk_recall(*drawn, 2))


def test_the_interval_is_about_the_binomial_one():
    rng = np.random.default_rng(3)
    predicted = rng.integers(0, 4, 900)
    scores = np.eye(4, dtype=np.float32)[predicted]
    is_right = rng.random(900) < 0.7
    targets = np.where(is_right, predicted, (predicted + 1) % 4)
    values, _ = probe.measure(scores, targets, None, None, seed=0, draws=1000)
    value, low, high = values["accuracy"]
    assert value == pytest.approx(is_right.mean())
    standard_error = (0.7 * 0.3 / 900) ** 0.5
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)


def test_the_best_threshold_is_the_best():
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(60, 4)).round(1).astype(np.float32)
    targets = (rng.random((60, 4)) < [0.1, 0.5, 0.9, 0.0]).astype(np.int8)
    thresholds = multilabel.best_thresholds(scores, targets)
    found = multilabel.f1_scores(scores, targets, thresholds)[2]
    every = [
        multilabel.f1_scores(scores, targets, threshold)[2]
        for threshold in np.arange(-4, 4, 0.05, dtype=np.float32)
    ]
    np.testing.assert_allclose(found, np.max(every, 0), atol=1e-9)


def test_gini_is_the_mean_difference_over_twice_the_mean():
    x = np.random.default_rng(5).exponential(size=300)
    differences = np.abs(x[:, None] - x)
    assert latent_shape.gini(x) == pytest.approx(differences.mean() / (2 * x.mean()))
    assert latent_shape.gini(np.ones(9)) == pytest.approx(0)
    assert latent_shape.gini([0] * 99 + [1]) == pytest.approx(0.99)


# --------------------------------------------------------------------------------------------------
# The fit


def make_features(n, d, a, seed=0, noise=0.5):
    """Features float32 (n,d) that are correlated, of very different variances, and not centred; and
    noisy linear scores (n,a), from which thresholds make attributes."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) / np.sqrt(d) * np.exp(-np.arange(d) / 20)
    x = (rng.normal(size=(n, d)) @ mix.T + 0.3).astype(np.float32)
    directions = rng.normal(size=(d, a)) / np.sqrt(d)
    scores = (x - x.mean(0)) / x.std(0) @ directions + noise * rng.normal(size=(n, a))
    return x, scores


def scikit_learn_scores(train_x, train_y, test_x, strengths):
    """Logits (M,A) of scikit-learn's converged fit for features (M,D), with a strength for each of
    the A attributes."""
    mean, std = train_x.mean(0), train_x.std(0)
    train_x = (train_x - mean) / std
    test_x = (test_x - mean) / std
    scores = np.zeros((len(test_x), len(strengths)))
    for a, strength in enumerate(strengths):
        known = train_y[:, a] >= 0
        # Its C is the inverse of the penalty on the sum of the losses; ours is on their mean.
        c = 1 / (float(strength) * known.sum())
        fit = LogisticRegression(C=c, tol=1e-8, max_iter=20000)
        fit.fit(train_x[known], train_y[known, a])
        scores[:, a] = fit.decision_function(test_x)
    return scores


def assert_f1_agrees(ours, theirs, targets):
    """Macro and micro F1 of two sets of logits differ by at most 0.002."""
    f1 = multilabel.f1_scores(ours, targets)[:2]
    np.testing.assert_allclose(f1, multilabel.f1_scores(theirs, targets)[:2], atol=0.002)


# The second has fewer rows than features.
@pytest.mark.parametrize("n,d", [(1500, 60), (100, 150)])
@pytest.mark.parametrize("strength", [1e-1, 1e-2, 1e-4])
def test_the_fit_is_that_of_scikit_learn(n, d, strength):
    x, scores = make_features(n + 500, d, 4)
    y = (scores > [0, 0.5, 1, -1]).astype(np.int8)
    y[::7, 3] = -1
    fit = probe.fit_linear_probe(x[:n], y[:n], x[n:], y[n:], [strength])
    assert fit.info["unconverged"] == 0
    assert fit.scores(x).shape == y.shape
    ours = fit.scores(x[n:])
    theirs = scikit_learn_scores(x[:n], y[:n], x[n:], [strength] * 4)
    np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(theirs).mean())
    assert_f1_agrees(ours, theirs, y[n:])


# All strengths in one group, or one by one.
@pytest.mark.parametrize("outputs_at_once", [512, 1])
def test_the_softmax_fit_is_that_of_scikit_learn(monkeypatch, outputs_at_once):
    monkeypatch.setattr(probe, "OUTPUTS_AT_ONCE", outputs_at_once)
    x, scores = make_features(1500, 40, 5)
    y = scores.argmax(1)
    ours = probe.fit_linear_probe(x[:1000], y[:1000], x[1000:], y[1000:], [1e-3, 1e6])
    # With strength 1e6 all weights are about 0.
    assert ours.strength == pytest.approx([1e-3] * 5)
    scaled = (x - x[:1000].mean(0)) / x[:1000].std(0)
    fit = LogisticRegression(C=1, tol=1e-8, max_iter=10000).fit(scaled[:1000], y[:1000])
    np.testing.assert_allclose(
        torch.from_numpy(ours.scores(x[1000:])).softmax(1),
        fit.predict_proba(scaled[1000:]),
        atol=0.005,
    )


def test_a_fit_in_parts_and_from_the_disk_is_the_same(tmp_path, monkeypatch):
    """Attributes in small groups, and rows in small blocks of a memory-mapped fp16 file. Each
    attribute gets the strength that it gets with others."""
    x, scores = make_features(1200, 30, 6)
    y = (scores > 0.3).astype(np.int8)
    np.save(tmp_path / "x.npy", x.astype(np.float16))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    whole = probe.fit_linear_probe(x[:800], y[:800], x[800:], y[800:])
    monkeypatch.setattr(probe, "PICTURES_AT_ONCE", 64)
    monkeypatch.setattr(probe, "OUTPUTS_AT_ONCE", 7)
    parts = probe.fit_linear_probe(x[:800], y[:800], x[800:], y[800:])
    np.testing.assert_array_equal(whole.strength, parts.strength)
    np.testing.assert_allclose(whole.scores(x), parts.scores(x), atol=0.02)


def test_a_fit_to_features_in_bf16(monkeypatch):
    """As for 200,000 x 8192 features, which would be too many in fp32."""
    monkeypatch.setattr(probe, "FP32_BYTES", 0)
    x, scores = make_features(6000, 60, 8)
    y = (scores > [0, 0.5, 1, 1.5, 2, 2.5, -1, -2]).astype(np.int8)
    whitened = probe.whiten(x[:3000], torch.device("cpu"))[-1]
    assert whitened.dtype == torch.bfloat16
    variances = whitened.float().square().mean(0)
    assert (variances - 1).abs().max() < 0.01
    ours = probe.fit_linear_probe(x[:3000], y[:3000], x[3000:4000], y[3000:4000])
    theirs = scikit_learn_scores(x[:3000], y[:3000], x[4000:], ours.strength)
    assert_f1_agrees(ours.scores(x[4000:]), theirs, y[4000:])


def test_slow_fits_converge():
    """Attributes that can be told apart and a weak penalty: 1,139 steps for the slowest."""
    features = []
    targets = []
    for number, shape in enumerate(SHAPES):
        for i in range(100):
            picture, present = draw_picture(shape, 16, np.random.default_rng([number, i]))
            features.append(picture.ravel() / 255)
            targets.append([attribute in present for attribute in ATTRIBUTES])
    x = np.array(features, np.float32)
    y = np.array(targets, np.int8)
    fit = probe.fit_linear_probe(x, y, x, y, [1e-5])
    assert fit.info["iterations"] > 300
    assert fit.info["unconverged"] == 0


def test_a_fit_is_converged_and_repeats():
    x, scores = make_features(2000, 60, 5)
    y = (scores > [0, 0.5, 1, 1.5, -1]).astype(np.int8)
    data = (x[:1000], y[:1000], x[1000:1500], y[1000:1500])
    first = probe.fit_linear_probe(*data)
    again = probe.fit_linear_probe(*data)
    longer = probe.fit_linear_probe(*data, iterations=600, tolerance=1e-10)

    def f1_macro(fit):
        return multilabel.f1_scores(fit.scores(x[1500:]), y[1500:])[0]

    assert f1_macro(first) == f1_macro(again)
    assert torch.equal(first.weight, again.weight)
    assert abs(f1_macro(first) - f1_macro(longer)) < 0.002


def test_tf32_is_off_during_a_fit_and_as_before_after_it(monkeypatch):
    seen = []

    def whiten(*words):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return real_whiten(*words)

    real_whiten = probe.whiten
    monkeypatch.setattr(probe, "whiten", whiten)
    x, scores = make_features(60, 5, 1)
    y = (scores > 0).astype(np.int8)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        probe.fit_linear_probe(x[:40], y[:40], x[40:], y[40:])
        assert seen == [False]
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_attributes_and_features_that_never_change():
    x, scores = make_features(300, 10, 3)
    y = (scores > 0).astype(np.int8)
    x[:, 4] = 7
    y[:200, 0] = 0
    y[:200, 1] = 1
    logits = probe.fit_linear_probe(x[:200], y[:200], x[200:], y[200:]).scores(x)
    assert np.isfinite(logits).all()
    assert (logits[:, 0] < -3).all()
    assert (logits[:, 1] > 3).all()


def test_factors_are_found_only_where_a_linear_map_finds_them():
    """A rotation leaves eight binary factors to a linear map; a random non-linear network hides
    them."""
    rng = np.random.default_rng(6)
    factors = rng.integers(0, 2, (3000, 8)).astype(np.int8)
    rotation = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    linear = np.hstack([2.0 * factors - 1, rng.normal(size=(3000, 24))]) @ rotation
    hidden = linear
    for _ in range(3):
        hidden = np.sin(hidden @ rng.normal(size=(32, 32)) * 0.5)

    def f1_macro(x):
        x = x.astype(np.float32)
        fit = probe.fit_linear_probe(x[:2000], factors[:2000], x[2000:2500], factors[2000:2500])
        return multilabel.f1_scores(fit.scores(x[2500:]), factors[2500:])[0]

    assert f1_macro(linear) > 0.99
    assert f1_macro(hidden) < 0.75


# --------------------------------------------------------------------------------------------------
# Readers, on miniature benchmarks in the published formats


def arguments(*words):
    return probe.parse_arguments(["--task", "attributes", *map(str, words)])


def read_one(*words):
    """The only benchmark that the flags lead to."""
    [benchmark] = read_benchmarks(arguments(*words))
    return benchmark


def read_classes(folder):
    args = arguments("--data", folder)
    args.task = ["classes"]
    [benchmark] = read_benchmarks(args)
    return benchmark


def refusal(capsys, root, *words):
    """The sentence with which probe.py refuses a benchmark's folder."""
    return refused(capsys, probe, "--data", root, "--vae", "unused", *words)


def sizes(benchmark):
    """Numbers of training, validation and test pictures."""
    return [part.stop - part.start for part in benchmark.parts]


def write_picture(path, number=0):
    """A picture of one colour, which depends on the number."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    colour = (number * 37 % 256, number * 91 % 256, 90)
    Image.new("RGB", (20, 16), colour).save(path)


def write_text(path, text, line_end="\n"):
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w", newline="") as file:
        file.write(text.replace("\n", line_end))


all_line_ends = pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["unix", "windows"])


CELEBA_NAMES = [f"{i:06d}.jpg" for i in range(1, 7)]
CELEBA_VALUES = ["-1  1 -1", "-1 -1  1", " 1  1  1", " 1 -1 -1", "-1 -1 -1", " 1  1 -1"]
CELEBA_TARGETS = [[0, 1, 0], [0, 0, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]
CELEBA_SPLIT = [0, 0, 0, 1, 2, 2]


def celeba_txt():
    """The two annotation files as published."""
    attributes = "6\n5_o_Clock_Shadow Bald Eyeglasses \n"
    splits = ""
    for name, values, split in zip(CELEBA_NAMES, CELEBA_VALUES, CELEBA_SPLIT, strict=True):
        attributes += f"{name} {values}\n"
        splits += f"{name} {split}\n"
    return attributes, splits


def celeba_csv():
    """The two annotation files in Kaggle's form."""
    attributes = "image_id,5_o_Clock_Shadow,Bald,Eyeglasses\n"
    splits = "image_id,partition\n"
    for name, values, split in zip(CELEBA_NAMES, CELEBA_VALUES, CELEBA_SPLIT, strict=True):
        attributes += ",".join([name, *values.split()]) + "\n"
        splits += f"{name},{split}\n"
    return attributes, splits


def make_celeba(root, form="txt", line_end="\n", change=None):
    """Writes six pictures and their annotations, and returns root as a string. change: a function
    of the text of the attributes' file."""
    folder = os.path.join(root, "img_align_celeba")
    attributes, splits = celeba_txt()
    if form == "csv":
        # The published archive unpacks to a folder in a folder of the same name.
        folder = os.path.join(folder, "img_align_celeba")
        attributes, splits = celeba_csv()
    if change is not None:
        attributes = change(attributes)
    for i, name in enumerate(CELEBA_NAMES):
        write_picture(os.path.join(folder, name), i)
    write_text(os.path.join(root, f"list_attr_celeba.{form}"), attributes, line_end)
    write_text(os.path.join(root, f"list_eval_partition.{form}"), splits, line_end)
    return str(root)


@pytest.mark.parametrize("form", ["txt", "csv"])
@all_line_ends
def test_celeba(tmp_path, form, line_end):
    benchmark = read_one("--data", make_celeba(tmp_path / "celeba", form, line_end))
    assert benchmark.attributes == ["5_o_Clock_Shadow", "Bald", "Eyeglasses"]
    assert benchmark.names == CELEBA_NAMES
    assert benchmark.targets.tolist() == CELEBA_TARGETS
    assert benchmark.parts == [slice(0, 3), slice(3, 4), slice(4, 6)]
    assert benchmark.load([0, 5], 16).shape == (2, 3, 16, 16)


def test_celeba_without_header_lines_and_with_a_byte_order_mark(tmp_path):
    """The attributes are then numbered."""

    def change(text):
        return "\ufeff" + text.split("\n", 2)[2]

    benchmark = read_one("--data", make_celeba(tmp_path / "celeba", change=change))
    assert benchmark.attributes == ["0", "1", "2"]
    assert benchmark.names == CELEBA_NAMES
    assert benchmark.targets.tolist() == CELEBA_TARGETS


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("6\n", "7\n", "lists 6 pictures, but its first line says 7"),
        ("000002.jpg -1", "000002.jpg", "line 4: 2 values instead of 3"),
        ("-1 -1  1", "-1 maybe 1", "line 4: 'maybe' is not one of 1, -1, 0"),
        ("000002", "000001", "line 4: 000001.jpg is listed twice"),
        ("000003", "000013", "differ in 1 pictures, the first is 000003.jpg"),
    ],
)
def test_bad_annotations_are_named(tmp_path, inside, capsys, old, new, message):
    def change(text):
        return text.replace(old, new, 1)

    root = make_celeba(tmp_path / "celeba", change=change)
    assert message in refusal(capsys, root)


def test_a_picture_without_a_split_is_named(tmp_path, inside, capsys):
    def change(text):
        return text.replace("6\n", "7\n", 1) + "000007.jpg 1 1 1\n"

    root = make_celeba(tmp_path / "celeba", change=change)
    assert "differ in 1 pictures, the first is 000007.jpg" in refusal(capsys, root)


def test_empty_annotations_are_refused(tmp_path, inside, capsys):
    root = make_celeba(tmp_path / "celeba", change=lambda text: "")
    assert "lists 0 pictures" in refusal(capsys, root)


def test_missing_pictures_are_named_or_left_out(tmp_path, inside, capsys):
    root = make_celeba(tmp_path / "celeba")
    folder = os.path.join(root, "img_align_celeba")
    os.remove(os.path.join(folder, CELEBA_NAMES[1]))
    message = f"1 annotated pictures are not in {folder}, the first is {CELEBA_NAMES[1]}"
    assert message in refusal(capsys, root)
    benchmark = read_one("--data", root, "--skip-missing")
    assert benchmark.skipped == 1
    assert benchmark.names == CELEBA_NAMES[:1] + CELEBA_NAMES[2:]
    assert benchmark.targets.tolist() == CELEBA_TARGETS[:1] + CELEBA_TARGETS[2:]


def test_an_empty_split_is_refused(tmp_path, inside, capsys):
    root = make_celeba(tmp_path / "celeba")
    # One of three training pictures, and the only one for validation.
    for name in (CELEBA_NAMES[1], CELEBA_NAMES[3]):
        os.remove(os.path.join(root, "img_align_celeba", name))
    message = "gives 2, 0, 2 pictures for training, validation and test"
    assert message in refusal(capsys, root, "--skip-missing")
    error = refusal(capsys, root, "--skip-missing", "--train-images", "0")
    assert "gives 0, 0, 2 pictures" in error


def test_train_images_limit_the_training_split_only(tmp_path):
    root = make_celeba(tmp_path / "celeba")
    everything = read_one("--data", root)
    limited = read_one("--data", root, "--train-images", 2)
    assert sizes(limited) == [2, 1, 2]
    assert limited.fingerprint != everything.fingerprint


def test_test_images_limit_the_other_splits(tmp_path):
    root = make_celeba(tmp_path / "celeba")
    everything = read_one("--data", root)
    limited = read_one("--data", root, "--test-images", 1)
    assert sizes(everything)[2] == 2
    assert sizes(limited) == [sizes(everything)[0], 1, 1]
    assert set(limited.names) < set(everything.names)


DEEPFASHION_NAMES = [f"img/Sheer_Blouse/img_{i:08d}.jpg" for i in range(1, 6)]
DEEPFASHION_VALUES = ["-1  1 -1", " 0 -1  1", " 1  0  1", "-1 -1 -1", " 1  1  0"]


def write_deepfashion_attributes(folder, values, line_end):
    """The files of the attributes' names and of the pictures' attributes, as published."""
    write_text(
        os.path.join(folder, "list_attr_cloth.txt"),
        "3\nattribute_name  attribute_type\na-line         3\n"
        "abstract chevron print            1\nzip-up  4\n",
        line_end,
    )
    text = "5\nimage_name  attribute_labels\n"
    for name, value in zip(DEEPFASHION_NAMES, values, strict=True):
        text += f"{name}     {value}\n"
    write_text(os.path.join(folder, "list_attr_img.txt"), text, line_end)


def make_deepfashion(root, line_end="\n"):
    """Writes five pictures with the coarse annotations, where 0 is unknown, and returns root as a
    string."""
    for i, name in enumerate(DEEPFASHION_NAMES):
        write_picture(os.path.join(root, "Img", name), i)
    write_deepfashion_attributes(os.path.join(root, "Anno_coarse"), DEEPFASHION_VALUES, line_end)
    text = "5\nimage_name  evaluation_status\n"
    splits = ["train", "train", "train", "val", "test"]
    for name, split in zip(DEEPFASHION_NAMES, splits, strict=True):
        text += f"{name}    {split}\n"
    write_text(os.path.join(root, "Eval", "list_eval_partition.txt"), text, line_end)
    return str(root)


def add_fine_annotations(root, line_end="\n"):
    """Adds Anno_fine, where 0 is no, with splits of its own. Returns its folder."""
    folder = os.path.join(root, "Anno_fine")
    values = [value.replace("-1", " 0") for value in DEEPFASHION_VALUES]
    write_deepfashion_attributes(folder, values, line_end)
    splits = {
        "train": DEEPFASHION_NAMES[:3],
        "val": DEEPFASHION_NAMES[3:4],
        "test": DEEPFASHION_NAMES[4:],
    }
    for split, names in splits.items():
        write_text(os.path.join(folder, f"{split}.txt"), "\n".join(names) + "\n", line_end)
    return folder


@all_line_ends
def test_deepfashion(tmp_path, line_end):
    root = make_deepfashion(tmp_path / "deepfashion", line_end)
    benchmark = read_one("--data", root)
    assert benchmark.name == "deepfashion"
    assert benchmark.attributes == ["a-line", "abstract chevron print", "zip-up"]
    # 0 in the file is unknown.
    unknown = -1
    assert benchmark.targets.tolist() == [
        [0, 1, 0],
        [unknown, 0, 1],
        [1, unknown, 1],
        [0, 0, 0],
        [1, 1, unknown],
    ]
    assert benchmark.parts == [slice(0, 3), slice(3, 4), slice(4, 5)]


@all_line_ends
def test_deepfashion_s_fine_attributes(tmp_path, line_end):
    root = make_deepfashion(tmp_path / "deepfashion", line_end)
    fine_folder = add_fine_annotations(root, line_end)
    # With both in the folder, the coarse ones are read.
    assert read_one("--data", root).name == "deepfashion"
    fine = read_one("--data", fine_folder)
    assert fine.name == "deepfashion fine"
    # 0 in the file is no.
    assert fine.targets.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0]]
    assert fine.parts == [slice(0, 3), slice(3, 4), slice(4, 5)]


def test_deepfashion_names_a_missing_picture(tmp_path, inside, capsys):
    root = make_deepfashion(tmp_path / "deepfashion")
    os.remove(os.path.join(root, "Img", DEEPFASHION_NAMES[0]))
    message = f"1 annotated pictures are not in {root}/Img, the first is {DEEPFASHION_NAMES[0]}"
    assert message in refusal(capsys, root)


def test_deepfashion_names_an_unknown_split(tmp_path, inside, capsys):
    root = make_deepfashion(tmp_path / "deepfashion")
    path = os.path.join(root, "Eval", "list_eval_partition.txt")
    with open(path) as file:
        text = file.read()
    write_text(path, text.replace("    val", "    valid"))
    message = "list_eval_partition.txt, line 6: 'valid' is not one of train, val, test"
    assert message in refusal(capsys, root)


def test_deepfashion_names_a_wrong_count(tmp_path, inside, capsys):
    root = make_deepfashion(tmp_path / "deepfashion")
    write_text(
        os.path.join(root, "Anno_coarse", "list_attr_cloth.txt"),
        "4\nattribute_name  attribute_type\na-line  3\n",
    )
    assert "lists 1 attributes, but its first line is '4'" in refusal(capsys, root)


AWA2_CLASSES = ["antelope", "grizzly+bear", "killer+whale"]


def numbered(names):
    """The text of a file with a line `<number> <name>` for each name."""
    return "".join(f"{i:6d}\t{name}\n" for i, name in enumerate(names, 1))


def make_awa2(root, line_end="\n"):
    """Writes 20 pictures of each of three classes, which have two attributes, and returns root as a
    string."""
    files = {
        "classes.txt": numbered(AWA2_CLASSES),
        "predicates.txt": numbered(["black", "furry"]),
        "predicate-matrix-binary.txt": "0 1\n1 1\n1 0\n",
        "trainclasses.txt": "antelope\nkiller+whale\n",
        "testclasses.txt": "grizzly+bear\n",
    }
    for name, text in files.items():
        write_text(os.path.join(root, name), text, line_end)
    for k, class_name in enumerate(AWA2_CLASSES):
        for i in range(20):
            name = f"{class_name}_{10001 + i}.jpg"
            write_picture(os.path.join(root, "JPEGImages", class_name, name), 20 * k + i)
    write_text(os.path.join(root, "JPEGImages", "antelope", "notes.txt"), "not a picture")
    return str(root)


def class_names(picture_names):
    return [name.split("/")[0] for name in picture_names]


@all_line_ends
def test_awa2(tmp_path, line_end):
    root = make_awa2(tmp_path / "awa2", line_end)
    benchmark = read_one("--data", root)
    assert benchmark.attributes == ["black", "furry"]
    assert sizes(benchmark) == [42, 6, 12]
    matrix = {"antelope": [0, 1], "grizzly+bear": [1, 1], "killer+whale": [1, 0]}
    expected = [matrix[class_name] for class_name in class_names(benchmark.names)]
    assert benchmark.targets.tolist() == expected
    # A fifth of each class is the test split.
    test = class_names(benchmark.names[benchmark.parts[2]])
    assert [test.count(class_name) for class_name in AWA2_CLASSES] == [4, 4, 4]
    # The split depends on the seed alone.
    assert read_one("--data", root).names == benchmark.names
    assert read_one("--data", root, "--seed", 1).names != benchmark.names


@all_line_ends
def test_awa2_zero_shot_tests_on_unseen_classes(tmp_path, line_end):
    root = make_awa2(tmp_path / "awa2", line_end)
    unseen = read_one("--data", root, "--zero-shot")
    assert set(class_names(unseen.names[unseen.parts[2]])) == {"grizzly+bear"}
    assert sizes(unseen) == [36, 4, 20]


@pytest.mark.parametrize(
    "file,text,message",
    [
        (
            "predicate-matrix-binary.txt",
            "0 1\n1 -1\n1 0\n",
            "binary.txt: line 2 is not 2 times 0 or 1",
        ),
        ("predicate-matrix-binary.txt", "0 1\n1 1\n", "2 lines for 3 classes"),
        ("testclasses.txt", "polar+bear\n", "testclasses.txt: 'polar+bear' is not in classes.txt"),
    ],
)
def test_awa2_names_what_is_wrong(tmp_path, inside, capsys, file, text, message):
    root = make_awa2(tmp_path / "awa2")
    write_text(os.path.join(root, file), text)
    assert message in refusal(capsys, root, "--zero-shot")


def test_awa2_names_a_missing_class(tmp_path, inside, capsys):
    root = make_awa2(tmp_path / "awa2")
    os.rename(os.path.join(root, "JPEGImages", "killer+whale"), os.path.join(root, "away"))
    assert "has no JPEGImages/killer+whale/" in refusal(capsys, root)


def test_classes_of_one_folder(pictures, inside):
    """A seeded fifth is the test split."""
    benchmark = read_classes(pictures)
    assert sizes(benchmark) == [18, 2, 4]
    assert benchmark.attributes == ["a", "b"]
    folders = [name.split("/")[-2] for name in benchmark.names]
    assert folders == [benchmark.attributes[target] for target in benchmark.targets]


def test_classes_of_train_and_val(pictures, inside, capsys):
    os.makedirs("set")
    for part in ("train", "val"):
        os.symlink(pictures, os.path.join("set", part))
    benchmark = read_classes("set")
    assert sizes(benchmark) == [22, 2, 24]
    assert all("val" in name for name in benchmark.names[benchmark.parts[2]])

    # ImageNet's validation pictures come without class folders.
    os.remove("set/val")
    write_picture("set/val/000001.png")
    error = refusal(capsys, "set", "--task", "classes")
    assert "2 class folders for training, 1 to test" in error


def test_missing_data_is_named(inside, capsys):
    assert "no benchmark under data/" in refused(capsys, probe, "--vae", "unused")
    # Without a VAE it says how to make a small one.
    assert "python demo.py" in refused(capsys, probe)
    assert "no such folder" in refusal(capsys, "nowhere")
    os.makedirs("empty")
    assert "has no annotations in CelebA's" in refusal(capsys, "empty")


def test_a_folder_that_cannot_be_written_to_is_refused(inside, capsys):
    error = refusal(capsys, make_celeba("celeba"), "--out", "/proc/nowhere")
    assert "cannot write into /proc/nowhere" in error


@pytest.mark.parametrize(
    "vaes,text,message",
    [
        ("abc", "vae,fid\na,3.5\nb,nothing\n", "fid.csv, line 3"),
        ("abc", "a,3.5\nb,4\n", "c has none"),
        ("abc", "a,3.5\nb,nan\nc,2\n", "b has none"),
        ("ac", "a,3.5\nb,nan\nc,2\n", "three VAEs or more"),
    ],
)
def test_bad_fids_are_named(inside, capsys, vaes, text, message):
    write_text("fid.csv", text)
    assert message in refused(capsys, probe, "--vae", *vaes, "--gfid", "fid.csv")


# --------------------------------------------------------------------------------------------------
# The shape of the latent space, and correlations


def test_the_shape_tells_clusters_from_one_cloud():
    rng = np.random.default_rng(7)
    cloud = rng.normal(size=(2000, 3, 4))
    centres = rng.normal(size=(4, 3, 1)) * 4
    clusters = centres[rng.integers(0, 4, 2000)] + cloud
    cloud_points = latent_shape.latent_points(cloud.reshape(2000, 12), 3, 0)
    cluster_points = latent_shape.latent_points(clusters.reshape(2000, 12), 3, 0)
    assert cloud_points.shape == (2000, 3)
    covariance = np.cov(cluster_points.T, bias=True)
    assert np.allclose(covariance, np.eye(3), atol=1e-6)

    cloud_gain, about_cloud = latent_shape.mixture(cloud_points, 0, (1, 2, 4))
    cluster_gain, _ = latent_shape.mixture(cluster_points, 0, (1, 2, 4))
    assert cloud_gain["mixture of 4"][0] < 0.03
    assert cluster_gain["mixture of 4"][0] > 0.2
    # The mean log-likelihood of a standard normal variable.
    expected = -0.5 * (1 + np.log(2 * np.pi))
    assert about_cloud["log_likelihood"][1] == pytest.approx(expected, abs=0.05)


def test_a_dense_core_is_less_uniform():
    rng = np.random.default_rng(7)
    points = latent_shape.latent_points(rng.normal(size=(2000, 12)), 3, 0)
    even, about = latent_shape.uniformity(points, 0)
    assert 0 < even["Gini of density"][0] < 1
    assert about["points"] == 2000
    with_core = np.concatenate([points[:1000] * 0.05, points[1000:]])
    uneven, _ = latent_shape.uniformity(with_core, 0)
    assert uneven["Gini of density"] > even["Gini of density"]


def test_correlations_are_those_of_scipy():
    rng = np.random.default_rng(8)
    x = rng.normal(size=7)
    y = rng.normal(size=7)
    found = correlate(x, y, 0)
    assert found["Pearson"][0] == pytest.approx(pearsonr(x, y)[0])
    assert found["Spearman"][0] == pytest.approx(spearmanr(x, y)[0])
    assert all(low <= value <= high for value, low, high in found.values())


def test_equal_numbers_have_no_correlation():
    assert correlate([1, 1, 1], [1, 2, 3], 0)["Pearson"] == [0, 0, 0]


def test_a_missing_matplotlib_costs_the_plot_only(inside, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fids = {"runs/a": 3.0, "runs/b": 2.0, "runs/c": 1.0}
    results = {"faces": {"F1 macro": {"runs/a": [0.1], "runs/b": [0.2], "runs/c": [0.3]}}}
    found = report(results, fids, ".", 0)
    assert found["faces, F1 macro"]["Pearson"][0] == pytest.approx(-1)
    assert "needs `pip install matplotlib`" in capsys.readouterr().out
    assert not os.path.exists("correlation.png")


# --------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with three tiny random VAEs under runs/, of which vae2 is the newest, and 720 of the
    demo's pictures."""
    root = tmp_path_factory.mktemp("made")
    draw_pictures(str(root / "runs" / "demo" / "pictures"), per_class=20)
    for i in range(3):
        torch.manual_seed(i)
        vae = models.VAE("f4d4", 32, 32, [1, 1, 1], 1)
        path = root / "runs" / f"vae{i}" / "vae.safetensors"
        write_weights(path, "vae", vae.state_dict(), vae.config, {"step": i})
        os.utime(path, (i + 1, i + 1))
    return root


PICTURES = "runs/demo/pictures"


def run_probe(*words):
    script(probe, "--workers", 0, "--device", "cpu", *words)


def read_result(folder):
    with open(os.path.join(folder, "result.json")) as file:
        return json.load(file)


def check_record(result):
    """Checks what result.json says about how its measures were made."""
    about = result["benchmarks"]["pictures"]
    assert about["pictures"] == [108, 12, 600]
    assert about["attributes"] == len(ATTRIBUTES)
    assert len(about["fingerprint"]) == 16
    assert result["vaes"]["runs/vae2"]["hash"]
    assert result["arguments"]["seed"] == 0
    assert "commit" in result["provenance"]
    about_fit = result["fits"]["pictures, runs/vae2"]
    assert about_fit["uniformity"]["bandwidth"] > 0
    spent = about_fit["processor_seconds"]
    assert set(spent) == {"features", "probe", "uniformity"}
    assert spent["probe"] > 0


def f1_of_each_attribute(path):
    with open(path) as file:
        return [float(line["f1"]) for line in csv.DictReader(file)]


def test_from_end_to_end(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    tasks = ["--task", "attributes", "--task", "classes", "--task", "uniformity"]
    run_probe(*tasks, "--pictures", 3)
    printed = capsys.readouterr().out
    assert "using the newest VAE: runs/vae2" in printed
    assert "F1 macro" in printed
    assert "majority" in printed

    result = read_result("runs/probe")
    f1 = result["results"]["pictures"]["F1 macro"]
    assert set(f1) == {"runs/vae2", "256 pixels", "majority"}
    assert all(low <= value <= high for value, low, high in f1.values())
    check_record(result)

    each = f1_of_each_attribute("runs/probe/pictures-runs-vae2.csv")
    assert len(each) == len(ATTRIBUTES)
    assert np.mean(each) == pytest.approx(f1["runs/vae2"][0])
    with Image.open("runs/probe/pictures/pictures-runs-vae2/Red.png") as grid:
        assert grid.size[0] > 300


def test_disentanglement_and_editing(made, monkeypatch):
    monkeypatch.chdir(made)
    # Few pictures and a judge of three steps judge badly, which does not matter here.
    monkeypatch.setattr(editing, "JUDGED_PICTURES", 8)
    monkeypatch.setattr(probe, "edit_attributes", partial(editing.edit_attributes, judge_steps=3))
    tasks = ["--task", "disentanglement", "--task", "editing", "--orthogonal"]
    run_probe(*tasks, "--vae", "runs/vae2", "--pictures", 0, "--out", "edited")
    result = read_result("edited")
    values = result["results"]["pictures"]
    # The probe of the pixels has codes too. Nothing is decoded from them.
    assert set(values["DCI disentanglement"]) == {"runs/vae2", "256 pixels"}
    assert set(values["edit: leakage"]) == {"runs/vae2"}
    for name in ("DCI disentanglement", "DCI completeness", "DCI informativeness", "SAP", "MIG"):
        assert 0 <= values[name]["runs/vae2"][0] <= 1
    about = result["fits"]["pictures, runs/vae2"]["editing"]
    assert np.shape(about["leakage"]) == (len(ATTRIBUTES), len(ATTRIBUTES))
    assert about["orthogonal"] is True
    folder = os.path.join("edited", "edits", "pictures-runs-vae2")
    # A picture of each attribute, and leakage.csv.
    assert len(os.listdir(folder)) == len(ATTRIBUTES) + 1


def test_editing_needs_attributes(pictures, inside, capsys):
    with pytest.raises(SystemExit):
        run_probe("--task", "editing", "--data", pictures, "--vae", "none")
    assert "has no annotations" in capsys.readouterr().err


def test_cached_features_are_used_again(made, monkeypatch):
    monkeypatch.chdir(made)
    words = ["--vae", "runs/vae2", "--cache", "kept", "--pictures", 0]
    run_probe(*words, "--out", "first")
    # From here on no picture can be opened.
    monkeypatch.setattr(benchmarks.Benchmark, "load", None)
    run_probe(*words, "--out", "again")
    first = read_result("first")["results"]["pictures"]["F1 macro"]
    assert read_result("again")["results"]["pictures"]["F1 macro"] == first


def test_two_runs_at_once_share_the_features(made):
    """The second waits until those of the first are complete."""
    flags = ["--vae", "runs/vae2", "--workers", 0, "--cache", "shared", "--pictures", 0]
    runs = []
    for out in ("one", "two"):
        words = command(1, "probe", *flags, "--task", "attributes", "--out", out)
        runs.append(subprocess.Popen(words, cwd=made, stderr=subprocess.PIPE, text=True))
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    scores = [read_result(os.path.join(made, out))["results"]["pictures"] for out in ("one", "two")]
    assert scores[0]["F1 macro"] == scores[1]["F1 macro"]


# More features (256) than rows, and fewer.
@pytest.mark.parametrize("n", [200, 400])
def test_the_fit_to_latents_is_that_of_scikit_learn(made, monkeypatch, n):
    monkeypatch.chdir(made)
    benchmark = read_one("--data", PICTURES)
    vae = load_vae("runs/vae0")
    with torch.no_grad():
        latents = vae.encode(from_uint8(benchmark.load(range(720), 32)))[0]
    order = np.random.default_rng(0).permutation(720)
    x = latents.flatten(1).numpy()[order]
    y = benchmark.targets[order]
    test = n + 100
    ours = probe.fit_linear_probe(x[:n], y[:n], x[n:test], y[n:test])
    theirs = scikit_learn_scores(x[:n], y[:n], x[test:], ours.strength)
    assert_f1_agrees(ours.scores(x[test:]), theirs, y[test:])


def test_pictures_are_those_of_extreme_scores(made, monkeypatch, tmp_path):
    monkeypatch.chdir(made)
    benchmark = read_one("--data", PICTURES)
    # The first attribute is whether the only feature is positive.
    x = np.random.default_rng(9).normal(size=(720, 1)).astype(np.float32)
    benchmark.targets[:, 0] = x[:, 0] > 0
    args = arguments("--out", tmp_path, "--pictures", 2)
    probe.probe_one(benchmark, x, "label", 32, args, "cpu")

    path = tmp_path / "pictures" / "pictures-label" / f"{benchmark.attributes[0]}.png"
    # Small pictures are drawn four times as large, with a frame of two of their pixels.
    grid = np.asarray(Image.open(path))[::4, ::4]
    test = benchmark.parts[2]
    order = test.start + np.argsort(-x[test, 0])
    highest = order[:2]
    lowest = order[:-3:-1]
    for i, picks in enumerate((highest, lowest)):
        expected = benchmark.load(picks, 32).permute(0, 2, 3, 1).numpy()
        for j, picture in enumerate(expected):
            top, left = 2 + 34 * i, 2 + 34 * j
            drawn = grid[top : top + 32, left : left + 32]
            np.testing.assert_array_equal(drawn, picture)


def test_classes_and_correlation_with_fid(made, monkeypatch, capsys):
    """Accuracies of three VAEs, and their correlation with FIDs, which are listed by the last parts
    of the VAEs' paths or by the whole paths."""
    monkeypatch.chdir(made)
    write_text("fid.csv", "vae,fid\nvae0,30.5\nvae1,20\nruns/vae2,10\n")
    vaes = ["runs/vae0", "runs/vae1/", "runs/vae2"]
    words = ["--vae", *vaes, "--data", PICTURES, "--task", "classes", "--task", "mixture"]
    run_probe(*words, "--gfid", "fid.csv", "--out", "fids", "--pictures", 0)

    result = read_result("fids")
    accuracy = result["results"]["pictures classes"]["accuracy"]
    values = [accuracy[vae][0] for vae in vaes]
    expected = pearsonr(values, [30.5, 20, 10])[0] if np.ptp(values) else 0
    found = result["correlations"]["pictures classes, accuracy"]
    assert found["Pearson"][0] == pytest.approx(expected)
    with Image.open("fids/correlation.png") as plot:
        assert plot.size[1] >= 320
    assert "FID and pictures classes, accuracy: Pearson" in capsys.readouterr().out


def test_two_processes_give_the_same_result(made, monkeypatch):
    monkeypatch.chdir(made)
    words = ["--vae", "runs/vae0", "--data", PICTURES, "--pictures", 0]
    run_probe(*words, "--out", "one", "--cache", "one")
    machine = ["--workers", 0, "--device", "cpu"]
    torchrun(2, "probe", *machine, *words, "--out", "two", "--cache", "two", cwd=made)
    assert read_result("one")["results"] == read_result("two")["results"]


# --------------------------------------------------------------------------------------------------
# During training


def test_the_training_probe_repeats(made, monkeypatch):
    """It keeps its pictures in memory and gives the same numbers each time."""
    monkeypatch.chdir(made)
    vae = load_vae("runs/vae0")
    measures = [
        probe.training_probe(PICTURES, 32, train_images=100, test_images=80) for _ in range(2)
    ]
    # From here on no picture can be opened.
    monkeypatch.setattr(benchmarks.Benchmark, "load", None)
    first = measures[0](vae)
    assert set(first) == {"probe_f1_macro", "probe_f1_micro"}
    assert 0 < first["probe_f1_macro"] < 1
    assert measures[0](vae) == first
    assert measures[1](vae) == first


def plain_vae_flags(steps):
    """The flags of a short training of the quickest VAE on the demo's pictures."""
    words = [*PLAIN_VAE, "--device", "cpu", "--data", f"{PICTURES}/train", "--steps", steps]
    return [*words, "--stats-images", 16, "--save-every", 100, "--sample-every", 100]


def test_a_probe_during_training_changes_nothing_else(made, monkeypatch):
    """train_vae.py --probe-every writes a finite F1 to metrics.jsonl at its steps and the last one,
    and trains the weights that it trains without."""
    monkeypatch.chdir(made)
    words = plain_vae_flags(steps=5)
    script(train_vae, *words, "--out", "without")
    script(train_vae, *words, "--out", "with", "--probe-every", 2, "--probe-data", PICTURES)
    with open("with/metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    lines = [line for line in lines if "probe_f1_macro" in line]
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line in lines:
        # NaN is in no range.
        assert 0 <= line["probe_f1_macro"] <= 1
        assert 0 <= line["probe_f1_micro"] <= 1
    with_probe = load_vae("with").state_dict()
    without = load_vae("without").state_dict()
    assert set(with_probe) == set(without)
    assert all(torch.equal(with_probe[name], without[name]) for name in without)


def test_a_probe_during_training_needs_its_data(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    words = [*plain_vae_flags(steps=1), "--out", "needs", "--probe-every", 1]
    assert "--probe-every needs --probe-data" in refused(capsys, train_vae, *words)
