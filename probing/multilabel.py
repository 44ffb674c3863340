"""Measures of multi-label predictions, for probe.py. They give scikit-learn's values.

N pictures have A attributes. Every measure takes

    scores    (N,A): the higher, the more likely
    targets   int8 (N,A): 1, 0, or -1 for unknown, which counts in no measure
    weights   how often each picture counts, (N,); None: once. With weights (B,N), of B bootstrap
              draws, all that is returned has a leading axis B.
"""

import numpy as np


def f1_scores(scores, targets, threshold=0.0, weights=None):
    """An attribute is predicted where its score exceeds the threshold, a number or one for each
    attribute, (A,). Its F1 is 0 if it neither occurs nor is predicted.

    -> macro F1, the mean of the attributes' F1; micro F1, of all predictions together; and the F1
    of each attribute, (A,)"""
    if weights is None:
        weights = np.ones(len(scores))
    predicted = scores > threshold
    true = targets == 1
    known = targets >= 0
    # Counts of each attribute: both predicted and true, predicted, and true.
    hits = (weights @ (predicted & true)).astype(np.float64)
    positives = (weights @ (predicted & known)).astype(np.float64)
    occurrences = (weights @ true).astype(np.float64)
    total = positives + occurrences
    each = 2 * hits / np.maximum(total, 1)
    macro = each.mean(-1)
    micro = 2 * hits.sum(-1) / np.maximum(total.sum(-1), 1)
    return macro, micro, each


def average_precision(scores, targets, weights=None):
    """-> (A,): the mean over an attribute's positives of the precision among all pictures whose
    score is not lower; 0 where it has no positives."""
    if weights is None:
        weights = np.ones(len(scores))
    each = []
    for score, target in zip(scores.T, targets.T, strict=True):
        known = np.flatnonzero(target >= 0)
        order = known[np.argsort(-score[known], kind="stable")]
        score = score[order]
        is_positive = target[order] == 1
        weight = weights[..., order]
        # For each positive, the last picture with a score that is not lower.
        last = np.searchsorted(-score, -score[is_positive], side="right") - 1
        hits = (weight * is_positive).cumsum(-1)[..., last]
        precision = hits / np.maximum(weight.cumsum(-1)[..., last], 1)
        weight = weight[..., is_positive]
        total = (weight * precision).sum(-1, dtype=np.float64)
        each.append(total / np.maximum(weight.sum(-1), 1))
    return np.stack(each, -1)


def topk_recall(scores, targets, k, weights=None):
    """The share of a picture's attributes that are among its k highest scores, mean over the
    pictures that have any. Of equal scores the first counts as higher."""
    if weights is None:
        weights = np.ones(len(scores))
    true = targets == 1
    highest = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # (N,k)
    hits = np.take_along_axis(true, highest, 1).sum(1)
    share = hits / np.maximum(true.sum(1), 1)
    weights = weights * true.any(1)
    return weights @ share / np.maximum(weights.sum(-1), 1)


def best_thresholds(scores, targets):
    """-> (A,): the threshold of each attribute that gives the highest F1. It is halfway between two
    neighbouring scores, or 1 below the lowest score."""
    order = np.argsort(-scores, axis=0, kind="stable")
    scores = np.take_along_axis(scores, order, 0)
    targets = np.take_along_axis(targets, order, 0)
    # F1 if the pictures down to each one, in the order of falling scores, are predicted.
    hits = (targets == 1).cumsum(0)
    f1 = 2 * hits / np.maximum((targets >= 0).cumsum(0) + hits[-1], 1)
    # No threshold separates equal scores.
    f1[:-1][scores[:-1] == scores[1:]] = -1
    best = f1.argmax(0)
    columns = np.arange(scores.shape[1])
    below = np.vstack([scores, scores[-1:] - 2])  # (N+1,A)
    return (scores[best, columns] + below[best + 1, columns]) / 2
