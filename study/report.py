"""RESULTS.md and its figures from what study/run.py left under its folder: `python -m study.run --report`.

Every number is read from a file of a run. What numbers mean cannot be: that is REMARKS, written by hand when they are in.
"""

import glob
import json
import os

import numpy as np
from PIL import Image, ImageDraw
from scipy import stats

from common.files import writing
from common.processes import say
from probing.correlation import correlate

# section: title, {VAE: the paper's gFID beside it, where it has one}, what of the paper that is, pairs (smaller, larger
# distance) as the paper finds them or, where it is silent, as its claim would have them. <VAE>-repa: SiTs with the REPA loss
SECTIONS = {
    1: (
        "Alignment against none",
        dict(plain=11.40, send=7.57),
        "VA-VAE without and with alignment, SiT-B/1 with REPA, 80 epochs, as everywhere below",
        [("send", "plain")],
    ),
    2: (
        "Noise injection",
        dict(no_noise=8.42, send=7.57),
        "noise off and on",
        [("send", "no_noise")],
    ),
    3: (
        "Mapper depth 0, 1, 2, and an MLP of as many parameters as depth 1",
        dict(depth0=9.20, send=8.42, depth2=9.47, mlp=None),
        "depth 0, 1, 2, all without noise (ours have it)",
        [("send", "depth0"), ("send", "depth2"), ("send", "mlp")],
    ),
    4: (
        "Vision model: none, random weights, pre-trained",
        dict(plain=11.40, random_teacher=None, send=7.57),
        "none and DINOv2",
        [("send", "random_teacher")],
    ),
    5: (
        "Latent channels 8, 16, 32",
        dict(plain_d8=13.85, send_d8=7.02, plain=17.43, send=8.25, plain_d32=26.27, send_d32=10.99),
        "its 16, 32 and 64 channels (IN-VAE) beside our 8, 16 and 32",
        [("send_d8", "plain_d8"), ("send", "plain"), ("send_d32", "plain_d32")],
    ),
    6: (
        "From scratch against tuned",
        dict(scratch_plain=None, scratch_send=None, send=None),
        "silent",
        [("scratch_send", "scratch_plain"), ("send", "scratch_send")],
    ),
    7: (
        "Weight 0.1, 0.5, 1 (`send`), 2; noise of one level, t = 0.5",
        {
            "weight0.1": None,
            "weight0.5": None,
            "send": None,
            "weight2": None,
            "constant_noise": None,
        },
        "1 and t uniform are its choice, without numbers",
        [("send", other) for other in ("weight0.1", "weight0.5", "weight2", "constant_noise")],
    ),
    10: (
        "Is it the semantics? Targets shuffled between pictures; `plain` with `send`'s PSNR; the VAE before tuning",
        dict(plain=None, plain_short=None, base=None, shuffled=None, send=None),
        "silent",
        [("send", "shuffled"), ("send", "plain_short"), ("send", "base")],
    ),
    11: (
        "VA-VAE's loss in the same place",
        dict(vavae=11.40, send=7.57),
        "VA-VAE as published, and Send-VAE tuned from it",
        [("send", "vavae")],
    ),
    12: (
        "The REPA loss in stage 2",
        {"plain": None, "plain-repa": 11.40, "send": None, "send-repa": 7.57},
        "always with REPA",
        [("plain-repa", "plain"), ("send-repa", "send"), ("send-repa", "plain-repa")],
    ),
}

