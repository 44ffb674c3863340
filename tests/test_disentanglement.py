"""probing/disentanglement.py and probing/editing.py: the scores against definitions worked out by
hand, scikit-learn and planted factors; edits of a planted set, whose decoder is known.

    python -m pytest tests/test_disentanglement.py
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import hadamard
from scipy.stats import entropy
from sklearn.metrics import balanced_accuracy_score, mutual_info_score
from sklearn.tree import DecisionTreeClassifier

from common.files import UserError
from probe import fit_linear_probe
from probing import editing
from probing.disentanglement import (
    balanced_accuracy,
    dci,
    disentanglement,
    mutual_informations,
    sap_and_mig,
    threshold_accuracies,
)
from probing.editing import edit_attributes, edit_directions


def planted(n=4000, seed=0):
    """Codes (n,4) and attributes (n,3): codes 0 to 2 each carry one attribute, code 3 none."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, 3)) > [0.5, 0.7, 0.2]).astype(np.int8)
    codes = rng.normal(size=(n, 4))
    codes[:, :3] = 0.2 * codes[:, :3] + targets
    return codes, targets


def mixed(codes):
    """Codes (n,4), rotated so that every new code holds an equal part of each old one."""
    return codes @ (hadamard(4) / 2)


def test_dci_of_importances_whose_entropies_are_known():
    assert dci(np.eye(3)) == (1, 1)
    assert dci(np.ones((4, 3))) == pytest.approx((0, 0), abs=1e-12)
    # A code that is never used, and an attribute that needs two codes equally.
    importance = np.array([[1, 0], [1, 0], [0, 2], [0, 0]], float)
    expected = (1, (1 - np.log(2) / np.log(4) + 1) / 2)
    assert dci(importance) == pytest.approx(expected)


def test_dci_is_the_definitions_sums():
    importance = np.random.default_rng(0).random((7, 5))
    of_codes = [1 - entropy(row / row.sum(), base=5) for row in importance]
    of_attributes = [1 - entropy(column / column.sum(), base=7) for column in importance.T]
    weights = importance.sum(1) / importance.sum()
    assert dci(importance) == pytest.approx((weights @ of_codes, np.mean(of_attributes)))
    with pytest.raises(ValueError, match="no code"):
        dci(np.zeros((3, 2)))


def test_mutual_information_is_scikit_learns():
    codes, targets = planted()
    positive = (targets == 1).astype(np.float32)
    values = mutual_informations(codes, positive, 1 - positive)
    for d, code in enumerate(codes.T):
        edges = np.histogram(code, 20)[1]
        bins = np.digitize(code, edges[1:-1])
        for a, target in enumerate(targets.T):
            assert values[d, a] == pytest.approx(mutual_info_score(target, bins), abs=1e-6)


def test_threshold_accuracy_is_the_best_stump_of_scikit_learn():
    codes, targets = planted(n=300)
    codes = codes.round(1)  # so that many are equal
    positive = (targets == 1).astype(np.float32)
    values = threshold_accuracies(codes, positive, 1 - positive)
    for d, code in enumerate(codes.T):
        cuts = np.append(np.unique(code), np.inf)
        for a, target in enumerate(targets.T):
            each = [balanced_accuracy_score(target, code >= cut) for cut in cuts]
            assert values[d, a] == pytest.approx(max(max(each), 1 - min(each)), abs=1e-9)
    # A tree of depth 1 minimises the Gini impurity, so that it can only be as good or worse.
    stump = DecisionTreeClassifier(max_depth=1, class_weight="balanced").fit(
        codes[:, :1], targets[:, 0]
    )
    accuracy = balanced_accuracy_score(targets[:, 0], stump.predict(codes[:, :1]))
    assert accuracy <= values[0, 0] + 1e-9


def test_scores_are_high_for_planted_codes_and_low_for_mixed_ones():
    codes, targets = planted()
    sap, mig = sap_and_mig(codes, targets)
    mixed_sap, mixed_mig = sap_and_mig(mixed(codes), targets)
    assert sap > 0.4 and mixed_sap < 0.2
    assert mig > 0.8 and mixed_mig < 0.3


