"""Which measure of a VAE predicts the distance of a SiT's samples: sections 8 and 14 to 16 of the
page, and study/scale.json."""

import itertools
import json
import os
from typing import NamedTuple

import numpy as np

from common.files import state_hash, writing
from common.pictures import ImageSet
from common.processes import say
from probing.correlation import correlate, pearson, spearman, varies
from probing.tables import slug
from study import figures
from study.judge import load_classifier
from study.results import (
    EDITING_MEASURES,
    IFID_MEASURES,
    JUDGE_MEASURES,
    LATENT_MEASURES,
    MEASURES,
)
from study.text import mean_and_interval, number, table_head, table_line

COLOURS = {"none": "firebrick", "control": "dimgrey", "aligned": "navy"}
LABELS = {"none": "no alignment", "control": "control", "aligned": "aligned"}

# A correlation over fewer VAEs says nothing.
MIN_VAES_TO_CORRELATE = 4
# Nor does a comparison of measures over fewer.
MIN_VAES_TO_PREDICT = 8
# Nor does a fit to fewer families.
MIN_FAMILIES_TO_FIT = 4

# VAEs that differ in one respect, or in the seed alone. Other seeds (_s1, _s2) belong to the family
# of the first. Each with its colour in the scatter plots.
FAMILIES = {
    "plain": (("plain",), "firebrick"),
    "send": (("send",), "navy"),
    "controls": (("shuffled", "base", "plain_short", "random_teacher"), "dimgrey"),
    "noise": (("no_noise", "constant_noise"), "darkorange"),
    "mapper": (("depth0", "depth2", "mlp"), "seagreen"),
    "weight": (("weight0.1", "weight0.5", "weight2"), "mediumorchid"),
    "loss": (("vavae",), "saddlebrown"),
    "scratch": (("scratch_plain", "scratch_send"), "deeppink"),
    "channels": (("plain_d8", "send_d8", "plain_d32", "send_d32"), "deepskyblue"),
    "long": (("plain_long", "send_long"), "olive"),
}

# The panels of docs/predictors.png: measure, label of its axis, factor.
PANELS = [
    ("class probe", "class probe, %", 100),
    ("Gini of density", "Gini coefficient of the density", 1),
    ("iFID", "iFID in the classifier's features", 1),
    ("rFID", "distance of reconstructions (rFID) in the classifier's features", 1),
]

# Names of the measures in study/scale.json that differ from the page's.
SCALE_NAMES = {
    "PSNR": "psnr",
    "Gini of density": "gini",
    "iFID": "ifid",
    "rFID": "rfid",
    "DCI disentanglement": "dci disentanglement",
    "DCI completeness": "dci completeness",
    "DCI informativeness": "dci informativeness",
    "SAP": "sap",
    "MIG": "mig",
}
# Sizes that all VAEs of the study have in common.
SCALE_SETTINGS = {"size": 32, "latent size": 8, "real": 10000, "probe": 10000}


def family(vae):
    """The name of a VAE's family in FAMILIES."""
    first_seed = vae.removesuffix("_s1").removesuffix("_s2")
    return next(name for name, (vaes, _) in FAMILIES.items() if first_seed in vaes)


class Table(NamedTuple):
    """What is known of the VAEs that have a distance at one SiT step."""

    step: int
    vaes: list
    # {VAE: mean over its SiTs}
    distances: dict
    # {VAE: {measure: number or None}}
    numbers: dict

    def columns(self, measure, vaes):
        """Those of `vaes` that have the measure, its values, and their distances."""
        known = [vae for vae in vaes if self.numbers[vae][measure] is not None]
        x = np.array([self.numbers[vae][measure] for vae in known])
        y = np.array([self.distances[vae] for vae in known])
        return known, x, y


