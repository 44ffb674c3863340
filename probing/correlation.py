"""How a measure of VAEs is related to the FID of the models that were trained on their latents:
correlations, and a scatter plot of each measure."""

import math
import os

import numpy as np
from scipy.stats import rankdata

from common.files import UserError, writing
from common.processes import say
from probing.benchmarks import read_lines

PANEL_INCHES = (4.0, 3.4)
DOTS_PER_INCH = 100


def short_name(vae):
    """The last part of a VAE's path."""
    return os.path.basename(vae.rstrip("/"))


def read_gfid(path, vaes):
    """Reads a .csv with a line `<VAE>,<FID>` for each VAE, which is named as in `vaes` or by the
    last part of its path. -> {VAE: FID} of `vaes`. Raises UserError if one of them has no FID, or
    they are fewer than three."""
    table = {}
    for number, line in read_lines(path):
        name, _, value = line.partition(",")
        try:
            table[name.strip()] = float(value)
        except ValueError:
            # The first line may be a header.
            if number > 1:
                raise UserError(f"{path}, line {number}: '{line}' is not <VAE>,<FID>") from None
    fids = {vae: table.get(vae, table.get(short_name(vae), np.nan)) for vae in vaes}
    if len(fids) < 3:
        raise UserError(
            f"--gfid {path}: a correlation needs three VAEs or more; give them with --vae"
        )
    without = [vae for vae in vaes if not np.isfinite(fids[vae])]
    if without:
        raise UserError(
            f"--gfid {path}: a correlation needs the FID of every VAE, and "
            f"{', '.join(without)} has none"
        )
    return fids


# --------------------------------------------------------------------------------------------------
# Correlations


def varies(values):
    """Whether the values along the last axis are not all equal."""
    return np.ptp(values, axis=-1) != 0


def pearson(x, y):
    """Pearson's correlation along the last axis of x and y, both (V,) or both (n,V)."""
    x = x - x.mean(-1, keepdims=True)
    y = y - y.mean(-1, keepdims=True)
    lengths = np.sqrt(np.square(x).sum(-1) * np.square(y).sum(-1))
    return np.clip((x * y).sum(-1) / lengths, -1, 1)


def spearman(x, y):
    return pearson(rankdata(x, axis=-1), rankdata(y, axis=-1))


def correlate(x, y, seed, count=2000):
    """Pearson's and Spearman's correlation of x and y, which hold a number for each of V VAEs.

    -> {"Pearson": [value, low, high], "Spearman": the same}, with 95% intervals over `count` seeded
    bootstrap draws of the VAEs. Numbers that are all equal have no correlation: that of all VAEs
    then counts as 0, and such a draw is left out."""
    x = np.array(x)
    y = np.array(y)
    if not varies(x) or not varies(y):
        return {"Pearson": [0.0, 0.0, 0.0], "Spearman": [0.0, 0.0, 0.0]}
    draws = np.random.default_rng(seed).integers(0, len(x), (count, len(x)))
    # The first is all VAEs as they are.
    draws = np.vstack([np.arange(len(x)), draws])
    draws = draws[varies(x[draws]) & varies(y[draws])]
    correlations = {}
    for name, function in (("Pearson", pearson), ("Spearman", spearman)):
        values = function(x[draws], y[draws])
        low, high = np.quantile(values, [0.025, 0.975]).tolist()
        correlations[name] = [float(values[0]), low, high]
    return correlations


def report(results, fids, out, seed):
    """Prints the correlation of every measure with FID, and draws out/correlation.png.

    results: {benchmark: {measure: {VAE: [value, ...]}}}. fids: {VAE: FID}
    -> {"benchmark, measure": the correlations, as `correlate` returns them}"""
    found = {}
    panels = []
    for benchmark, measures in results.items():
        for measure, values in measures.items():
            title = f"{benchmark}, {measure}"
            x = [values[vae][0] for vae in fids]
            found[title] = correlate(x, list(fids.values()), seed)
            lines = []
            for name, (value, low, high) in found[title].items():
                lines.append(f"{name} {value:.3f} [{low:.3f},{high:.3f}]")
            say(f"FID and {title}: {', '.join(lines)}")
            panels.append(("\n".join([title, *lines]), x))
    if panels:
        draw_scatter(os.path.join(out, "correlation.png"), panels, fids)
    return found


# --------------------------------------------------------------------------------------------------
# The scatter plot


def draw_scatter(path, panels, fids):
    """Draws a panel for each (title, measured values of the VAEs): FID against the measure, with a
    dot for each VAE. fids: {VAE: FID}, in the order of the values. Without matplotlib it draws
    nothing and says so."""
    try:
        # probe.py needs it for nothing else, so it is not in requirements.txt.
        from matplotlib.figure import Figure
    except ImportError:
        say("correlation.png needs `pip install matplotlib`; it was not drawn")
        return
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    width, height = PANEL_INCHES
    figure = Figure((width * columns, height * lines), dpi=DOTS_PER_INCH, layout="constrained")
    for number, (title, values) in enumerate(panels, 1):
        axes = figure.add_subplot(lines, columns, number)
        axes.plot(values, list(fids.values()), "o", color="navy")
        axes.set_title(title, fontsize=8)
        axes.set_ylabel("FID")
        axes.margins(0.2)
        for vae, x, y in zip(fids, values, fids.values(), strict=True):
            axes.annotate(short_name(vae), (x, y), (4, 4), textcoords="offset points", fontsize=8)
    # Without the version of matplotlib in it, the same numbers give the same file.
    with writing(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