def test_unknown_targets_and_attributes_that_never_vary_do_not_count():
    codes, targets = planted()
    expected = sap_and_mig(codes, targets)
    constant = np.ones((len(codes), 1), np.int8)
    assert sap_and_mig(codes, np.hstack([targets, constant])) == expected
    half = targets.copy()
    half[::2] = -1
    sap, mig = sap_and_mig(codes, half)
    alone_sap, alone_mig = sap_and_mig(codes[1::2], targets[1::2])
    assert sap == pytest.approx(alone_sap, abs=1e-9)
    # Bins lie between the extremes of all pictures, so that they differ a little.
    assert mig == pytest.approx(alone_mig, abs=0.02)
    assert np.isnan(sap_and_mig(codes, constant)).all()


def test_balanced_accuracy_is_scikit_learns():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 3))
    targets = rng.integers(0, 2, (200, 3)).astype(np.int8)
    expected = [
        balanced_accuracy_score(target, score > 0)
        for target, score in zip(targets.T, scores.T, strict=True)
    ]
    assert balanced_accuracy(scores, targets) == pytest.approx(expected)


def test_a_probe_that_reads_each_attribute_from_its_code_scores_one():
    codes, targets = planted()
    weight = np.eye(4)[:, :3]
    values, about = disentanglement(weight, codes.std(0), codes[:, :3] - 0.5, codes, targets)
    assert values["DCI disentanglement"] == [1]
    assert values["DCI completeness"] == [1]
    assert values["DCI informativeness"][0] > 0.98
    assert about["codes"] == 4


# --------------------------------------------------------------------------------------------------
# Editing


def latents_of(targets, rng):
    """Latents (N,6) in which the first three hold the attributes (N,3), mixed by a fixed rotation
    with three that hold none."""
    codes = rng.normal(size=(len(targets), 6))
    codes[:, :3] = 0.3 * codes[:, :3] + 2 * targets - 1
    return (codes @ MIXING).astype(np.float32)


MIXING = np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))[0]


def decode(latents):
    """Latents (b,6) -> uint8 (b,3,16,16): a third of the picture, in one colour, is as bright as
    the attribute's code is high."""
    codes = latents.numpy() @ MIXING.T
    pictures = np.full((len(codes), 3, 16, 16), 40.0)
    for a in range(3):
        brightness = 127.5 + 100 * codes[:, a].clip(-1, 1)
        pictures[:, a, :, 5 * a : 5 * a + 5] = brightness[:, None, None]
    return torch.as_tensor(pictures).to(torch.uint8)


class PlantedBenchmark(SimpleNamespace):
    def load(self, indices, size):
        assert size == 16
        return decode(torch.as_tensor(self.latents[indices]))


@pytest.fixture(scope="module")
def planted_pictures():
    """600 pictures with three attributes; the third occurs more often where the first does."""
    rng = np.random.default_rng(0)
    targets = (rng.random((600, 3)) < 0.5).astype(np.int8)
    follows = rng.random(600) < 0.5
    targets[follows, 2] = targets[follows, 0]
    return PlantedBenchmark(
        name="planted",
        attributes=["red", "green", "blue"],
        targets=targets,
        latents=latents_of(targets, rng),
        parts=[slice(0, 400), slice(400, 450), slice(450, 600)],
    )


@pytest.fixture(scope="module")
def probe(planted_pictures):
    training, validation, _ = planted_pictures.parts
    x, y = planted_pictures.latents, planted_pictures.targets
    return fit_linear_probe(x[training], y[training], x[validation], y[validation])


@pytest.mark.parametrize("kind", ["pattern", "weight"])
def test_directions_are_one_standard_deviation_long(planted_pictures, probe, kind):
    latents = torch.as_tensor(planted_pictures.latents)
    for orthogonal in (False, True):
        directions = edit_directions(probe.weight, latents, kind, orthogonal)
        for direction in directions.numpy():
            length = np.linalg.norm(direction)
            along = planted_pictures.latents @ (direction / length)
            assert along.std() == pytest.approx(length, rel=1e-4)
    # The last ones are orthogonal: no other score moves.
    moved = (directions @ probe.weight).numpy()
    assert (moved.diagonal() > 0).all()
    others = moved - np.diag(moved.diagonal())
    assert np.abs(others).max() < 1e-3 * moved.diagonal().min()


