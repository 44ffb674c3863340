"""Measures of scores (N,A) against attributes (N,A) of 1, 0, and -1 for unknown, for probe.py; as scikit-learn's, and for many
bootstrap draws at once: `weights` are those of the N pictures, (N,), or of B draws, (B,N); None: all 1."""

import numpy as np


def f1_scores(scores, targets, threshold=0.0, weights=None):
    """Scores (N,A), targets (N,A) of 1, 0, and -1 for unknown -> macro F1, micro F1, F1 of each attribute (A,). It is
    predicted where the score exceeds the threshold, one or (A,). Nothing there and nothing found: 0."""
    weights = np.ones(len(scores)) if weights is None else weights
    predicted, true, known = scores > threshold, targets == 1, targets >= 0
    hits, said, there = (
        (weights @ mask).astype(np.float64) for mask in (predicted & true, predicted & known, true)
    )
    each = 2 * hits / np.maximum(said + there, 1)
    return each.mean(-1), 2 * hits.sum(-1) / np.maximum((said + there).sum(-1), 1), each


def average_precision(scores, targets, weights=None):
    """-> (A,): mean over an attribute's positives of the precision among all that score no lower; 0 where it has none."""
    weights, each = np.ones(len(scores)) if weights is None else weights, []
    for score, target in zip(scores.T, targets.T):
        known = np.flatnonzero(target >= 0)
        order = known[np.argsort(-score[known], kind="stable")]
        score, hit, w = score[order], target[order] == 1, weights[..., order]
        end = np.searchsorted(-score, -score[hit], side="right") - 1  # of those with equal scores
        precision = (w * hit).cumsum(-1)[..., end] / np.maximum(w.cumsum(-1)[..., end], 1)
        each.append(
            (w[..., hit] * precision).sum(-1, dtype=np.float64) / np.maximum(w[..., hit].sum(-1), 1)
        )
    return np.stack(each, -1)


def topk_recall(scores, targets, k, weights=None):
    """Share of a picture's attributes among its k highest scores, mean over the pictures that have any. Of equal scores
    the first counts as higher."""
    true = targets == 1
    top = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    share = np.take_along_axis(true, top, 1).sum(1) / np.maximum(true.sum(1), 1)
    weights = (np.ones(len(scores)) if weights is None else weights) * true.any(1)
    return weights @ share / np.maximum(weights.sum(-1), 1)


def best_thresholds(scores, targets):
    """Thresholds (A,) of the highest F1, halfway between two scores."""
    order, every = np.argsort(-scores, axis=0, kind="stable"), np.arange(scores.shape[1])
    scores, targets = np.take_along_axis(scores, order, 0), np.take_along_axis(targets, order, 0)
    hits = (targets == 1).cumsum(0)
    f1 = 2 * hits / np.maximum((targets >= 0).cumsum(0) + hits[-1], 1)
    f1[:-1][scores[:-1] == scores[1:]] = -1  # equal scores cannot be parted
    best = f1.argmax(0)
    return (scores[best, every] + np.vstack([scores, scores[-1:] - 2])[best + 1, every]) / 2