def read_table(results, vaes, step):
    found = {vae: results.mean_distance(vae, step) for vae in vaes}
    distances = {vae: distance for vae, distance in found.items() if distance is not None}
    numbers = {vae: results.measures(vae) for vae in distances}
    known = [vae for vae in distances if any(n is not None for n in numbers[vae].values())]
    return Table(step, known, distances, numbers)


def figure_title(table):
    return f"Frechet distance of samples at SiT step {table.step}, a dot for each VAE"


def groups_of(results, table):
    """{"all": VAEs, "aligned": VAEs}"""
    aligned = [vae for vae in table.vaes if results.kind(vae) == "aligned"]
    return {"all": table.vaes, "aligned": aligned}


# --------------------------------------------------------------------------------------------------
# Section 8: the measures that need no decoder and no neighbours


def probe_section(results, vaes):
    """Section 8: whether the probe predicts the distance."""
    pixels = results.class_probe_without_vae()
    text = (
        "Pearson's and Spearman's correlation of each measure with the distance in the "
        "classifier's features, [95% interval over resampled VAEs], (number of VAEs). The columns "
        "*aligned* leave out the VAEs without alignment and the controls of sections 4 and 10. "
        "Paper: -0.957 (Pearson) between DeepFashion top-5 recall and gFID over six VAEs."
    )
    if pixels:
        accuracies = ", ".join(f"{label} {100 * share:.1f}%" for label, share in pixels.items())
        text += f" Class probe without a VAE: {accuracies}."
    lines = ["## 8. Does the probe predict the distance?", "", text, ""]
    for step in (results.compare_step, results.last_step):
        table = read_table(results, vaes, step)
        lines += [f"At step {step}:", "", *correlation_table(results, table), ""]
    return lines


def correlation_table(results, table):
    """Correlations of LATENT_MEASURES with the distance, over all VAEs and over the aligned
    ones."""
    groups = groups_of(results, table)
    strengths = {group: {} for group in groups}
    lines = table_head(
        "measure", "all: Pearson", "all: Spearman", "aligned: Pearson", "aligned: Spearman"
    )
    for measure in LATENT_MEASURES:
        cells = []
        for group, members in groups.items():
            found, count = correlation(table, measure, members)
            cells += correlation_cells(found, count)
            if found is not None:
                strengths[group][measure] = abs(found["Spearman"][0])
        lines.append(table_line(measure, *cells))
    return [*lines, "", *best_rankings(strengths)]


def correlation(table, measure, vaes):
    """What correlate(...) returns, or None if too few VAEs have the measure; and their number."""
    known, x, y = table.columns(measure, vaes)
    if len(known) < MIN_VAES_TO_CORRELATE:
        return None, len(known)
    return correlate(x, y, 0), len(known)


def correlation_cells(found, count):
    """The cells of Pearson's and of Spearman's correlation."""
    if found is None:
        return [f"not enough ({count})"] * 2
    return [f"{number(found[kind], '.2f')} ({count})" for kind in ("Pearson", "Spearman")]


def best_rankings(strengths):
    """strengths: {group: {measure: |Spearman|}}"""
    lines = []
    for group, strength in strengths.items():
        if strength:
            best = max(strength, key=strength.get)
            lines.append(
                f"- Best ranking of {group} VAEs (largest |Spearman|): {best}, "
                f"{strength[best]:.2f}."
            )
    return lines


def draw_probe(results, vaes, path):
    """Draws the distance over the class probe, a dot for each VAE. Returns whether there are
    enough."""
    groups = {kind: [] for kind in LABELS}
    table = read_table(results, vaes, results.compare_step)
    for vae, accuracy, distance in zip(*table.columns("class probe", table.vaes), strict=True):
        groups[results.kind(vae)].append((100 * accuracy, distance, vae))
    if sum(len(points) for points in groups.values()) < MIN_VAES_TO_CORRELATE:
        return False
    labelled = {LABELS[kind]: (COLOURS[kind], points) for kind, points in groups.items() if points}
    figures.draw_scatter(path, figure_title(table), "class probe, %", labelled)
    return True