# section (8 and 9 too, or "machine"): what the numbers may mean; where a direction does not agree or is open, a guess at the
# cause and the next experiment
REMARKS = {
    1: "Behind at 250 steps in the classifier's features (in the target's own the two are even), ahead from 500 on: why is not known. "
    "Next: sets at 100 to 400 steps, and with a smaller learning rate, to see whether aligned latents are slower in the coarse "
    "statistics that are learned first.",
    2: "Open, if anything the other way, at step 750; the paper's direction at step 2000. A guess: `no_noise` has been pulled "
    "further by as many steps (its probe is higher and its PSNR lower, as with a larger weight), since its task is the easier one; "
    "that helps at first, and what is left of the picture decides later. Next: three VAE seeds of `no_noise`, and `no_noise` at a "
    "weight that gives it `send`'s PSNR.",
    3: "At step 750 depth 2 is ahead; at step 2000 depth 1 is, as in the paper, but the differences are not larger than those between "
    "VAE seeds, so depth stays open, and so does attention: the MLP is as good. The paper's runs are without noise, ours "
    "with it, and a deeper mapper can remove some noise before it predicts, so that the encoder need not. Next: three VAE seeds of "
    "each depth, with and without noise.",
    5: "On 8 channels `send_d8` does not get better from step 750 to step 2000: its reconstructions alone are at more than half of that "
    "distance (floor), so little of alignment's gain is left to see. Next: a base of 8 channels trained several times as long.",
    6: "From scratch alignment costs less PSNR and gives the best probe of all; its latents are far behind at step 750 and nearly "
    "level at step 2000. They were aligned for all 9,400 steps, not 5,000, so the two are not matched in alignment. Next: longer SiT "
    "training, and three VAE seeds.",
    7: "More weight buys more until 1; from 1 to 2 the probe still rises and the distance in the target's own features still falls, "
    "but reconstruction pays for it (PSNR, floors), and in the classifier's features nothing is gained. Next: weight 2 with a "
    "longer tuning, and a second seed of its VAE.",
    8: "Both probes follow the distance over all VAEs, better at step 2000 than at step 750, mostly since they tell plain latents from "
    "aligned ones; the Gini coefficient does it better than either. Among the aligned ones neither probe ranks: `vavae` has one of "
    "the highest probes and the largest distance of those with weight 1. Only the Gini coefficient's Pearson at step 2000 has an "
    "interval without 0 there, one of 18 at that step. Next: aligned VAEs with three seeds each, so that their differences are larger "
    "than the seeds'.",
    9: "Alignment costs four times the PSNR that the paper reports. A guess: the paper tunes a VAE that has converged, ours has not, and "
    "every step of `plain` still buys quality. Next: the same pair from a base trained ten times as long.",
    10: "Targets shuffled between pictures, the same mapper, noise and weight, leave the latents as `plain` has them in every measure, and "
    "a teacher of random weights (section 4) smooths them (neighbours' correlation) without any gain. Tuning without a teacher to "
    "`send`'s PSNR gives an eighth of its gain at most. So neither the pull on the encoder nor a softer reconstruction explains it.",
    11: "VA-VAE's loss gives a higher probe than the mapper and less PSNR, yet a larger distance, as the paper argues of a direct tie. "
    "The two losses' weights are not matched. Next: `vavae` at the weight that gives it `send`'s PSNR.",
    12: "REPA gives less than the seeds differ by; alignment of the VAE gives with REPA what it gives without. A guess: 750 steps of a "
    "SiT of 4 million parameters are too few for a loss on its features to matter, and the teacher is a small CNN. Next: 2,000 "
    "steps and more, and REPA at another block.",
}

PROBED = {
    "class probe": ("accuracy", ""),
    "attribute F1": ("F1 macro", "_attributes"),  # probe.py's name, which probe
    "Gini of density": ("Gini of density", ""),
    "mixture of 8": ("mixture of 8", ""),
}
JUDGED = {
    "PSNR": "psnr",
    "rank of channels": "rank_channels",
    "rank of latents": "rank_flat",  # study/judge.py's name
    "neighbours' correlation": "neighbour_correlation",
    "widest / narrowest channel": "channel_spread",
}


# ----------------------------------------------------------------------------------------------------------------------
# What the runs left


def read(path):
    return json.load(open(path)) if os.path.exists(path) else None


