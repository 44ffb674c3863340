"""How a measure of VAEs goes with the FID of the models trained on their latents: correlations, and a scatter plot."""

import os

import numpy as np
from PIL import Image, ImageDraw
from scipy.stats import rankdata

from common.files import UserError, writing
from common.processes import say
from probing.benchmarks import read_lines


def read_gfid(path, vaes):
    """csv of <VAE>,<FID> -> {VAE: FID} of `vaes`, named as in the command or by the last part of it."""
    table = {}
    for number, line in read_lines(path):
        name, _, value = (w.strip() for w in line.partition(","))
        try:
            table[name] = float(value)
        except ValueError:
            if number > 1:  # the first may be a header
                raise UserError(f"{path}, line {number}: '{line}' is not <VAE>,<FID>") from None
    fids = {v: table.get(v, table.get(os.path.basename(v.rstrip("/")), np.nan)) for v in vaes}
    lack = [v for v in vaes if not np.isfinite(fids[v])]
    if lack or len(fids) < 3:
        raise UserError(
            f"--gfid {path}: a correlation needs three VAEs or more, and the FID of each"
            + (f"; {', '.join(lack)} has none" if lack else "")
        )
    return fids


def correlate(x, y, seed, count=2000):
    """-> Pearson's and Spearman's correlation, each [value, low, high]: 95% intervals over resampled VAEs."""
    picks = np.vstack(
        [np.arange(len(x)), np.random.default_rng(seed).integers(0, len(x), (count, len(x)))]
    )
    if not np.ptp(x) or not np.ptp(y):
        return dict(Pearson=[0.0] * 3, Spearman=[0.0] * 3)
    pairs = [
        (x, y) for x, y in zip(np.array(x)[picks], np.array(y)[picks]) if np.ptp(x) and np.ptp(y)
    ]
    found = dict(
        Pearson=[np.corrcoef(x, y)[0, 1] for x, y in pairs],
        Spearman=[np.corrcoef(rankdata(x), rankdata(y))[0, 1] for x, y in pairs],
    )
    return {
        name: [float(v[0]), *np.quantile(v, [0.025, 0.975]).tolist()] for name, v in found.items()
    }


def report(results, fids, out, seed):
    """results {benchmark: {measure: {VAE: [value, ...]}}}, FIDs {VAE: FID} -> {"benchmark, measure": correlations}, also said;
    out/correlation.png has a panel for each."""
    found, panels = {}, []
    for bench, measures in results.items():
        for name, row in measures.items():
            x, y = [row[vae][0] for vae in fids], list(fids.values())
            both = found[f"{bench}, {name}"] = correlate(x, y, seed)
            words = ", ".join(
                f"{k} {v:.3f} [{low:.3f},{high:.3f}]" for k, (v, low, high) in both.items()
            )
            say(f"FID and {bench}, {name}: {words}")
            panels.append((f"{bench}, {name}\n{words}", x, y))
    draw_scatter(
        os.path.join(out, "correlation.png"),
        panels,
        [os.path.basename(v.rstrip("/")) for v in fids],
    )
    return found


def draw_scatter(path, panels, labels):
    """A panel of 400 x 320 for each (title, x, y): FID over a measure, a dot for each VAE; the axes bear their extremes."""
    canvas = Image.new("RGB", (400, 320 * len(panels)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (title, x, y) in enumerate(panels):
        left, right, top, bottom = 60, 380, 320 * i + 50, 320 * i + 280
        pen.rectangle((left, top, right, bottom), outline="grey")
        for at, text in (
            ((left, top - 42), title),
            ((8, (top + bottom) / 2), "FID"),
            ((left, bottom + 6), f"{min(x):.4g}"),
            ((right - 40, bottom + 6), f"{max(x):.4g}"),
            ((8, top), f"{max(y):.4g}"),
            ((8, bottom - 12), f"{min(y):.4g}"),
        ):
            pen.text(at, text, "black")
        for u, v, label in zip(x, y, labels):
            px = np.interp(u, [min(x), max(x)], [left + 12, right - 12])
            py = np.interp(v, [min(y), max(y)], [bottom - 12, top + 12])
            pen.ellipse((px - 4, py - 4, px + 4, py + 4), "navy")
            pen.text((min(px + 6, right - 6 * len(label)), max(py - 14, top)), label, "black")
    with writing(path) as file:
        canvas.save(file, "PNG")