# --------------------------------------------------------------------------------------------------
# Sections 14 and 15: iFID; disentanglement and editing


def ifid_section(results, vaes, picture_path, link):
    """Section 14: iFID of every VAE that has one, beside the distance of its reconstructions. Its
    picture goes to `picture_path`, which is `link` seen from the page."""
    lines = ["## 14. iFID: pictures between neighbours in the latents", ""]
    measured = [vae for vae in vaes if results.judged(f"{vae}-ifid", "ifid") is not None]
    if not measured:
        return [*lines, "Not measured yet.", ""]
    record = results.judged(f"{measured[0]}-ifid", "interpolation")
    steps = sorted_steps(results)
    lines += [
        "After Xu et al. (arXiv 2603.05630): each of "
        f"{record['held out']:,} test pictures is joined with one of its {record['neighbours']} "
        f"neighbours among {record['training']['pictures']:,} training pictures "
        f"({record['nearest by']}; drawn by {record['weights']}; {record['interpolation']}) and "
        "decoded. iFID is the distance of these pictures from the test pictures, rFID that of "
        "the reconstructions, both in the classifier's features. With so few pictures both are "
        "biased upwards, but for all VAEs the reference is the same. Paper: Pearson about 0.85 "
        "between iFID and gFID over 13 published VAEs, where rFID fails.",
        "",
        *table_head("VAE", "iFID", "rFID", *(f"distance, step {step}" for step in steps)),
    ]
    for vae in measured:
        line = table_line(
            vae,
            number(results.judged(f"{vae}-ifid", "ifid")),
            number(results.judged(f"{vae}-ifid", "rfid")),
            *(mean_and_interval(results.values(vae, step)) for step in steps),
        )
        lines.append(line)
    lines.append("")
    pictures = [f"{results.out}/judged/{vae}-ifid.png" for vae in ("plain", "send")]
    if figures.stack_pictures(pictures, picture_path):
        lines += [
            "Test pictures, reconstructions, interpolations and neighbours, a row each; `plain` "
            "is above `send`:",
            "",
            f"![iFID's interpolations]({link})",
            "",
        ]
    return lines


# The attribute whose edits the page shows.
DRAWN_ATTRIBUTE = "wheels"


def editing_section(results, vaes):
    """Section 15: DCI, SAP, MIG, and what an edit of one attribute changes."""
    lines = ["## 15. Disentanglement and editing", ""]
    measured = [vae for vae in vaes if results.fit(vae, "_editing") is not None]
    if not measured:
        return [*lines, "Not measured yet.", ""]
    about = results.fit(measured[0], "_editing")["editing"]
    lines += [
        "The scores of the literature, of the linear probes of the 14 attributes (docs/probing.md "
        "says how). *Own change*: how much an edit of an attribute from "
        f"{about['steps'][0]} to {about['steps'][-1]} standard deviations moves the probability "
        "of that attribute; *leakage*: the mean absolute change of the others; both by a "
        "classifier of pictures that no VAE saw (its F1 on originals is "
        f"{about['judge_f1_macro']:.2f}), a mean over {about['pictures']} test pictures. The "
        "attributes are those of classes, so many of them go together, and an edit of one moves "
        "the others with it. DCI's three numbers are disentanglement, completeness and "
        "informativeness. Intervals are not known.",
        "",
        *table_head("VAE", *EDITING_MEASURES, "leakage / own change"),
    ]
    for vae in measured:
        numbers = results.measures(vae)
        cells = [number(numbers[measure]) for measure in EDITING_MEASURES]
        cells.append(number(numbers["leakage"] / numbers["own change"]))
        lines.append(table_line(vae, *cells))
    lines.append("")
    pictures = [edited_picture(results, vae) for vae in ("plain", "send")]
    if figures.stack_pictures(pictures, "docs/editing.png"):
        lines += [
            f"*{DRAWN_ATTRIBUTE}*, from -3 to +3 standard deviations; `plain` is above `send`:",
            "",
            "![edits](docs/editing.png)",
            "",
        ]
    return lines