class Results:
    def __init__(self, out, points, compare):
        self.out, self.points, self.compare = out, points, compare

    def sets(self, vae, step=None, key="classifier", suffix=""):
        """{seed of the SiT: value} of the sets drawn at this step (default: the one at which all are compared)."""
        step = step or self.compare
        found = {
            seed: read(f"{self.out}/samples/{vae}_{seed}_{step}{suffix}.json") for seed in range(20)
        }
        return {
            seed: f[key] for seed, f in found.items() if f and f["settings"]["sit_step"] == step
        }

    def judged(self, vae, key):
        return (read(f"{self.out}/judged/{vae}.json") or {}).get(key)

    def probe(self, vae, measure):
        """[value, low, high], or [value] where there is no interval, or None."""
        name, kind = PROBED[measure]
        found = read(f"{self.out}/probe_{vae}{kind}/result.json")
        rows = list(found["results"].values())[0].get(name, {}) if found else {}
        return next((v for k, v in rows.items() if k.endswith(f"vae_{vae}")), None)

    def measures(self, vae):
        """{measure: number or None} of a VAE, none of which needs a SiT."""
        probed = {k: self.probe(vae, k) for k in PROBED}
        return dict(
            {k: v and v[0] for k, v in probed.items()},
            **{k: self.judged(vae, v) for k, v in JUDGED.items()},
        )

    def speed(self, vae):
        """Pictures/s of the fastest tenth of a run, the least disturbed by what ran beside it."""
        path = f"{self.out}/vae_{vae}/metrics.jsonl"
        rates = (
            [json.loads(line).get("images_per_s") for line in open(path)]
            if os.path.exists(path)
            else []
        )
        return np.quantile([r for r in rates if r], 0.9) if any(rates) else None

    def kind(self, vae):
        """How a VAE was trained: 'none', 'control' (it aligns to what means nothing) or 'aligned'."""
        flags = (read(f"{self.out}/vae_{vae}/config.json") or dict(arguments=dict(align="none")))[
            "arguments"
        ]
        control = flags.get("shuffle_targets") or "random" in os.path.basename(
            flags.get("vfm_weights") or ""
        )
        return "none" if flags["align"] == "none" else "control" if control else "aligned"

    def over_vae_seeds(self, vae, sit_seed=None, step=None):
        """A value for each seed of the VAE: the mean over its SiTs, or that of one SiT seed."""
        found = [self.sets(v, step) for v in (vae, f"{vae}_s1", f"{vae}_s2")]
        if sit_seed is not None:
            return [f[sit_seed] for f in found if sit_seed in f]
        return [float(np.mean(list(f.values()))) for f in found if f]

    def run_spread(self, step=None):
        """Standard deviation of one SiT on one VAE when the VAE's seed changes (so that of SiT and draw is in it), pooled over
        `plain` and `send`, and its degrees of freedom; None without other VAE seeds."""
        groups = [
            g for g in (self.over_vae_seeds(v, 0, step) for v in ("plain", "send")) if len(g) > 1
        ]
        free = sum(len(g) - 1 for g in groups)
        return (
            (float(np.sqrt(sum(np.var(g) * len(g) for g in groups) / free)), free) if free else None
        )


# ----------------------------------------------------------------------------------------------------------------------
# Numbers as text


def interval(values):
    """Values of several seeds -> 'mean ± half a 95% t-interval (n)'."""
    values = list(values)
    if len(values) < 2:
        return f"{values[0]:.3g} (1)" if values else "-"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3g} ± {half:.2g} ({len(values)})"


def spread(values):
    return f"{np.std(values, ddof=1):.2g} ({len(values)})" if len(values) > 1 else "-"


def cell(value, form=".3g"):
    """A number, or [value, low, high]."""
    if value is None:
        return "-"
    value = np.atleast_1d(value)
    return format(value[0], form) + (
        f" [{value[1]:{form}}, {value[2]:{form}}]" if len(value) > 1 else ""
    )


def row(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*names):
    return [row(*names), "|---" * len(names) + "|"]


def welch(smaller, larger):
    """Difference of means, and its 95% interval by Welch's t, which does not take the spreads for equal."""
    low, high = stats.ttest_ind(larger, smaller, equal_var=False).confidence_interval(0.95)
    return float(np.mean(larger) - np.mean(smaller)), float(low), float(high)


def lower(a, b):
    return f"{abs(a / b - 1):.0%} {'lower' if a < b else 'higher'}"


def verdict(results, smaller, larger, paper, step):
    """-> (a sentence on whether `smaller` has the smaller distance at this step, whether that is so beyond doubt). Of the intervals
    that there are the last decides: over SiT seeds; over VAE seeds or, of a VAE with one seed, by the spread of the pair's."""
    a, b = (list(results.sets(v, step).values()) for v in (smaller, larger))
    if not a or not b:
        return f"- {smaller} against {larger}, step {step}: not measured yet.", True
    difference, low, high = float(np.mean(b) - np.mean(a)), None, None
    text = f"- Step {step}: {smaller} {np.mean(a):.3g}, {larger} {np.mean(b):.3g}, {lower(np.mean(a), np.mean(b))}"
    if paper.get(smaller) and paper.get(larger):
        text += f" (paper: {lower(paper[smaller], paper[larger])})"
    text += f"; difference {difference:.3g}"
    if min(len(a), len(b)) > 1:
        _, low, high = welch(a, b)
        text += f", over SiT seeds [{low:.3g}, {high:.3g}]"
    seeds = [results.over_vae_seeds(v, step=step) for v in (smaller, larger)]
    if min(map(len, seeds)) > 1:
        difference, low, high = welch(*seeds)
        text += f"; over VAE seeds ({len(seeds[0])} and {len(seeds[1])}) {difference:.3g} [{low:.3g}, {high:.3g}]"
    elif results.run_spread(step):
        deviation, free = results.run_spread(step)
        half = stats.t.ppf(0.975, free) * deviation * 2**0.5
        low, high = difference - half, difference + half
        text += f"; by the spread of VAE seeds [{low:.3g}, {high:.3g}]"
    if low is None:
        word = f"{'agrees' if difference > 0 else 'does not agree'}, but with one seed there is no interval"
        return f"{text}. The direction {word}.", difference > 0
    word = (
        "agrees" if low > 0 else "does not agree" if high < 0 else "is open: the interval holds 0"
    )
    return f"{text}. The direction {word}.", low > 0


