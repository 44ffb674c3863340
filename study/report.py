"""Writes RESULTS.md and its figures from what the study's runs left:

    python -m study.run --report

Every number is read from a file of a run. What the numbers mean is written by hand in
study/sections.py.
"""

import glob
from typing import NamedTuple

import numpy as np
from scipy import stats

from common.files import writing
from common.processes import say
from probing.correlation import pearson
from study import figures, predictors
from study.attributes import ATTRIBUTES, CLASSES
from study.predictors import COLOURS
from study.results import LATENT_MEASURES, Results, read_json, read_recorded
from study.sections import REMARKS, SECTIONS
from study.text import (
    deviation,
    lower_or_higher,
    mean_and_interval,
    number,
    percent,
    table_head,
    table_line,
)

PAIR = ("plain", "send")
# Their labels and kinds of colour in figures.
PAIR_CURVES = {
    "plain": ("the same VAE, no alignment", "none"),
    "send": ("Send-VAE", "aligned"),
}
# A curve of fewer says no more than a table.
MIN_POINTS_TO_DRAW = 3

# --------------------------------------------------------------------------------------------------
# Directions


class Verdict(NamedTuple):
    # A list item: the two distances, the intervals of their difference, and whether it agrees.
    sentence: str
    # False if the direction does not agree or is undecided.
    settled: bool


class Difference(NamedTuple):
    """Mean distance of the VAE expected to be worse minus that of the other, and its 95%
    interval."""

    mean: float
    low: float
    high: float