def edited_picture(results, vae):
    """The path of probe.py's picture of the edits of DRAWN_ATTRIBUTE."""
    folder = f"{results.out}/probe_{vae}_editing/edits"
    label = slug(f"{results.out}/vae_{vae}")
    return f"{folder}/attributes-{label}/{DRAWN_ATTRIBUTE}.png"


# --------------------------------------------------------------------------------------------------
# What a measure costs


def cost(results, vaes, measure):
    """Processor seconds of a measure, the median over those VAEs whose results record it, or
    None. The encoding of the pictures that it needs is part of it."""
    found = [cost_of_vae(results, vae, measure) for vae in vaes]
    found = [seconds for seconds in found if seconds is not None]
    return float(np.median(found)) if found else None


def cost_of_vae(results, vae, measure):
    if measure in IFID_MEASURES:
        # An iFID from latents that stage 2 has kept costs less, and is no example.
        record = results.judged(f"{vae}-ifid", "interpolation")
        if record is None or record["latents"] != "encoded":
            return None
        if measure == "iFID":
            return results.judged(f"{vae}-ifid", "processor_seconds")
    spent = results.judged(vae, "processor_seconds")
    if spent is None:
        return None
    if measure in ("PSNR", "rFID"):
        return spent["encoding"] + spent["decoding"]
    if measure in JUDGE_MEASURES:
        return spent["encoding"]
    own, pictures = cost_of_probe(results, vae, measure)
    if own is None:
        return None
    return own + pictures * spent["encoding"] / results.judged(vae, "pictures")


def cost_of_probe(results, vae, measure):
    """Processor seconds of a measure of probe.py beside the encoding, and how many pictures it
    needs encoded; None, None where the result does not record it."""
    task, suffix = {
        "class probe": ("probe", ""),
        "attribute F1": ("probe", "_attributes"),
        "Gini of density": ("uniformity", ""),
        "mixture of 8": ("mixture", ""),
        "own change": ("editing", "_editing"),
        "leakage": ("editing", "_editing"),
    }.get(measure, ("disentanglement", "_editing"))
    about = results.fit(vae, suffix)
    if about is None or "processor_seconds" not in about:
        return None, None
    seconds = about["processor_seconds"]
    if task in ("uniformity", "mixture"):
        return seconds[task], about["uniformity"]["points"]
    # What builds on the probe needs the probe, too.
    own = seconds["probe"]
    if task != "probe":
        own += seconds[task]
    return own, results.probe_pictures(vae, suffix)


# --------------------------------------------------------------------------------------------------
# Section 16: what predicts


def prediction_section(results, vaes):
    """Section 16: every measure against the distance, and the best of them."""
    lines = ["## 16. What predicts the distance?", ""]
    tables = [read_table(results, vaes, step) for step in sorted_steps(results)]
    tables = [table for table in tables if len(table.vaes) >= MIN_VAES_TO_PREDICT]
    if not tables:
        text = (
            f"Fewer than {MIN_VAES_TO_PREDICT} VAEs have been measured, too few for an answer. "
            "Cost of each measure: seconds on one core, with the encoding of the pictures that it "
            "needs, the median over VAEs."
        )
        return [*lines, text, "", *cost_table(results, vaes), ""]
    lines += [
        "As in section 8: correlations with the distance in the classifier's features, [95% "
        "interval over resampled VAEs], (number of VAEs). *Without a family*: from the weakest to "
        "the strongest of the correlations over all VAEs but those of one family. The families "
        f"are {family_list(vaes)}; other seeds of a VAE are in its family. Cost: seconds on one "
        "core, with the encoding of the pictures that the measure needs, the median over VAEs.",
        "",
    ]
    for table in tables:
        lines += [f"At step {table.step}:", "", *prediction_table(results, table, vaes), ""]
        lines += two_sits(results, table)
    lines += [
        "Which measures predict a VAE of a family that they have not seen? A straight line, or a "
        "plane in two standardised measures, is fitted to all other families. Error: root mean "
        "square over the VAEs; ranks: Spearman's correlation of the predictions with the "
        "distances. The best of many are best partly by chance; *chosen anew* therefore leaves "
        "the choice, too, to the other families. Costs of a pair are added.",
        "",
    ]
    for table in tables:
        for group, members in groups_of(results, table).items():
            lines += fit_lines(results, table, group, members)
    return lines