# ----------------------------------------------------------------------------------------------------------------------
# Parts of the page


def provenance(results):
    """A paragraph on machine, versions and dates, as the runs wrote them down."""
    found = [read(path)["provenance"] for path in glob.glob(f"{results.out}/*/config.json")]
    precision = {
        read(path)["settings"]["precision"] for path in glob.glob(f"{results.out}/samples/*.json")
    }
    if not found:
        return "No run has left its record yet."
    dates = sorted(f["date"][:10] for f in found)
    devices, versions, commits = (
        ", ".join(sorted({str(f[k])[:n] for f in found}))
        for k, n in (("device", None), ("torch", None), ("commit", 7))
    )
    edited = " (with edits)" * any(f["dirty"] for f in found)
    kinds = ", ".join(sorted(precision)) or "no samples yet"
    return (
        f"{len(found)} training runs, {dates[0]} to {dates[-1]}, on: {devices} a process; torch {versions}; {kinds}; commits "
        f"{commits}{edited}. {REMARKS.get('machine', '')}"
    ).strip()


def existing(results, vaes):
    """Which VAEs have how many SiT seeds, and which have none."""
    counts = {v: len(results.sets(v)) for v in vaes}
    lines = [
        f"Sets of samples at step {results.compare} exist for {sum(map(bool, counts.values()))} of {len(vaes)} VAEs."
    ]
    for n in sorted(set(counts.values()), reverse=True):
        lines.append(
            f"- {f'{n} SiT seed' + 's' * (n > 1) if n else 'missing'}: {', '.join(v for v in vaes if counts[v] == n)}"
        )
    return lines


def table(results, paper):
    late = [n for n in results.points[-1:] if n != results.compare]
    yield from head(
        "VAE",
        "paper's gFID",
        "distance, classifier",
        "distance, target's own",
        *(f"classifier, step {n}" for n in late),
        "class probe, %",
        "attribute F1",
        "PSNR, dB",
        "floor, classifier",
        "floor, target's own",
    )
    for v, theirs in paper.items():
        probed = results.probe(v, "class probe")
        distances = (interval(results.sets(v, key=k).values()) for k in ("classifier", "target"))
        yield row(
            v,
            cell(theirs, ".2f"),
            *distances,
            *(interval(results.sets(v, n).values()) for n in late),
            cell(probed and [100 * x for x in probed], ".1f"),
            cell(results.probe(v, "attribute F1"), ".3f"),
            cell(results.judged(v, "psnr"), ".2f"),
            *(cell(results.judged(v, f"reconstruction_{k}")) for k in ("classifier", "target")),
        )


def along_training(results):
    """Section 1's tables: distance at each point, with guidance, agreement with labels, speed-up."""
    points, last = results.points, results.points[-1]
    yield from head("SiT steps", *points)
    for key in ("classifier", "target"):
        for v in ("plain", "send"):
            yield row(f"{v}, {key}", *(interval(results.sets(v, n, key).values()) for n in points))
        sets = [[list(results.sets(v, n, key).values()) for v in ("send", "plain")] for n in points]
        yield row(
            f"plain - send, {key}",
            *(cell(welch(*pair)) if min(map(len, pair)) > 1 else "-" for pair in sets),
        )
    yield from [
        "",
        f"With guidance (scale 1.5), at step {last}, and how often the classifier tells a sample as the class it was "
        "drawn for:",
        "",
    ]
    yield from head("VAE", "classifier, guided", "target, guided", "told, %", "told, guided, %")
    for v in ("plain", "send"):
        told = (
            [100 * x for x in results.sets(v, last, "told", suffix).values()]
            for suffix in ("", "-guided")
        )
        guided = (
            results.sets(v, last, key, "-guided").values() for key in ("classifier", "target")
        )
        yield row(v, *map(interval, (*guided, *told)))
    yield from ["", speed_up(results), ""]