def test_the_pattern_is_the_regression_of_the_latents_on_the_score(planted_pictures, probe):
    latents = torch.as_tensor(planted_pictures.latents)
    direction = edit_directions(probe.weight, latents, "pattern", orthogonal=False)[0].numpy()
    scores = (latents @ probe.weight)[:, 0].numpy()
    slope = np.polyfit(scores, planted_pictures.latents, 1)[0]
    cosine = slope @ direction / np.linalg.norm(slope) / np.linalg.norm(direction)
    assert cosine == pytest.approx(1, abs=1e-6)


def edit_arguments(folder, direction, orthogonal):
    """The flags of probe.py that edit_attributes reads."""
    return SimpleNamespace(
        seed=0, out=folder, cache=folder, edit_direction=direction, orthogonal=orthogonal
    )


@pytest.mark.parametrize("kind", ["pattern", "weight"])
def test_the_edited_attribute_moves_more_than_any_other(planted_pictures, probe, kind, tmp_path):
    args = edit_arguments(tmp_path, kind, orthogonal=True)
    values, about = edit_attributes(
        planted_pictures, "vae", probe.weight, planted_pictures.latents, decode, 16, args, "cpu", 60
    )
    leakage = np.array(about["leakage"])
    assert about["judge_f1_macro"] > 0.95
    for a in range(3):
        others = np.delete(np.abs(leakage[a]), a)
        assert leakage[a, a] > 0.8
        assert leakage[a, a] > 4 * others.max()
    assert values["edit: own change"][0] == pytest.approx(leakage.diagonal().mean(), abs=1e-4)
    folder = tmp_path / "edits" / "planted-vae"
    rows = (folder / "leakage.csv").read_text().split("\n")
    assert rows[0].strip() == "edited,red,green,blue"
    # Eight pictures in seven columns.
    width, height = Image.open(folder / "green.png").size
    assert width / 7 == pytest.approx(height / 8, rel=0.05)


def test_without_orthogonality_an_attribute_takes_along_what_goes_with_it(
    planted_pictures, probe, tmp_path
):
    leakage = {}
    for orthogonal in (False, True):
        args = edit_arguments(tmp_path, "pattern", orthogonal)
        _, about = edit_attributes(
            planted_pictures,
            "vae",
            probe.weight,
            planted_pictures.latents,
            decode,
            16,
            args,
            "cpu",
            60,
        )
        leakage[orthogonal] = np.array(about["leakage"])
    assert leakage[False][0, 2] > leakage[True][0, 2] + 0.2


def test_the_judge_is_trained_once_for_the_same_pictures(tmp_path, monkeypatch):
    trained = []

    def train(pictures, targets, seed, device, steps):
        trained.append(seed)
        torch.manual_seed(seed)
        return editing.build_judge(targets.shape[1]).eval()

    monkeypatch.setattr(editing, "train_judge", train)
    pictures = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    targets = np.array([[0, 1], [1, 0], [1, 1], [0, 0]], np.int8)
    first = editing.cached_judge(pictures, targets, 0, "cpu", 5, tmp_path)
    again = editing.cached_judge(pictures, targets, 0, "cpu", 5, tmp_path)
    assert trained == [0]
    scores = editing.probabilities(first, pictures, "cpu")
    assert np.array_equal(editing.probabilities(again, pictures, "cpu"), scores)

    # Anything that changes the judge trains another.
    editing.cached_judge(pictures, targets, 1, "cpu", 5, tmp_path)
    editing.cached_judge(pictures, targets, 0, "cpu", 6, tmp_path)
    editing.cached_judge(pictures, 1 - targets, 0, "cpu", 5, tmp_path)
    editing.cached_judge(pictures + 1, targets, 0, "cpu", 5, tmp_path)
    assert trained == [0, 1, 0, 0, 0]

    for path in tmp_path.glob("judge-*.pt"):
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"judge-.*remove it to have this judge trained again"):
        editing.cached_judge(pictures, targets, 0, "cpu", 5, tmp_path)
