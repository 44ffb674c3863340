"""The study's VAEs as a scale for another VAE (study/card.py): how many of them it is better than,
and the distance of samples that its measures predict.

study/scale.json holds, for each VAE of the study, the measures that need no SiT and the distances
of the samples of the SiTs that were trained on it. `python -m study.run --report` writes it.
"""

import itertools
import json
import os
from typing import NamedTuple

import numpy as np

from common.files import reading
from probing.correlation import correlate
from study.predictors import best_choice, error_of, predict_left_out

PATH = os.path.join(os.path.dirname(__file__), "scale.json")

# Of a prediction's interval.
CONFIDENCE = 0.9
# With fewer VAEs there is no correlation, and with fewer families no prediction.
MIN_VAES = 8
MIN_FAMILIES = 4


class Scale(NamedTuple):
    # Fingerprint of the study's test pictures.
    data: str
    # state_hash of the study's classifier.
    classifier: str
    # How many pictures each measure takes, and the like.
    settings: dict
    # {VAE: {measure or "distance <step>": number or None; "family" and "hash": text}}
    vaes: dict

    def without(self, weights_hash):
        """The scale without the VAE whose weights have this hash, if it is there."""
        kept = {vae: row for vae, row in self.vaes.items() if row.get("hash") != weights_hash}
        return self._replace(vaes=kept)

    def known(self, *names):
        """The VAEs that have all these numbers, a list."""
        return [vae for vae, row in self.vaes.items() if all(row.get(n) is not None for n in names)]

    def numbers(self, vaes, name):
        """The numbers of this name of some VAEs, (len(vaes),)."""
        return np.array([self.vaes[vae][name] for vae in vaes], np.float64)


def read_scale(path):
    """The Scale in a file, or None if there is no such file. Raises UserError if it is damaged."""
    if not os.path.exists(path):
        return None
    with reading(path, "the study's scale"), open(path) as file:
        content = json.load(file)
        return Scale(content["data"], content["classifier"], content["settings"], content["vaes"])


def better_than(scale, measure, value, higher_is_better):
    """-> (how many VAEs of the scale have a worse number, how many have one)."""
    numbers = scale.numbers(scale.known(measure), measure)
    worse = numbers < value if higher_is_better else numbers > value
    return int(worse.sum()), len(numbers)


def correlation(scale, measure, distance):
    """Pearson's correlation of a measure with a distance over the scale's VAEs: [value, low, high]
    with a 95% interval, and their number; None if too few have both."""
    vaes = scale.known(measure, distance)
    if len(vaes) < MIN_VAES:
        return None
    found = correlate(scale.numbers(vaes, measure), scale.numbers(vaes, distance), 0)
    return found["Pearson"], len(vaes)


# --------------------------------------------------------------------------------------------------
# The distance that measures predict
#
# The rule is that of RESULTS.md: of all linear fits of the distance to one measure or to two, the
# one with the smallest error on families of VAEs that it was not fitted to.
#
# The interval is the jackknife+ (Barber et al., Annals of Statistics 49, 2021): each family is left
# out, the whole rule is applied to the others, and its errors on the family are added to what it
# predicts for the new VAE. So it also counts that the measures were chosen on these same VAEs.


class Prediction(NamedTuple):
    # Names of the one or two measures.
    measures: tuple
    value: float
    low: float
    high: float
    # Root mean square of the errors on families that were left out.
    error: float
    # Those of `measures` that the new VAE has beyond the range of the scale's VAEs.
    outside: tuple
    # VAEs that it was fitted to.
    count: int


def predict_new(x, y, new):
    """The prediction for a VAE with measures `new` (k,) by least squares on others, x (n,k)."""
    design = np.column_stack([np.ones(len(y)), x])
    return float(np.append(1.0, new) @ np.linalg.lstsq(design, y, rcond=None)[0])


def predict(scale, values, distance):
    """The Prediction of a distance ("distance <step>") for a VAE with these measures {name:
    number}, or None if too few VAEs of the scale have it.

    Only measures that the new VAE and all these VAEs have take part."""
    vaes = scale.known(distance)
    names = [name for name in values if scale.known(name, distance) == vaes]
    families = np.array([scale.vaes[vae].get("family", vae) for vae in vaes])
    if len(vaes) < MIN_VAES or len(set(families)) < MIN_FAMILIES or not names:
        return None
    y = scale.numbers(vaes, distance)
    x = np.stack([scale.numbers(vaes, name) for name in names], 1)
    new = np.array([values[name] for name in names])
    columns = range(len(names))
    choices = [(k,) for k in columns] + list(itertools.combinations(columns, 2))

    lows = np.empty(len(y))
    highs = np.empty(len(y))
    for family in np.unique(families):
        out = families == family
        chosen = list(best_choice(x[~out], y[~out], families[~out], choices))
        errors = np.abs(y - predict_left_out(x[:, chosen], y, families))[out]
        predicted = predict_new(x[~out][:, chosen], y[~out], new[chosen])
        lows[out] = predicted - errors
        highs[out] = predicted + errors
    # The quantiles of the jackknife+, by rank.
    last = min(len(y), int(np.ceil(CONFIDENCE * (len(y) + 1)))) - 1

    chosen = list(best_choice(x, y, families, choices))
    is_outside = (new < x.min(0)) | (new > x.max(0))
    return Prediction(
        tuple(names[k] for k in chosen),
        predict_new(x[:, chosen], y, new[chosen]),
        float(np.sort(lows)[len(y) - 1 - last]),
        float(np.sort(highs)[last]),
        error_of(predict_left_out(x[:, chosen], y, families), y),
        tuple(names[k] for k in chosen if is_outside[k]),
        len(y),
    )
