"""probing/disentanglement.py and probing/editing.py: the scores against definitions worked out by
hand, scikit-learn and planted factors; edits of a planted set, whose decoder is known.

    python -m pytest tests/test_disentanglement.py
"""

import numpy as np
import pytest
from scipy.linalg import hadamard
from scipy.stats import entropy
from sklearn.metrics import balanced_accuracy_score, mutual_info_score
from sklearn.tree import DecisionTreeClassifier

from probing.disentanglement import (
    balanced_accuracy,
    dci,
    disentanglement,
    mutual_informations,
    sap_and_mig,
    threshold_accuracies,
)


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