def speed_up(results):
    """Steps at which each SiT on `send` reaches the last value of `plain`, between points on a straight line."""
    last = results.points[-1]
    goal = list(results.sets("plain", last).values())
    curves = [
        [
            (n, results.sets("send", n)[seed])
            for n in results.points
            if seed in results.sets("send", n)
        ]
        for seed in results.sets("send", last)
    ]
    reached = []
    for points in curves if goal else ():
        for (n0, d0), (n1, d1) in zip(points, points[1:]):
            if d1 <= np.mean(goal) < d0:
                reached.append(n0 + (n1 - n0) * (d0 - np.mean(goal)) / (d0 - d1))
                break
    early = sum(points[0][1] <= np.mean(goal) for points in curves if goal)
    if early or not reached:
        return (
            f"No speed-up can be given: of {len(curves)} SiTs on `send`, {early} are at `plain`'s distance of step {last} or below "
            f"it at the first point already, {len(reached)} get there between two points."
        )
    times = interval([last / n for n in reached])
    return (
        f"`send` reaches `plain`'s distance of step {last} ({np.mean(goal):.3g}) at step {interval(reached)}, "
        f"{len(reached)} of {len(curves)} SiTs: {times} times faster."
    )


def spreads(results):
    """Section 10: what the draw, the SiT's seed and the VAE's seed do."""
    last, compare, pair = results.points[-1], results.compare, ("plain", "send")
    drawn = []
    for v in pair:  # two sets of one SiT differ by sqrt(2) deviations of the draw
        first, again = results.sets(v, last), results.sets(v, last, suffix="-again")
        apart = [first[s] - again[s] for s in first if s in again]
        drawn.append(
            f"{np.sqrt(np.mean(np.square(apart)) / 2):.2g} ({len(apart)} pairs)" if apart else "-"
        )
    yield from [
        "Standard deviation of the distance in the classifier's features (number of values). Another seed of the SiT "
        "is another draw too, another seed of the VAE both:",
        "",
    ]
    yield from head("what changes", "SiT steps", *pair)
    yield row("the draw of 1,000 samples", last, *drawn)
    yield row(
        "seed of the SiT", last, *(spread(list(results.sets(v, last).values())) for v in pair)
    )
    yield row("seed of the SiT", compare, *(spread(list(results.sets(v).values())) for v in pair))
    yield row(
        "seed of the VAE's tuning, one SiT each",
        compare,
        *(spread(results.over_vae_seeds(v, 0)) for v in pair),
    )
    yield row(
        "seed of the VAE's tuning, mean of its SiTs",
        compare,
        *(spread(results.over_vae_seeds(v)) for v in pair),
    )
    means = ", ".join(f"{v} {interval(results.over_vae_seeds(v))}" for v in pair)
    yield from [
        "",
        f"A value for each VAE, the mean of its SiTs: {means}. All are tuned from one `base`; the difference stands "
        "in section 1.",
    ]


def baselines(results):
    """The class probe without a VAE."""
    found = read(f"{results.out}/probe_plain/result.json")
    rows = list(found["results"].values())[0]["accuracy"] if found else {}
    rows = [f"{k} {100 * v[0]:.1f}%" for k, v in rows.items() if "vae_" not in k]
    return f"Class probe without a VAE: {', '.join(rows)}." if rows else ""


