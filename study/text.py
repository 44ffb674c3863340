"""Numbers and tables of the study's page, as text."""

import numpy as np
from scipy import stats


def mean_and_interval(values):
    """Values of several seeds as 'mean ± half a 95% t-interval (n)'."""
    if not values:
        return "-"
    mean = np.mean(values)
    if len(values) == 1:
        return f"{mean:.3g} (1)"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:.3g} ± {half:.2g} ({len(values)})"


def pooled_spread(groups):
    """Lists of numbers -> the standard deviation of a number around its list's mean, from all lists
    together; and its degrees of freedom. (nan, 0) if no list has two numbers."""
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return np.nan, 0
    squares = sum(np.var(group) * len(group) for group in groups)
    return np.sqrt(squares / freedom), freedom


def deviation(values):
    """Values of several seeds as 'standard deviation (n)'."""
    if len(values) < 2:
        return "-"
    return f"{np.std(values, ddof=1):.2g} ({len(values)})"


def number(value, form=".3g"):
    """A number, [number] or [number, low, high] as text; '-' for None."""
    if value is None:
        return "-"
    value = np.atleast_1d(value)
    text = format(value[0], form)
    if len(value) > 1:
        text += f" [{value[1]:{form}}, {value[2]:{form}}]"
    return text


def percent(value):
    """Like `number`, of shares in 0..1."""
    if value is None:
        return "-"
    return number([100 * share for share in value], ".1f")


def lower_or_higher(a, b):
    """How a compares with b, as in '38% lower'."""
    word = "lower" if a < b else "higher"
    return f"{abs(a / b - 1):.0%} {word}"


def table_line(*cells):
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table_head(*names):
    return [table_line(*names), "|---" * len(names) + "|"]