def cost_table(results, vaes):
    lines = table_head("measure", "cost, s")
    for measure in MEASURES:
        lines.append(table_line(measure, number(cost(results, vaes, measure), ".2g")))
    return lines


def sorted_steps(results):
    return sorted({results.compare_step, results.last_step})


def family_list(vaes):
    """The families that have any of these VAEs, as text."""
    present = {family(vae) for vae in vaes}
    texts = []
    for name, (members, _) in FAMILIES.items():
        if name in present:
            texts.append(f"*{name}* ({', '.join(members)})")
    return ", ".join(texts)


def prediction_table(results, table, vaes):
    groups = groups_of(results, table)
    lines = table_head(
        "measure",
        "cost, s",
        "all: Pearson",
        "all: Spearman",
        "without a family: Pearson",
        "without a family: Spearman",
        "aligned: Pearson",
        "aligned: Spearman",
    )
    for measure in MEASURES:
        cells = [number(cost(results, vaes, measure), ".2g")]
        cells += correlation_cells(*correlation(table, measure, groups["all"]))
        cells += [
            without_family_cell(table, measure, pearson),
            without_family_cell(table, measure, spearman),
        ]
        cells += correlation_cells(*correlation(table, measure, groups["aligned"]))
        lines.append(table_line(measure, *cells))
    return lines


def two_sits(results, table):
    """A sentence on how closely the distances of two SiT seeds follow each other, which is what a
    measure can be held against; nothing if too few VAEs have two."""
    agreements = []
    for group, members in groups_of(results, table).items():
        found = agreement_of_sits(results, members, table.step)
        if found is not None:
            pearsons, spearmans = found
            agreements.append(f"{pearsons:.2f} and {spearmans:.2f} over {group} VAEs")
    if not agreements:
        return []
    return [
        "Beside these: the distances of two SiTs on the same VAE, which differ in the seed alone, "
        f"have a correlation (Pearson, Spearman) of {', '.join(agreements)}, in the mean over "
        "pairs of seeds.",
        "",
    ]


def agreement_of_sits(results, vaes, step):
    """-> the means of Pearson's and of Spearman's correlation between the distances of two SiT
    seeds over the VAEs that have both, or None if too few have two."""
    by_seed = {vae: results.by_sit_seed(vae, step) for vae in vaes}
    seeds = sorted(set().union(*by_seed.values()))
    found = []
    for a, b in itertools.combinations(seeds, 2):
        both = [values for values in by_seed.values() if a in values and b in values]
        if len(both) < MIN_VAES_TO_CORRELATE:
            continue
        x, y = np.array([[values[a], values[b]] for values in both]).T
        if varies(x) and varies(y):
            found.append((pearson(x, y), spearman(x, y)))
    return np.mean(found, axis=0) if found else None


def without_family_cell(table, measure, function):
    """The weakest and the strongest correlation over all VAEs but those of one family, as text."""
    found = correlations_without_families(table, measure, function)
    if not found:
        return "-"
    # The weakest is the one that says least for the sign that all VAEs together have.
    _, x, y = table.columns(measure, table.vaes)
    sign = np.sign(function(x, y))
    weakest = min(found, key=lambda name: sign * found[name])
    strongest = max(found, key=lambda name: sign * found[name])
    return (
        f"{found[weakest]:.2f} (without {weakest}) to {found[strongest]:.2f} (without {strongest})"
    )


