"""The scores of disentanglement that the literature uses, for probe.py: DCI, SAP and MIG.

N pictures have D latents, which are called codes here, and A binary attributes. The scores ask
whether each code carries one attribute only, and whether one code alone carries each attribute.
Locatello et al. (arXiv:1811.12359) compare them. All of them are 1 at best. At worst they are 0,
but for the informativeness, which is 0.5 for a guess.

    codes     (N,D)
    targets   int8 (N,A): 1, 0, or -1 for unknown, which counts in no score
"""

import numpy as np
from scipy.special import entr, rel_entr

# The scores of single codes are taken of so many codes at once.
CODES_AT_ONCE = 256


# --------------------------------------------------------------------------------------------------
# DCI


def one_minus_entropy(shares):
    """Shares (n,K), the rows of which add up to 1 -> 1 minus their entropy to base K, (n,). With
    K = 1 it is 1."""
    count = shares.shape[1]
    if count == 1:
        return np.ones(len(shares))
    return 1 - entr(shares).sum(1) / np.log(count)


def dci(importance):
    """Disentanglement and completeness (Eastwood and Williams, ICLR 2018, section 2).

    importance: (D,A), how much the prediction of each attribute relies on each code, from 0. For a
    linear probe it is the absolute weight of the standardised code.
    -> disentanglement: 1 if each code matters to one attribute only, a mean over the codes that is
    weighted by their importance; completeness: 1 if one code matters to each attribute, a mean over
    the attributes. Attributes that no code matters to are left out. Raises ValueError if that
    leaves none."""
    importance = np.asarray(importance, np.float64)
    importance = importance[:, importance.sum(0) > 0]
    if importance.shape[1] == 0:
        raise ValueError("no code matters to any attribute")
    of_codes = importance.sum(1)
    used = importance[of_codes > 0]
    disentanglement = one_minus_entropy(used / used.sum(1, keepdims=True))
    completeness = one_minus_entropy((importance / importance.sum(0)).T)
    weights = of_codes[of_codes > 0] / of_codes.sum()
    return float(weights @ disentanglement), float(completeness.mean())


def balanced_accuracy(scores, targets, threshold=0.0):
    """The mean of the share of the positives with a score above the threshold and the share of the
    negatives with none, for each attribute, (A,); not a number where either is absent."""
    predicted = scores > threshold
    true = targets == 1
    false = targets == 0
    with np.errstate(invalid="ignore"):
        of_positives = (predicted & true).sum(0) / true.sum(0)
        of_negatives = (~predicted & false).sum(0) / false.sum(0)
    return (of_positives + of_negatives) / 2


# --------------------------------------------------------------------------------------------------
# Scores of single codes


def gap(scores):
    """Scores (D,A) of single codes -> for each attribute the difference of the two highest, (A,).
    With a single code, it is that code's score."""
    if len(scores) == 1:
        return scores[0]
    second, first = np.sort(scores, axis=0)[-2:]
    return first - second


def threshold_accuracies(codes, positive, negative):
    """The highest balanced accuracy of a threshold on each code, in either direction, for each
    attribute.

    codes: (n,D). positive, negative: float32 (n,A), 1 for the pictures that have the attribute, and
    for those that have it not; there are some of both.
    -> (D,A), from 0.5 to 1; 0 for a code that is constant"""
    order = np.argsort(codes, axis=0, kind="stable")
    ordered = np.take_along_axis(codes, order, 0)
    # Whether a threshold fits between a picture and the next, (n-1,D): not between equal codes.
    is_step = ordered[:-1] < ordered[1:]
    # Steps of the difference of the two cumulative distributions, (n,A).
    steps = positive / positive.sum(0, dtype=np.float64)
    steps -= negative / negative.sum(0, dtype=np.float64)
    columns = []
    for step in steps.T:
        difference = np.abs(step[order].cumsum(0)[:-1])  # (n-1,D)
        highest = np.max(difference, axis=0, where=is_step, initial=0)
        columns.append(np.where(is_step.any(0), (1 + highest) / 2, 0))
    return np.stack(columns, 1)


def mutual_informations(codes, positive, negative, bins=20):
    """The mutual information, in nats, of each code and each attribute. A code is counted in bins
    of equal width between its lowest and highest value, as disentanglement_lib does.

    codes, positive, negative: see threshold_accuracies. -> (D,A)"""
    low = codes.min(0)
    width = codes.max(0) - low
    scaled = (codes - low) / np.where(width > 0, width, 1)
    indices = np.minimum((scaled * bins).astype(np.int64), bins - 1)  # (n,D)
    # How often each bin and each value of the attribute occur together, (bins,2,D,A).
    shares = np.empty((bins, 2, codes.shape[1], positive.shape[1]))
    for index in range(bins):
        is_inside = (indices == index).astype(np.float32).T  # (D,n)
        shares[index] = is_inside @ positive, is_inside @ negative
    shares /= (positive + negative).sum(0)
    independent = shares.sum(0, keepdims=True) * shares.sum(1, keepdims=True)
    return rel_entr(shares, independent).sum((0, 1))


def sap_and_mig(codes, targets):
    """SAP and MIG of all codes, over the attributes that some pictures have and some have not.

    SAP (Kumar et al., ICLR 2018, section 3, for classes): of the balanced accuracies of thresholds
    on single codes, the highest less the second, mean over the attributes. MIG (Chen et al.,
    NeurIPS 2018, equation 6): the same of the mutual information over the attribute's entropy.

    -> SAP, MIG; not a number if there is no such attribute"""
    positive = (targets == 1).astype(np.float32)
    negative = (targets == 0).astype(np.float32)
    is_varied = positive.any(0) & negative.any(0)
    if not is_varied.any():
        return np.nan, np.nan
    positive, negative = positive[:, is_varied], negative[:, is_varied]
    accuracies, informations = [], []
    for start in range(0, codes.shape[1], CODES_AT_ONCE):
        block = np.asarray(codes[:, start : start + CODES_AT_ONCE], np.float32)
        accuracies.append(threshold_accuracies(block, positive, negative))
        informations.append(mutual_informations(block, positive, negative))
    share = positive.sum(0) / (positive + negative).sum(0)
    entropy = entr(share) + entr(1 - share)
    sap = gap(np.concatenate(accuracies)).mean()
    mig = (gap(np.concatenate(informations)) / entropy).mean()
    return float(sap), float(mig)


def disentanglement(probe_weight, deviation, scores, codes, targets, count=5000):
    """All the scores of a linear probe's fit, measured on the test pictures.

    probe_weight: (D,A), of the codes as they come. deviation: (D,), of each code over the training
    pictures. scores: (N,A), the probe's logits. codes: (N,D). SAP and MIG take the first `count`
    pictures.
    -> {measure: [value]}, and what result.json records about them"""
    importance = np.abs(probe_weight) * deviation[:, None]
    completely = dci(importance)
    sap, mig = sap_and_mig(codes[:count], targets[:count])
    values = {
        "DCI disentanglement": [completely[0]],
        "DCI completeness": [completely[1]],
        "DCI informativeness": [float(np.nanmean(balanced_accuracy(scores, targets)))],
        "SAP": [sap],
        "MIG": [mig],
    }
    about = {
        "codes": len(importance),
        "importance": "absolute weights of the linear probe on standardised latents",
        "informativeness": "mean balanced accuracy",
        "SAP and MIG on": min(count, len(codes)),
        "bins of MIG": 20,
    }
    return values, about