def predictors(results, vaes, step):
    """A table of section 8: correlations with the distance at this step, over all VAEs and among the aligned ones."""
    distances = {
        v: float(np.mean(list(results.sets(v, step).values())))
        for v in vaes
        if results.sets(v, step)
    }
    rows = {v: results.measures(v) for v in distances}
    yield from [f"At step {step}:", ""]
    yield from head(
        "measure", "all: Pearson", "all: Spearman", "aligned: Pearson", "aligned: Spearman"
    )
    groups, strength = (list(rows), [v for v in rows if results.kind(v) == "aligned"]), ({}, {})
    for measure in (*PROBED, *JUDGED):
        cells = []
        for group, best in zip(groups, strength):
            known = [v for v in group if rows[v][measure] is not None]
            if len(known) < 4:
                cells += [f"not enough ({len(known)})"] * 2
                continue
            found = correlate([rows[v][measure] for v in known], [distances[v] for v in known], 0)
            cells += [f"{cell(found[k], '.2f')} ({len(known)})" for k in ("Pearson", "Spearman")]
            best[measure] = abs(found["Spearman"][0])
        yield row(measure, *cells)
    yield ""
    for best, name in zip(strength, ("all", "aligned")):
        if best:
            yield f"- Ranks {name} VAEs best (largest |Spearman|): {max(best, key=best.get)}, {max(best.values()):.2f}."


def costs(results, vaes):
    yield from head("VAE", "PSNR, dB", "SSIM", "pictures/s in training")
    for v in vaes:
        if results.judged(v, "psnr"):
            quality = cell(results.judged(v, "psnr"), ".2f"), cell(results.judged(v, "ssim"), ".3f")
            yield row(v, *quality, cell(results.speed(v), ".1f"))
    yield ""
    if all(results.judged(v, "psnr") and results.speed(v) for v in ("plain", "send")):
        psnr, ssim = (
            results.judged("send", k) - results.judged("plain", k) for k in ("psnr", "ssim")
        )
        plain, send = (
            max(results.speed(f"{v}{seed}") or 0 for seed in ("", "_s1", "_s2"))
            for v in ("plain", "send")
        )
        yield (
            f"Alignment: PSNR {psnr:+.2f} dB, SSIM {ssim:+.3f}, {plain / send:.2f} times the time per step (the fastest of the "
            "seeds). Paper: PSNR 27.96 -> 27.62 (-0.34 dB), SSIM .79 -> .77; it gives no times."
        )
    yield "Several runs shared the machine at a time, so pictures/s (of the fastest tenth of each run) compare roughly only."


def shapes(results, vaes):
    late = results.points[-1]
    yield from head("VAE", "distance, classifier", f"the same, step {late}", *PROBED, *JUDGED)
    for v in vaes:
        values = results.measures(v)
        if any(x is not None for x in values.values()):
            yield row(
                v,
                *(interval(results.sets(v, n).values()) for n in (None, late)),
                *map(cell, values.values()),
            )


def held_quality(results):
    """Section 10's controls whose reconstruction is as good as `send`'s, and worse."""
    vaes = ("plain", "plain_short", "base", "send")
    if not all(results.judged(v, "psnr") for v in vaes):
        return "PSNR of plain, plain_short, base and send: not measured yet."
    each = (
        f"{v} {results.judged(v, 'psnr'):.2f} dB and distance {interval(results.sets(v).values())}"
        for v in vaes
    )
    return f"If worse reconstruction alone made latents easier, less PSNR would go with a smaller distance: {', '.join(each)}."


def attribute_table(classes, attributes):
    yield from [
        "## The attribute table",
        "",
        "AwA's manner: true of most of a class, whether or not a picture shows it.",
        "",
    ]
    yield from head("attribute", "classes")
    for a, bits in attributes.items():
        yield row(a.replace("_", " "), ", ".join(c for c, bit in zip(classes, bits) if bit == "1"))


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def ticks(low, high):
    """Round numbers between the two, three to seven: steps of 1, 2 or 5 times a power of ten."""
    step = 10.0 ** np.floor(np.log10(max(high - low, 1e-9) / 6))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 6)
    return np.arange(np.ceil(low / step), high / step + 1e-9) * step