def correlations_without_families(table, measure, function):
    """{family: the correlation over all VAEs but its own}, where enough of them are left."""
    known, x, y = table.columns(measure, table.vaes)
    families = np.array([family(vae) for vae in known])
    found = {}
    for name in dict.fromkeys(families.tolist()):
        kept = families != name
        enough = kept.sum() >= MIN_VAES_TO_CORRELATE
        if enough and varies(x[kept]) and varies(y[kept]):
            found[name] = float(function(x[kept], y[kept]))
    return found


# --------------------------------------------------------------------------------------------------
# Fits


def predict_left_out(x, y, families):
    """Predictions of y (n,) for each family by least squares on all other families.

    x: (n,k), with any k, also 0, where the prediction is the mean of the others. families: (n,)
    """
    predictions = np.empty(len(y))
    for name in np.unique(families):
        out = families == name
        mean = x[~out].mean(0)
        deviation = x[~out].std(0)
        standard = (x - mean) / np.where(deviation > 0, deviation, 1)
        design = np.column_stack([np.ones(len(y)), standard])
        weights = np.linalg.lstsq(design[~out], y[~out], rcond=None)[0]
        predictions[out] = design[out] @ weights
    return predictions


def error_of(predictions, y):
    """Root mean square error."""
    return float(np.sqrt(np.mean(np.square(predictions - y))))


def best_choice(x, y, families, choices):
    """That of the choices, tuples of columns of x, whose predictions of left-out families have the
    lowest error."""
    errors = [error_of(predict_left_out(x[:, c], y, families), y) for c in map(list, choices)]
    return choices[int(np.argmin(errors))]


def predict_with_choice(x, y, families, choices):
    """Predictions (n,) of each family by the best choice among the other families."""
    predictions = np.empty(len(y))
    for name in np.unique(families):
        out = families == name
        chosen = list(best_choice(x[~out], y[~out], families[~out], choices))
        predictions[out] = predict_left_out(x[:, chosen], y, families)[out]
    return predictions


def fit_lines(results, table, group, members):
    """The table of the best single measures and pairs for the VAEs of a group that have all
    measures, and a sentence on the best ones."""
    complete = [vae for vae in members if all(table.numbers[vae][m] is not None for m in MEASURES)]
    families = np.array([family(vae) for vae in complete])
    title = f"Step {table.step}, {group} VAEs ({len(complete)} with all measures)"
    if len(set(families)) < MIN_FAMILIES_TO_FIT:
        count = len(set(families))
        return [f"{title}: not enough families ({count}) for a fit.", ""]
    x = np.array([[table.numbers[vae][measure] for measure in MEASURES] for vae in complete])
    y = np.array([table.distances[vae] for vae in complete])
    singles = [(k,) for k in range(len(MEASURES))]
    pairs = list(itertools.combinations(range(len(MEASURES)), 2))
    # The ranks of the mean of the others mean nothing, so it has none.
    baseline = error_of(predict_left_out(x[:, :0], y, families), y)
    rows = []
    best = {}
    for label, choices in (("single", singles), ("pair", pairs)):
        ranked = sorted(choices, key=lambda c: choice_error(x, y, families, c))
        best[label] = ranked[0]
        for choice in ranked[:3]:
            rows.append(fit_row(results, x, y, families, choice, complete))
        rows.append(
            (
                f"best {label}, chosen anew",
                predict_with_choice(x, y, families, choices),
                None,
            )
        )
    lines = [f"{title}:", "", *table_head("predictor", "error", "ranks", "cost, s")]
    lines.append(table_line("none: the mean of the others", f"{baseline:.2f}", "-", "-"))
    for label, predictions, seconds in rows:
        error = f"{error_of(predictions, y):.2f}"
        lines.append(table_line(label, error, rank_cell(predictions, y), number(seconds, ".2g")))
    names = {label: " and ".join(MEASURES[k] for k in choice) for label, choice in best.items()}
    lines += ["", f"Best single measure: {names['single']}. Best pair: {names['pair']}.", ""]
    return lines


