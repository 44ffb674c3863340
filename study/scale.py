"""The study's VAEs as a scale for another VAE (study/card.py): how many of them it is better than,
and the distance of samples that its measures predict.

study/scale.json holds, for each VAE of the study, the measures that need no SiT and the distances
of the samples of the SiTs that were trained on it. `python -m study.run --report` writes it.
"""

import itertools
import json
import os
import re
from typing import NamedTuple

import numpy as np

from common.files import reading
from probing.correlation import correlate

PATH = os.path.join(os.path.dirname(__file__), "scale.json")

# Of a prediction's interval.
CONFIDENCE = 0.9
# With fewer VAEs there is no correlation and no prediction.
MIN_VAES = 8


class Scale(NamedTuple):
    # Fingerprint of the study's test pictures.
    data: str
    # state_hash of the study's classifier.
    classifier: str
    # How many pictures each measure takes, and the like.
    settings: dict
    # {VAE: {measure or "distance <step>": number or None}}
    vaes: dict

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
        return Scale(
            content["data"], content["classifier"], content["settings"], dict(content["vaes"])
        )


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
# The rule: of all linear fits of the distance to one measure, or to two, take the one with the
# smallest error on VAEs that it was not fitted to. A VAE is left out together with its other
# seeds, which are nearly equal to it.
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
    # Root mean square of the errors on VAEs that were left out.
    error: float
    # Those of `measures` that the new VAE has beyond the range of the scale's VAEs.
    outside: tuple
    # VAEs that it was fitted to.
    count: int


def family_of(vae):
    """The name of a VAE without its seed."""
    return re.sub(r"_s\d+$", "", vae)


def design(columns):
    """Columns, each (n,) -> (n,1+len(columns)), with a column of ones."""
    return np.stack([np.ones(len(columns[0])), *columns], 1)


def fit(columns, y):
    """The coefficients of a linear fit of y (n,) to columns, each (n,)."""
    return np.linalg.lstsq(design(columns), y, rcond=None)[0]


def left_out_errors(columns, y, families):
    """The error of y (n,) for each VAE by the fit to the other families, (n,)."""
    x = design(columns)
    errors = np.empty(len(y))
    for family in np.unique(families):
        out = families == family
        coefficients = np.linalg.lstsq(x[~out], y[~out], rcond=None)[0]
        errors[out] = y[out] - x[out] @ coefficients
    return errors


def best_choice(table, y, families):
    """The rule's choice of measures, a tuple of one name or two.

    table: {measure: (n,)}. y: (n,), the distances. families: (n,), names."""
    choices = [(name,) for name in table] + list(itertools.combinations(table, 2))

    def squared_error(choice):
        errors = left_out_errors([table[name] for name in choice], y, families)
        return np.square(errors).mean()

    return min(choices, key=squared_error)


def predict(scale, values, distance):
    """The Prediction of a distance ("distance <step>") for a VAE with these measures {name:
    number}, or None if too few VAEs of the scale have it.

    Only measures that the new VAE and all these VAEs have take part."""
    vaes = scale.known(distance)
    names = [name for name in values if scale.known(name, distance) == vaes]
    if len(vaes) < MIN_VAES or not names:
        return None
    y = scale.numbers(vaes, distance)
    table = {name: scale.numbers(vaes, name) for name in names}
    families = np.array([family_of(vae) for vae in vaes])

    chosen = best_choice(table, y, families)
    columns = [table[name] for name in chosen]
    new = np.array([1.0, *(values[name] for name in chosen)])
    value = float(new @ fit(columns, y))
    lows = np.empty(len(y))
    highs = np.empty(len(y))
    for family in np.unique(families):
        out = families == family
        others = {name: column[~out] for name, column in table.items()}
        choice = best_choice(others, y[~out], families[~out])
        coefficients = fit([others[name] for name in choice], y[~out])
        errors = np.abs(y[out] - design([table[name][out] for name in choice]) @ coefficients)
        predicted = np.array([1.0, *(values[name] for name in choice)]) @ coefficients
        lows[out] = predicted - errors
        highs[out] = predicted + errors
    count = len(y)
    # The quantiles of the jackknife+, by rank.
    last = min(count, int(np.ceil(CONFIDENCE * (count + 1)))) - 1
    outside = [n for n in chosen if not table[n].min() <= values[n] <= table[n].max()]
    return Prediction(
        chosen,
        value,
        float(np.sort(lows)[count - 1 - last]),
        float(np.sort(highs)[last]),
        float(np.sqrt(np.square(left_out_errors(columns, y, families)).mean())),
        tuple(outside),
        count,
    )