def chart(title, x_label, y_label, series, line=False, zero=(), size=(720, 400)):
    """PIL image of dots: series {label: (colour, [(x, y, name)])}. With `line` the means over equal x are joined; axes named in
    `zero` begin at 0."""
    canvas = Image.new("RGB", size, "white")
    pen, (left, top, right, bottom) = ImageDraw.Draw(canvas), (70, 40, size[0] - 30, size[1] - 50)
    points = [p for _, ps in series.values() for p in ps]
    low, high = ([pick(p[i] for p in points) for i in (0, 1)] for pick in (min, max))
    low = [0 if axis in zero else a - 0.05 * (b - a) for axis, a, b in zip("xy", low, high)]
    high = [b + 0.05 * (b - a) for a, b in zip(low, high)]

    def at(x, y):
        return (
            left + (right - left) * (x - low[0]) / max(high[0] - low[0], 1e-9),
            bottom - (bottom - top) * (y - low[1]) / max(high[1] - low[1], 1e-9),
        )

    for y in ticks(low[1], high[1]):
        pen.line((*at(low[0], y), *at(high[0], y)), "lightgrey")
        pen.text((10, at(0, y)[1] - 6), f"{y:.3g}", "black")
    for x in sorted({p[0] for p in points}) if line else ticks(low[0], high[0]):
        pen.text((at(x, 0)[0] - 10, bottom + 6), f"{x:.4g}", "black")
    pen.text((left, 6), title, "black")
    pen.text((10, 22), y_label, "black")
    pen.text((left + 230, bottom + 26), x_label, "black")
    for i, (label, (colour, ps)) in enumerate(series.items()):
        if line:
            pen.line(
                [
                    at(x, np.mean([p[1] for p in ps if p[0] == x]))
                    for x in sorted({p[0] for p in ps})
                ],
                colour,
                3,
            )
        for x, y, name in ps:
            u, v = at(x, y)
            pen.ellipse((u - 3, v - 3, u + 3, v + 3), outline=colour)
            pen.text((min(u + 6, size[0] - 6 * len(name)), v - 12), name, colour)
        pen.text((right - 6 * max(map(len, series)), top + 6 + 14 * i), label, colour)
    return canvas


def save(image, path):
    with writing(path) as file:
        image.save(file, "PNG")


def stack(paths, path):
    """Pictures one above the other -> whether all were there."""
    if not all(map(os.path.exists, paths)):
        return False
    pictures = [Image.open(p) for p in paths]
    canvas, top = (
        Image.new(
            "RGB", (max(p.width for p in pictures), sum(p.height + 16 for p in pictures)), "white"
        ),
        0,
    )
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height + 16
    save(canvas, path)
    return True


def draw_curves(results, path):
    """Distance over SiT steps of the main pair, a dot for each SiT seed."""
    series = {}
    for v, label, colour in (
        ("plain", "the same VAE, no alignment", "firebrick"),
        ("send", "Send-VAE", "navy"),
    ):
        series[label] = (
            colour,
            [(n, d, "") for n in results.points for d in results.sets(v, n).values()],
        )
    title = (
        "Frechet distance of samples, in an independent classifier's features (smaller is better)"
    )
    save(chart(title, "SiT training steps", "", series, line=True, zero="xy"), path)