def choice_error(x, y, families, choice):
    return error_of(predict_left_out(x[:, list(choice)], y, families), y)


def fit_row(results, x, y, families, choice, vaes):
    """(label, predictions, cost or None) of one choice of measures."""
    measures = [MEASURES[k] for k in choice]
    costs = [cost(results, vaes, measure) for measure in measures]
    total = None if None in costs else sum(costs)
    return " and ".join(measures), predict_left_out(x[:, list(choice)], y, families), total


def rank_cell(predictions, y):
    if not varies(predictions) or not varies(y):
        return "-"
    return f"{spearman(predictions, y):.2f}"


# --------------------------------------------------------------------------------------------------
# The figure, and the scale


def draw_predictors(results, vaes, path):
    """Draws the distance at the last step over each of PANELS, a dot for each VAE, coloured by
    family. Returns whether there are enough."""
    table = read_table(results, vaes, results.last_step)
    panels = []
    for measure, label, factor in PANELS:
        groups = {}
        known, x, y = table.columns(measure, table.vaes)
        for vae, value, distance in zip(known, factor * x, y, strict=True):
            _, points = groups.setdefault(family(vae), (FAMILIES[family(vae)][1], []))
            points.append((value, distance, vae))
        if len(known) < MIN_VAES_TO_PREDICT:
            return False
        panels.append((label, groups))
    figures.draw_panels(path, figure_title(table), panels)
    return True


def write_scale(args, results, vaes, path):
    """Writes the measures of the study's VAEs as a scale for others, with what identifies the
    pictures and the classifier. Without these nothing is written."""
    classifier = f"{results.out}/classifier.pt"
    measured = [vae for vae in vaes if results.judged(vae, "psnr") is not None]
    if not measured:
        return
    if not os.path.isdir(f"{args.data}/test") or not os.path.exists(classifier):
        say(f"not written {path}: it needs {args.data}/test and {classifier}")
        return
    scale = {
        "data": ImageSet(f"{args.data}/test").fingerprint,
        "classifier": state_hash(load_classifier(classifier).state_dict()),
        "settings": scale_settings(results, measured),
        "vaes": {vae: scale_entry(results, vae) for vae in measured},
    }
    with writing(path) as file:
        file.write((json.dumps(scale, indent=1) + "\n").encode())
    say(f"written   {path}")


def scale_settings(results, vaes):
    """What the numbers of study/scale.json depend on, besides the VAE; and what they cost in
    seconds."""
    settings = {**SCALE_SETTINGS, "held out": results.judged(vaes[0], "pictures")}
    for vae in vaes:
        record = results.judged(f"{vae}-ifid", "interpolation")
        if record is not None:
            settings["interpolated with"] = record["training"]["pictures"]
            for name in ("neighbours", "nearest by", "weights", "interpolation", "seed"):
                settings[name] = record[name]
    costs = {measure: cost(results, vaes, measure) for measure in MEASURES}
    settings["seconds"] = {
        SCALE_NAMES.get(measure, measure): seconds for measure, seconds in costs.items()
    }
    return settings


def scale_entry(results, vae):
    """{name: number or None} of one VAE, and the hash of its weights."""
    entry = {"kind": results.kind(vae), "family": family(vae), "hash": results.weights_hash(vae)}
    for measure, value in results.measures(vae).items():
        entry[SCALE_NAMES.get(measure, measure)] = value
    entry["ssim"] = results.judged(vae, "ssim")
    entry["floor"] = results.judged(vae, "reconstruction_classifier")
    for step in sorted_steps(results):
        entry[f"distance {step}"] = results.mean_distance(vae, step)
    return entry