def welch(smaller, larger):
    """Difference of two lists of distances, by Welch's t-test, which does not assume equal
    spreads."""
    test = stats.ttest_ind(larger, smaller, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return Difference(float(np.mean(larger) - np.mean(smaller)), float(low), float(high))


def verdicts(results, section_number):
    """A Verdict for each pair and step of a section that has sets of samples; none before that."""
    if not is_measured(results, section_number):
        return []
    section = SECTIONS[section_number]
    found = []
    for smaller, larger in section.pairs:
        found.append(verdict(results, smaller, larger, section.paper_gfid, results.compare_step))
        last = results.last_step
        if last != results.compare_step and have_sets(results, smaller, larger, last):
            found.append(verdict(results, smaller, larger, section.paper_gfid, last))
    return found


def have_sets(results, smaller, larger, step):
    """Whether both VAEs have sets of samples of this SiT step."""
    return bool(results.by_sit_seed(smaller, step) and results.by_sit_seed(larger, step))


def verdict(results, smaller, larger, paper_gfid, step):
    """Whether `smaller` has the smaller distance at this SiT step.

    Of the intervals that exist the last one decides: over SiT seeds; then over VAE seeds or, for
    a VAE with one seed, from the spread over the main pair's seeds.
    """
    a_by_sit = results.by_sit_seed(smaller, step)
    b_by_sit = results.by_sit_seed(larger, step)
    a = list(a_by_sit.values())
    b = list(b_by_sit.values())
    if not a or not b:
        return Verdict(f"- {smaller} against {larger} at step {step}: not measured yet.", True)

    difference = float(np.mean(b) - np.mean(a))
    text = (
        f"- Step {step}: {smaller} {np.mean(a):.3g} is {lower_or_higher(np.mean(a), np.mean(b))} "
        f"than {larger} {np.mean(b):.3g}"
    )
    if paper_gfid.get(smaller) and paper_gfid.get(larger):
        text += f" (paper: {lower_or_higher(paper_gfid[smaller], paper_gfid[larger])})"
    text += f". Difference {difference:.3g}"

    deciding = None
    if min(len(a), len(b)) > 1:
        deciding = welch(a, b)
        text += f", over SiT seeds [{deciding.low:.3g}, {deciding.high:.3g}]"
    a_seeds = results.over_vae_seeds(smaller, step=step)
    b_seeds = results.over_vae_seeds(larger, step=step)
    # The spread of means over as many SiTs as both have.
    common_sits = a_by_sit.keys() & b_by_sit.keys()
    spread = results.vae_seed_spread(common_sits, step) if common_sits else None
    if min(len(a_seeds), len(b_seeds)) > 1:
        deciding = welch(a_seeds, b_seeds)
        text += (
            f"; over VAE seeds ({len(a_seeds)} and {len(b_seeds)}) {deciding.mean:.3g} "
            f"[{deciding.low:.3g}, {deciding.high:.3g}]"
        )
    elif spread is not None:
        standard_deviation, degrees = spread
        half = stats.t.ppf(0.975, degrees) * standard_deviation * 2**0.5
        deciding = Difference(difference, difference - half, difference + half)
        text += f"; from the spread over VAE seeds [{deciding.low:.3g}, {deciding.high:.3g}]"

    if deciding is None:
        return one_seed_verdict(text, difference)
    return Verdict(f"{text}. The direction {direction(deciding)}.", deciding.low > 0)


def one_seed_verdict(text, difference):
    agrees = difference > 0
    word = "agrees" if agrees else "does not agree"
    return Verdict(f"{text}. The direction {word}, but one seed gives no interval.", agrees)


def direction(difference):
    if difference.low > 0:
        return "agrees"
    if difference.high < 0:
        return "does not agree"
    return "is undecided: the interval contains 0"


# --------------------------------------------------------------------------------------------------
# The page's head


def introduction(args, results, vaes):
    compared = f"VAEs are compared at SiT step {results.compare_step}"
    if args.quick:
        source = (
            "Written by `python -m study.run --quick --report`. Every number is read from the "
            "runs' files."
        )
    else:
        source = (
            "Written by `python -m study.run --report`. Every number is read from the runs' files; "
            "what the numbers may mean is written by hand."
        )
        compared += (
            f" and at step {results.last_step}; the tables give the number of SiTs in brackets"
        )
    machine = provenance(results)
    # Remarks are about the full study.
    if "machine" in REMARKS and not args.quick:
        machine += f" {REMARKS['machine']}"
    return [
        "# Results of the small-scale study",
        "",
        source,
        "",
        f"Data: {args.data}. Vision model: tf_efficientnet_lite0, its feature map at stride 16. "
        f"VAE: factor 4, trained from scratch for {args.size.base_steps} steps of 8 pictures "
        f"(`base`), then tuned for {args.size.tune_steps} steps with alignment (`send`) or "
        "without (`plain`). The other VAEs are `send` or `plain` with one thing changed; `_s1` "
        "and `_s2` are other seeds of the tuning, and `plain_short` is tuned for fewer steps. "
        "SiT: depth 6, width 192, patch 2, batches of 64, without REPA unless the name says so. "
        "A set has 1,000 samples, drawn with 25 Euler steps and without guidance unless stated. "
        f"{compared}.",
        "",
        "Distance: the Frechet distance to real pictures, in 128 features of a classifier "
        "trained on the same data (*classifier*; no VAE saw it) and in the pooled tokens of the "
        "vision model that VAEs are aligned to (*target*). Smaller is better; neither is FID. "
        "Floor: the distance of the reconstructions of 2,000 test pictures. ± is half a 95% "
        "t-interval over SiT seeds, whose number follows in brackets.",
        "",
        "A direction agrees if the whole interval of the difference lies on the side that the "
        "paper expects or, where the paper has no such comparison, that its claim implies. "
        "Intervals are not corrected for the number of comparisons. An interval over SiT seeds "
        "is about the two VAEs at hand. An interval over VAE seeds, or from their spread "
        "(section 10), is about VAEs trained in this way.",
        "",
        machine,
        "",
        *existing_sets(results, vaes),
        "",
    ]


def provenance(results):
    """A paragraph on devices, versions and dates, as the runs recorded them."""
    configs = [read_json(path) for path in glob.glob(f"{results.out}/*/config.json")]
    if not configs:
        return "No run has left its record yet."
    records = [config["provenance"] for config in configs]
    samples = [read_json(path) for path in glob.glob(f"{results.out}/samples/*.json")]

    drawn = [judged["settings"]["provenance"] for judged in samples]
    precisions = comma_separated(judged["settings"]["precision"] for judged in samples)
    text = f"{len(records)} training runs: {machines(records)}."
    if drawn:
        text += f" {len(drawn)} sets of samples, in {precisions}: {machines(drawn)}."
    return text


def machines(records):
    """The dates, devices, versions and commits of records of provenance, as text."""
    dates = sorted(record["date"][:10] for record in records)
    devices = comma_separated(str(record["device"]) for record in records)
    versions = comma_separated(str(record["torch"]) for record in records)
    commits = comma_separated(str(record["commit"])[:7] for record in records)
    if any(record["dirty"] for record in records):
        commits += " (with uncommitted changes)"
    return f"{dates[0]} to {dates[-1]}; {devices}; torch {versions}; commits {commits}"


def comma_separated(names):
    return ", ".join(sorted(set(names)))


def existing_sets(results, vaes):
    """How many SiT seeds each VAE has at compare_step."""
    counts = {vae: len(results.by_sit_seed(vae)) for vae in vaes}
    present = sum(1 for count in counts.values() if count)
    lines = [
        f"Sets of samples at step {results.compare_step} exist for {present} of {len(vaes)} VAEs."
    ]
    for count in sorted(set(counts.values()), reverse=True):
        names = ", ".join(vae for vae in vaes if counts[vae] == count)
        if count == 0:
            lines.append(f"- missing: {names}")
        elif count == 1:
            lines.append(f"- 1 SiT seed: {names}")
        else:
            lines.append(f"- {count} SiT seeds: {names}")
    return lines


# --------------------------------------------------------------------------------------------------
# Numbered sections that compare VAEs


def is_measured(results, section_number):
    """Whether any VAE that is this section's own has a set of samples; section 1 has the main
    pair."""
    vaes = SECTIONS[section_number].paper_gfid
    own = [vae for vae in vaes if vae not in PAIR or section_number == 1]
    return any(results.by_sit_seed(vae) for vae in own)


def comparison(results, section_number):
    """A section's title, table, the paper's setting, and verdicts."""
    section = SECTIONS[section_number]
    lines = [f"## {section_number}. {section.title}", ""]
    if not is_measured(results, section_number):
        known = [f"{vae} {gfid:.2f}" for vae, gfid in section.paper_gfid.items() if gfid]
        paper = section.paper_setting
        if known:
            paper = f"{', '.join(known)}; {paper}"
        return [*lines, f"Not measured yet. Paper: {paper}.", ""]
    sentences = [verdict.sentence for verdict in verdicts(results, section_number)]
    lines += comparison_table(results, section.paper_gfid)
    return [*lines, "", f"Paper: {section.paper_setting}.", "", *sentences, ""]


def comparison_table(results, paper_gfid):
    later_steps = [results.last_step]
    if results.last_step == results.compare_step:
        later_steps = []
    lines = table_head(
        "VAE",
        "paper's gFID",
        "distance, classifier",
        "distance, target",
        *(f"distance, classifier, step {step}" for step in later_steps),
        "class probe, %",
        "attribute F1",
        "PSNR, dB",
        "floor, classifier",
        "floor, target",
    )
    for vae, gfid in paper_gfid.items():
        line = table_line(
            vae,
            number(gfid, ".2f"),
            mean_and_interval(results.values(vae, key="classifier")),
            mean_and_interval(results.values(vae, key="target")),
            *(mean_and_interval(results.values(vae, step)) for step in later_steps),
            percent(results.probe(vae, "class probe")),
            number(results.probe(vae, "attribute F1"), ".3f"),
            number(results.judged(vae, "psnr"), ".2f"),
            number(results.judged(vae, "reconstruction_classifier")),
            number(results.judged(vae, "reconstruction_target")),
        )
        lines.append(line)
    return lines


def remark(section):
    """The remark under this key of REMARKS, if there is one."""
    if section not in REMARKS:
        return []
    return [REMARKS[section], ""]


# --------------------------------------------------------------------------------------------------
# Section 1: the main pair along the SiT's training


def along_training(results):
    """Distance at each SiT step, with guidance, agreement with labels, and the speed-up."""
    return [
        *distances_table(results),
        "",
        f"At step {results.last_step}: the distance with guidance (scale 1.5), and the share of "
        "samples that the classifier assigns to the class they were drawn for:",
        "",
        *guidance_table(results),
        "",
        speed_up(results),
        "",
    ]


def distances_table(results):
    lines = table_head("SiT steps", *results.sit_points)
    for network in ("classifier", "target"):
        for vae in PAIR:
            cells = [
                mean_and_interval(results.values(vae, step, network)) for step in results.sit_points
            ]
            lines.append(table_line(f"{vae}, {network}", *cells))
        cells = [difference_cell(results, step, network) for step in results.sit_points]
        lines.append(table_line(f"plain - send, {network}", *cells))
    return lines


def difference_cell(results, step, network):
    plain = results.values("plain", step, network)
    send = results.values("send", step, network)
    if min(len(plain), len(send)) < 2:
        return "-"
    return number(welch(smaller=send, larger=plain))


def guidance_table(results):
    last = results.last_step
    lines = table_head(
        "VAE",
        "distance, classifier, guided",
        "distance, target, guided",
        "assigned to their class, %",
        "assigned to their class, guided, %",
    )
    for vae in PAIR:
        line = table_line(
            vae,
            mean_and_interval(results.values(vae, last, "classifier", "-guided")),
            mean_and_interval(results.values(vae, last, "target", "-guided")),
            told_cell(results, vae, last),
            told_cell(results, vae, last, "-guided"),
        )
        lines.append(line)
    return lines


def told_cell(results, vae, step, suffix=""):
    """The share of samples that the classifier assigns to their class, in percent, as text."""
    return mean_and_interval([100 * share for share in results.values(vae, step, "told", suffix)])


def speed_up(results):
    """When each SiT on `send` reaches the mean distance that those on `plain` have at the last
    step."""
    last = results.last_step
    plain = results.values("plain", last)
    goal = np.mean(plain) if plain else -np.inf
    curves = send_curves(results)
    reached = [crossing(curve, goal) for curve in curves]
    reached = [step for step in reached if step is not None]
    early = sum(1 for curve in curves if curve[0][1] <= goal)
    if early or not reached:
        return (
            f"No speed-up can be given: of {len(curves)} SiTs on `send`, {early} are at or below "
            f"`plain`'s distance of step {last} at the first step already, and {len(reached)} "
            "reach it between two steps."
        )
    times = mean_and_interval([last / step for step in reached])
    return (
        f"`send` matches `plain`'s distance of step {last} ({goal:.3g}) at step "
        f"{mean_and_interval(reached)}, in {len(reached)} of {len(curves)} SiTs: {times} times "
        "faster."
    )


def send_curves(results):
    """A list of (step, distance) for each SiT on `send` that was trained to the last step."""
    by_step = {step: results.by_sit_seed("send", step) for step in results.sit_points}
    return [
        [(step, values[seed]) for step, values in by_step.items() if seed in values]
        for seed in by_step[results.last_step]
    ]


def crossing(curve, goal):
    """The step at which a curve of (step, distance) first falls to `goal`, on a straight line
    between two of its points, or None."""
    for k in range(1, len(curve)):
        step_before, before = curve[k - 1]
        step_after, after = curve[k]
        if after <= goal < before:
            share = (before - goal) / (before - after)
            return step_before + (step_after - step_before) * share
    return None


# --------------------------------------------------------------------------------------------------
# Section 9: costs


def costs(results, vaes):
    lines = ["## 9. What does alignment cost?", ""]
    lines += table_head("VAE", "PSNR, dB", "SSIM", "pictures/s in training")
    for vae in vaes:
        if results.judged(vae, "psnr"):
            line = table_line(
                vae,
                number(results.judged(vae, "psnr"), ".2f"),
                number(results.judged(vae, "ssim"), ".3f"),
                number(results.pictures_per_second(vae), ".1f"),
            )
            lines.append(line)
    lines.append("")
    if all(results.judged(vae, "psnr") and results.pictures_per_second(vae) for vae in PAIR):
        psnr = results.judged("send", "psnr") - results.judged("plain", "psnr")
        ssim = results.judged("send", "ssim") - results.judged("plain", "ssim")
        time = fastest_seed(results, "plain") / fastest_seed(results, "send")
        lines.append(
            f"Alignment: PSNR {psnr:+.2f} dB, SSIM {ssim:+.3f}, {time:.2f} times the time per step "
            "(fastest seed of each). Paper: PSNR 27.96 -> 27.62 (-0.34 dB), SSIM .79 -> .77; it "
            "gives no times."
        )
    lines.append(
        "Pictures/s is the 90th percentile of a run's log. Several runs shared the machine at a "
        "time, so these rates compare only roughly."
    )
    lines.append("")
    return lines


def fastest_seed(results, vae):
    """Pictures/s in training of the fastest seed of a VAE."""
    rates = [results.pictures_per_second(f"{vae}{suffix}") for suffix in ("", "_s1", "_s2")]
    return max(rate for rate in rates if rate is not None)


# --------------------------------------------------------------------------------------------------
# Section 10: controls, spreads, and what the latents are like


def reconstruction_control(results):
    """Whether a worse reconstruction goes with a smaller distance where there is no alignment."""
    vaes = ("plain", "plain_short", "base", "send")
    if not all(results.judged(vae, "psnr") for vae in vaes):
        return "PSNR of plain, plain_short, base and send: not measured yet."
    each = [
        f"{vae} {results.judged(vae, 'psnr'):.2f} dB and distance "
        f"{mean_and_interval(results.values(vae))}"
        for vae in vaes
    ]
    return (
        "If worse reconstruction alone made latents easier to model, a lower PSNR would go with a "
        f"smaller distance: {', '.join(each)}."
    )


def spreads(results):
    """How much the distance changes with the draw, the SiT's seed and the VAE's seed."""
    last = results.last_step
    draws = [deviation_of_draws(results, vae) for vae in PAIR]
    lines = [table_line("the draw of 1,000 samples", last, *draws)]
    for step in (results.compare_step, last):
        sits = [deviation(results.values(vae, step)) for vae in PAIR]
        one_sit = [deviation(results.over_vae_seeds(vae, (0,), step)) for vae in PAIR]
        mean_sit = [deviation(results.over_vae_seeds(vae, step=step)) for vae in PAIR]
        lines += [
            table_line("seed of the SiT", step, *sits),
            table_line("seed of the VAE's tuning, one SiT each", step, *one_sit),
            table_line("seed of the VAE's tuning, mean of its SiTs", step, *mean_sit),
        ]
    means = [f"{vae} {mean_and_interval(results.over_vae_seeds(vae))}" for vae in PAIR]
    return [
        "Standard deviation of the distance in the classifier's features, (number of values). "
        "Another seed of the SiT also changes the draw; another seed of the VAE changes both:",
        "",
        *table_head("what changes", "SiT steps", *PAIR),
        *lines,
        "",
        f"Over VAE seeds, each with the mean of its SiTs: {', '.join(means)}. All are tuned from "
        "one `base`. Section 1 has the difference.",
    ]


def deviation_of_draws(results, vae):
    """Standard deviation of the distance over draws of samples from the same SiT, as text."""
    first = results.by_sit_seed(vae, results.last_step)
    again = results.by_sit_seed(vae, results.last_step, suffix="-again")
    differences = [first[seed] - again[seed] for seed in first if seed in again]
    if not differences:
        return "-"
    # Two draws differ by sqrt(2) times the standard deviation of one.
    return f"{np.sqrt(np.mean(np.square(differences)) / 2):.2g} ({len(differences)} pairs)"


def latent_properties(results, vaes):
    """A table of every VAE that has one of LATENT_MEASURES."""
    lines = table_head(
        "VAE",
        "distance, classifier",
        f"distance, classifier, step {results.last_step}",
        *LATENT_MEASURES,
    )
    for vae in vaes:
        measures = results.measures(vae)
        numbers = [measures[name] for name in LATENT_MEASURES]
        if all(value is None for value in numbers):
            continue
        line = table_line(
            vae,
            mean_and_interval(results.values(vae)),
            mean_and_interval(results.values(vae, results.last_step)),
            *(number(value) for value in numbers),
        )
        lines.append(line)
    return lines


def latent_pictures(results):
    lines = []
    if figures.stack_pictures([f"{results.out}/latents.png"], "docs/latents.png"):
        lines += [
            "Latents of test pictures in the plane of their first two principal components, one "
            "colour per class:",
            "",
            "![](docs/latents.png)",
            "",
        ]
    paths = [f"{results.out}/judged/{vae}-path.png" for vae in PAIR]
    if figures.stack_pictures(paths, "docs/paths.png"):
        lines += [
            "Straight lines between the latents of two test pictures (the outer columns), "
            "decoded. `plain` is above `send`:",
            "",
            "![](docs/paths.png)",
            "",
        ]
    return lines


def controls(results, vaes):
    return [
        *comparison(results, 10),
        reconstruction_control(results),
        "",
        *spreads(results),
        "",
        "Properties of the latents:",
        "",
        *latent_properties(results, vaes),
        "",
        *latent_pictures(results),
    ]


# --------------------------------------------------------------------------------------------------
# Section 9, continued: does alignment cost less where the base VAE has converged?


def long_tuning(results):
    """PSNR and distances of the pair that is tuned from `base_long`, beside the main pair."""
    if not all(results.judged(f"{vae}_long", "psnr") for vae in PAIR):
        return []
    lines = [
        "The same pair tuned from a base that was trained longer, and from scratch:",
        "",
        *table_head(
            "tuned from",
            "trained for, steps",
            "PSNR of the base, dB",
            "plain",
            "send",
            "cost of alignment, dB",
            "in squared error, 1e-4",
            f"distance, plain, step {results.last_step}",
            f"distance, send, step {results.last_step}",
        ),
    ]
    for base, plain, send in (
        ("base", "plain", "send"),
        ("base_long", "plain_long", "send_long"),
        (None, "scratch_plain", "scratch_send"),
    ):
        plain_psnr = results.judged(plain, "psnr")
        send_psnr = results.judged(send, "psnr")
        if plain_psnr is None or send_psnr is None:
            continue
        line = table_line(
            base or "scratch",
            "-" if base is None else results.vae_steps(base),
            "-" if base is None else number(results.validation_psnr(base), ".2f"),
            number(plain_psnr, ".2f"),
            number(send_psnr, ".2f"),
            f"{send_psnr - plain_psnr:+.2f}",
            f"{1e4 * (squared_error(send_psnr) - squared_error(plain_psnr)):+.2f}",
            mean_and_interval(results.values(plain, results.last_step)),
            mean_and_interval(results.values(send, results.last_step)),
        )
        lines.append(line)
    paper = 1e4 * (squared_error(27.62) - squared_error(27.96))
    text = (
        "Squared error: 10^(-PSNR / 10), of pictures in 0 to 1. Paper: PSNR 27.96 -> 27.62, -0.34 "
        f"dB, {paper:+.2f}."
    )
    return [*lines, "", text, ""]


def squared_error(psnr):
    """Of pictures in [0,1], from their PSNR in dB."""
    return 10 ** (-psnr / 10)


# --------------------------------------------------------------------------------------------------
# Section 13: the first steps of a SiT


def first_steps(results, points, rates):
    """Distances in the first steps of SiTs on the main pair, drawn from the averaged weights and
    from the weights themselves.

    points: SiT steps; rates: learning rates.
    """
    lines = ["## 13. The first steps of a SiT", ""]
    measured = []
    for rate in rates:
        for suffix, weights in (("", "EMA"), ("-raw", "raw")):
            measured += early_lines(results, points, rate, suffix, weights)
    if not measured:
        return [*lines, "Not measured yet.", ""]
    text = (
        "Distance in the classifier's features. *EMA*: drawn from the averaged weights (decay "
        "0.995 from the first step, as in all sets above); *raw*: from the weights themselves. "
        "After n steps the average still holds 0.995^n of the initial weights: "
    )
    shares = [f"{0.995**step:.0%} at step {step}" for step in points]
    head = table_head("learning rate", "weights", "VAE", *points)
    return [*lines, text + ", ".join(shares) + ".", "", *head, *measured, ""]


def early_lines(results, points, rate, suffix, weights):
    """Table lines of both VAEs and of their difference, for one learning rate and kind of
    weights."""
    values = {
        vae: [results.values(f"{vae}-early{rate:g}", step, suffix=suffix) for step in points]
        for vae in PAIR
    }
    if not any(values["plain"]) or not any(values["send"]):
        return []
    lines = []
    for vae in PAIR:
        cells = [mean_and_interval(found) for found in values[vae]]
        lines.append(table_line(f"{rate:g}", weights, vae, *cells))
    cells = []
    for plain, send in zip(values["plain"], values["send"], strict=True):
        enough = min(len(plain), len(send)) > 1
        cells.append(number(welch(smaller=send, larger=plain)) if enough else "-")
    lines.append(table_line(f"{rate:g}", weights, "plain - send", *cells))
    return lines


# --------------------------------------------------------------------------------------------------
# Section 17: SiTs that are trained ten times as long


def long_training(results, vaes, variant, points, path):
    """Distances of 10,000 samples along longer training, without guidance and, at the end, with it.

    variant: what the names of these SiTs have after the VAE's; points: SiT steps; path: of the
    figure.
    """
    vaes = [f"{vae}{variant}" for vae in vaes]
    lines = ["## 17. SiTs that are trained longer", ""]
    points = [step for step in points if any(results.by_sit_seed(vae, step) for vae in vaes)]
    if not points:
        return [*lines, "Not measured yet.", ""]
    last = points[-1]
    measured = [vae for vae in vaes if results.by_sit_seed(vae, points[0])]
    lines += [
        "One SiT on each VAE, trained on a GPU (`python -m study.gpu`). Distance in the "
        "classifier's features, of 10,000 samples, which the draw moves less than that of 1,000. "
        "Guidance has a scale of 1.5. The last columns are the shares of samples that the "
        "classifier assigns to the class they were drawn for.",
        "",
        *table_head(
            "VAE",
            *(f"step {point}" for point in points),
            f"step {last}, guided",
            "assigned to their class, %",
            "guided, %",
        ),
    ]
    for vae in measured:
        line = table_line(
            vae,
            *(mean_and_interval(results.values(vae, point)) for point in points),
            mean_and_interval(results.values(vae, last, suffix="-guided")),
            told_cell(results, vae, last),
            told_cell(results, vae, last, "-guided"),
        )
        lines.append(line)
    lines += ["", *long_differences(results, variant, points), ""]

    def over_seeds(vae, step):
        return results.over_vae_seeds(vae, step=step, variant=variant)

    drawn = [[step for step in points if over_seeds(vae, step)] for vae in PAIR]
    if min(map(len, drawn)) >= MIN_POINTS_TO_DRAW:
        draw_pair_curves(path, points, over_seeds)
        lines += [f"![distance over {last} SiT steps]({path})", ""]
    return lines


def long_differences(results, variant, points):
    """List items: the difference of the pair over VAE seeds at each step."""
    items = []
    columns = [(point, "") for point in points] + [(points[-1], "-guided")]
    for step, suffix in columns:
        plain = results.over_vae_seeds("plain", step=step, variant=variant, suffix=suffix)
        send = results.over_vae_seeds("send", step=step, variant=variant, suffix=suffix)
        if min(len(plain), len(send)) < 2:
            continue
        difference = welch(smaller=send, larger=plain)
        items.append(
            f"- Step {step}{', guided' if suffix else ''}: send {mean_and_interval(send)} is "
            f"{lower_or_higher(np.mean(send), np.mean(plain))} than plain "
            f"{mean_and_interval(plain)}; difference over VAE seeds {number(difference)}. The "
            f"direction {direction(difference)}."
        )
    return items


# --------------------------------------------------------------------------------------------------
# The page


def attribute_table():
    lines = [
        "## The attribute table",
        "",
        "As in AwA, an attribute holds for a class if it is true of most of its members, whether "
        "or not a picture shows it.",
        "",
        *table_head("attribute", "classes"),
    ]
    for attribute, bits in ATTRIBUTES.items():
        classes = [name for name, bit in zip(CLASSES, bits, strict=True) if bit == "1"]
        lines.append(table_line(attribute.replace("_", " "), ", ".join(classes)))
    return lines


def draw_pair_curves(path, steps, distances):
    """Draws the distance over the SiT's training for the main pair, a dot for each value.

    distances: a function from a VAE and a SiT step to a list, which may be empty.
    """
    curves = {}
    for vae, (label, kind) in PAIR_CURVES.items():
        values = {step: distances(vae, step) for step in steps}
        curves[label] = (COLOURS[kind], {step: found for step, found in values.items() if found})
    title = (
        "Frechet distance of samples in an independent classifier's features (smaller is better)"
    )
    figures.draw_curves(path, title, "SiT training steps", curves)


def main_comparison(results, figure_path, link):
    """Section 1; its figure goes to `figure_path`, which is `link` seen from the page."""
    lines = comparison(results, 1)
    if have_sets(results, *PAIR, results.compare_step):
        draw_pair_curves(figure_path, results.sit_points, results.values)
        lines += [*along_training(results), f"![distance over SiT steps]({link})", ""]
    return lines


def quick_page(args, results, vaes):
    """The page of --quick: sections 1, 9 and 14, without remarks, which are about the full
    study."""
    return [
        *introduction(args, results, vaes),
        *main_comparison(results, f"{args.out}/study.png", "study.png"),
        *costs(results, vaes),
        *predictors.ifid_section(results, vaes, f"{args.out}/ifid.png", "ifid.png"),
    ]


def full_page(args, results, vaes):
    lines = introduction(args, results, vaes)
    for section_number in range(1, 13):
        lines += [*numbered_section(results, vaes, section_number), *remark(section_number)]
    lines += [*first_steps(results, args.early_points, args.early_rates), *remark(13)]
    lines += predictors.ifid_section(results, vaes, "docs/ifid.png", "docs/ifid.png")
    lines += remark(14)
    lines += [*predictors.editing_section(results, vaes), *remark(15)]
    lines += predictors.prediction_section(results, vaes)
    if predictors.draw_predictors(results, vaes, "docs/predictors.png"):
        lines += ["![distance over four measures](docs/predictors.png)", ""]
    lines += remark(16)
    lines += long_training(
        results, args.long_vaes, args.long_variant, args.long_points, "docs/long.png"
    )
    lines += remark(17)
    lines += trained_twice(results)
    return [*lines, *attribute_table()]


def numbered_section(results, vaes, section_number):
    """One of the sections 1 to 12."""
    if section_number == 1:
        return main_comparison(results, "docs/study.png", "docs/study.png")
    if section_number == 8:
        lines = predictors.probe_section(results, vaes)
        if predictors.draw_probe(results, vaes, "docs/probe.png"):
            lines += ["![distance over class probe](docs/probe.png)", ""]
        return lines
    if section_number == 9:
        return [*costs(results, vaes), *long_tuning(results)]
    if section_number == 10:
        return controls(results, vaes)
    return comparison(results, section_number)


# --------------------------------------------------------------------------------------------------
# Section 18: the same recipe, trained twice


def trained_twice(results):
    """How far the runs differ from those of the earlier training, of which study/recorded.json has
    the numbers."""
    recorded = results.recorded
    if recorded is None:
        return []
    lines = ["## 18. The same recipe, trained twice", ""]
    rows = [*changed_numbers(results), *changed_pixel_probe(results)]
    if not rows:
        return [*lines, "Not measured yet.", ""]
    return [
        *lines,
        f"All of it was trained once before, on {recorded['date']}, on other files of CIFAR-10 and "
        f"with earlier code (commits {', '.join(recorded['run_commits'])}; its RESULTS.md is that "
        f"of commit {recorded['page_commit']}). Now less then; the numbers of then are rounded to "
        "three digits (PSNR: four):",
        "",
        *table_head(
            "number",
            "VAEs",
            "mean difference",
            "root mean square",
            "largest",
            "standard deviation over VAEs, then",
            "Pearson, now and then",
        ),
        *rows,
        "",
        *differences_twice(results),
        *remark(18),
    ]


def changed_numbers(results):
    """The table lines of the measures and distances that the earlier training has, too."""
    vaes = results.recorded["vaes"]
    measures = {vae: results.measures(vae) for vae in vaes}
    lines = []
    for measure in next(iter(vaes.values()))["measures"]:
        then = {vae: entry["measures"][measure] for vae, entry in vaes.items()}
        now = {vae: measures[vae][measure] for vae in vaes}
        lines += changed_row(measure, then, now)
    for step in (results.compare_step, results.last_step):
        then = {vae: recorded_distance(results, vae, step) for vae in vaes}
        now = {vae: results.mean_distance(vae, step) for vae in vaes}
        lines += changed_row(f"distance, classifier, step {step}", then, now)
    return lines


def recorded_distance(results, vae, step):
    return results.recorded["vaes"][vae]["distances"][str(step)]["mean"]


def changed_row(name, then, now):
    """The table line of one number, in a list that is empty if no VAE has it now.

    then: {VAE: number}. now: {VAE: number or None}, of the same VAEs.
    """
    known = [vae for vae in then if now[vae] is not None]
    if not known:
        return []
    before = np.array([then[vae] for vae in known])
    after = np.array([now[vae] for vae in known])
    changes = after - before
    largest = int(np.argmax(np.abs(changes)))
    enough = len(known) >= predictors.MIN_VAES_TO_CORRELATE
    cells = [
        f"{np.mean(changes):+.2g}",
        f"{np.sqrt(np.mean(np.square(changes))):.2g}",
        f"{changes[largest]:+.2g} ({known[largest]})",
        f"{np.std(list(then.values()), ddof=1):.2g}",
        f"{pearson(after, before):.2f}" if enough else "-",
    ]
    return [table_line(name, len(known), *cells)]


def changed_pixel_probe(results):
    """The row of the class probe of pixels, which needs no VAE: the data alone can change it."""
    accuracies = results.class_probe_without_vae()
    pixels = [accuracy for label, accuracy in accuracies.items() if "pixels" in label]
    if not pixels:
        return []
    change = f"{pixels[0] - results.recorded['pixel_probe']:+.2g}"
    return [table_line("class probe of pixels, without a VAE", "-", change, "-", "-", "-", "-")]


def differences_twice(results):
    """A table of the differences that the sections are about, then and now."""
    steps = (results.compare_step, results.last_step)
    rows = []
    for smaller, larger in sorted({pair for s in SECTIONS.values() for pair in s.pairs}):
        if not {smaller, larger} <= set(results.recorded["vaes"]):
            continue
        if not all(have_sets(results, smaller, larger, step) for step in steps):
            continue
        cells = []
        for step in steps:
            then = recorded_distance(results, larger, step)
            then -= recorded_distance(results, smaller, step)
            now = results.mean_distance(larger, step) - results.mean_distance(smaller, step)
            cells += [f"{then:+.2f}", f"{now:+.2f}"]
        rows.append(table_line(f"{larger} - {smaller}", *cells))
    if not rows:
        return []
    columns = [f"step {step}, {when}" for step in steps for when in ("then", "now")]
    return [
        "The differences in distance that the sections above are about, each between the means "
        "over SiTs:",
        "",
        *table_head("VAEs", *columns),
        *rows,
        "",
    ]


# --------------------------------------------------------------------------------------------------


def write(args, vaes):
    """Writes the page to args.results and its figures to docs/ (--quick: both to args.out).

    args: those of study/run.py. vaes: names of the VAEs that the study trains.
    """
    recorded = None if args.quick else read_recorded(args.size)
    results = Results(args.out, args.size.sit_points, args.size.compare_step, recorded)
    lines = quick_page(args, results, vaes) if args.quick else full_page(args, results, vaes)
    with writing(args.results) as file:
        file.write(("\n".join(lines) + "\n").encode())
    say(f"written   {args.results}")
    if args.quick:
        return
    predictors.write_scale(args, results, vaes, args.scale)
    unexplained = [
        section_number
        for section_number in SECTIONS
        if section_number not in REMARKS
        and not all(verdict.settled for verdict in verdicts(results, section_number))
    ]
    if unexplained:
        say(
            f"The direction is undecided or does not agree in sections {unexplained}, which have "
            "no remark; write it in REMARKS of study/sections.py"
        )