def draw_probe(results, vaes, path):
    """Distance over the class probe, a dot for each VAE."""
    series = {
        kind: (colour, [])
        for kind, colour in (("none", "firebrick"), ("control", "dimgrey"), ("aligned", "navy"))
    }
    for v in vaes:
        if results.sets(v) and results.probe(v, "class probe"):
            point = (
                100 * results.probe(v, "class probe")[0],
                float(np.mean(list(results.sets(v).values()))),
                v,
            )
            series[results.kind(v)][1].append(point)
    names = dict(none="no alignment", control="control", aligned="aligned")
    series = {names[kind]: found for kind, found in series.items() if found[1]}
    save(
        chart(
            f"Distance of samples at step {results.compare}, a dot for each VAE",
            "class probe, %",
            "",
            series,
        ),
        path,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The page


def section(results, number, unsettled):
    """Title, table, the paper's word, verdicts; `unsettled` takes the number if a direction is open or does not agree."""
    title, paper, what, pairs = SECTIONS[number]
    yield from [f"## {number}. {title}", ""]
    if not any(results.sets(v) for v in paper if v not in ("plain", "send") or number == 1):
        theirs = ", ".join(f"{v} {gfid:.2f}" for v, gfid in paper.items() if gfid)
        yield from [f"Not measured yet. Paper: {theirs and theirs + ', '}{what}.", ""]
        return
    steps = dict.fromkeys((results.compare, results.points[-1]))
    found = [
        verdict(results, *pair, paper, step)
        for pair in pairs
        for step in steps
        if step == results.compare or all(results.sets(v, step) for v in pair)
    ]
    yield from [*table(results, paper), "", f"Paper: {what}.", "", *(text for text, _ in found), ""]
    if not all(good for _, good in found):
        unsettled.append(number)


def remark(number):
    return [REMARKS[number], ""] if number in REMARKS else []


def intro(args, results, size, vaes):
    late = f" and, with the SiTs that were trained on (their number is in the tables), at step {size['points'][-1]}"
    return [
        "# Results of the small-scale study",
        "",
        f"Written by `python -m study.run{' --quick' * args.quick} --report`; every number is read from the runs' files.",
        "",
        f"Data: {args.data}; vision model tf_efficientnet_lite0, its stride-16 map; VAE f4, {size['base']} steps of 8 pictures "
        f"from scratch (`base`), then {size['tune']} with (`send`) or without (`plain`) alignment; the others are `send` or `plain` "
        "with one thing changed, `_s1` and `_s2` another seed of the tuning, `plain_short` less of it. SiT of depth 6, width 192, "
        "patch 2, steps of 64, no REPA unless named; 1,000 samples, 25 Euler steps, no guidance unless said; compared at step "
        f"{size['compare']}" + late * (not args.quick) + ".",
        "",
        "Distance: Frechet, in 128 features of a classifier trained on the same data (no VAE saw it), and in the alignment "
        "target's own pooled tokens; smaller is better, neither is FID. Floor: distance of the reconstructions of 2,000 test "
        "pictures. ± is half a 95% t-interval over SiT seeds (their number).",
        "",
        "A direction agrees where the interval of the difference lies on the side that the paper, or where it is silent its "
        "claim, expects; no interval is widened for the number of comparisons. One over SiT seeds is about the two VAEs at hand; "
        "one over VAE seeds, or by their spread in section 10, is about VAEs trained so.",
        "",
        provenance(results),
        "",
        *existing(results, vaes),
        "",
    ]


def write(args, out, size, vaes, classes, attributes, path):
    """All of the above to `path`, figures to docs/ (--quick: sections 1 and 9 only, the figure to `out`)."""
    results, unsettled = Results(out, size["points"], size["compare"]), []
    lines = [*intro(args, results, size, vaes), *section(results, 1, unsettled)]
    paired = results.sets("plain") and results.sets("send")
    if paired:
        lines += along_training(results)
        draw_curves(results, f"{out}/study.png" if args.quick else "docs/study.png")
        lines += [
            "![distance over SiT steps](study.png)"
            if args.quick
            else "![distance over SiT steps](docs/study.png)",
            "",
        ]
    if not args.quick:  # the remarks are on the full study
        lines += remark(1)
        for number in range(2, 8):
            lines += [*section(results, number, unsettled), *remark(number)]
        lines += [
            "## 8. Does the probe predict?",
            "",
            "Pearson's and Spearman's correlation with the distance in the classifier's features, [95% interval over resampled "
            "VAEs], (number of VAEs). Aligned: without plain VAEs and without the controls of sections 4 and 10. Paper: -0.957 "
            "(Pearson) between DeepFashion top-5 recall and gFID over six VAEs. "
            + baselines(results),
            "",
        ]
        for step in (results.compare, results.points[-1]):
            lines += [*predictors(results, vaes, step), ""]
        if (
            sum(bool(results.sets(v) and results.probe(v, "class probe")) for v in vaes) >= 4
        ):  # as for a correlation
            draw_probe(results, vaes, "docs/probe.png")
            lines += ["![distance over class probe](docs/probe.png)", ""]
        lines += remark(8)
    lines += ["## 9. What does it cost?", "", *costs(results, vaes), ""]
    if not args.quick:
        lines += remark(9)
        lines += [
            *section(results, 10, unsettled),
            held_quality(results),
            "",
            *spreads(results),
            "",
        ]
        lines += ["What the latents are like:", "", *shapes(results, vaes), ""]
        if stack([f"{out}/latents.png"], "docs/latents.png"):
            lines += [
                "Test pictures in the plane of most variance of the latents, a colour a class:",
                "",
                "![](docs/latents.png)",
                "",
            ]
        if stack([f"{out}/judged/{v}-path.png" for v in ("plain", "send")], "docs/paths.png"):
            lines += [
                "Straight lines between the latents of two test pictures (the outer columns), decoded; `plain` above "
                "`send`:",
                "",
                "![](docs/paths.png)",
                "",
            ]
        lines += remark(10)
        for number in (11, 12):
            lines += [*section(results, number, unsettled), *remark(number)]
        lines += attribute_table(classes, attributes)
    with writing(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
    lacking = [n for n in unsettled if n not in REMARKS and not args.quick]
    say(
        f"written   {path}"
        + f"; a direction is open or does not agree in sections {lacking}, write REMARKS"
        * bool(lacking)
    )
