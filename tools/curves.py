"""Draw the curves of training runs into one PNG: a panel for each number that any of them logged
(losses, validation, probe, FID), and in it a line for each run.

    python -m tools.curves runs/a runs/b                  # curves.png
    python -m tools.curves runs/* --only flow fid --out compared.png

It reads metrics.jsonl, also that of a run in progress, and needs matplotlib (`pip install
matplotlib`).
"""

import argparse
import json
import math
import os

from common.files import UserError, writing
from common.flags import parse_flags, positive
from common.processes import run_main

# What a line of metrics.jsonl holds besides the numbers that are drawn over the step.
NOT_DRAWN = ("step", "epoch")


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", nargs="+", help="folders of runs")
    p.add_argument("--out", default="curves.png")
    p.add_argument("--only", nargs="+", metavar="NAME", help="numbers to draw (default: all)")
    p.add_argument("--columns", type=positive, default=3, help="panels in a row")
    return parse_flags(p, argv)


def read_curves(folder):
    """A run's folder -> {name of a number: (steps, values)}, in the order of their first lines.

    Raises UserError if it holds no run, or the run has logged nothing yet.
    """
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.isfile(path):
        raise UserError(f"{folder} holds no run: it has no metrics.jsonl")
    curves = {}
    with open(path) as file:
        for text in file:
            for name, step, value in read_line(text):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    if not curves:
        raise UserError(f"{path} has no numbers yet")
    return curves


def read_line(text):
    """A line of metrics.jsonl -> [(name, step, value)]; nothing of a line that is not whole yet."""
    try:
        line = json.loads(text)
        step = line["step"]
    except (ValueError, KeyError, TypeError):
        return []
    return [(name, step, value) for name, value in line.items() if name not in NOT_DRAWN]


def choose_names(all_curves, only):
    """The names to draw: those in `only`, or all that any run has logged. Speed comes last.

    Raises UserError for a name that no run has logged.
    """
    found = {name: None for curves in all_curves for name in curves}
    for name in only or ():
        if name not in found:
            raise UserError(f"--only {name}: the runs logged {', '.join(found)}")
    return only or sorted(found, key=lambda name: name == "images_per_s")


def draw_curves(runs, names, columns):
    """{label of a run: its curves} -> a matplotlib figure with a panel for each of the names."""
    from matplotlib.figure import Figure

    all_steps = [steps for curves in runs.values() for steps, _ in curves.values()]
    last_step = max(max(steps) for steps in all_steps)
    columns = min(columns, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows + 0.5), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, name in zip(panels, names, strict=False):
        for number, (label, curves) in enumerate(runs.items()):
            if name in curves:
                steps, values = curves[name]
                # A single measurement would be an invisible line.
                marker = "o" if len(steps) < 20 else None
                panel.plot(
                    steps, values, label=label, color=f"C{number}", linewidth=1, marker=marker, ms=3
                )
        panel.set_title(name)
        panel.set_xlim(0, 1.02 * last_step)
        panel.grid(alpha=0.3)
    for panel in panels[len(names) :]:
        panel.remove()
    for panel in figure.axes[-columns:]:
        panel.set_xlabel("step")
    handles = {}
    for panel in figure.axes:
        lines, labels = panel.get_legend_handles_labels()
        handles.update(zip(labels, lines, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def main():
    args = parse_arguments()
    runs = {os.path.normpath(folder): read_curves(folder) for folder in args.runs}
    names = choose_names(runs.values(), args.only)
    try:
        figure = draw_curves(runs, names, args.columns)
    except ModuleNotFoundError:
        raise UserError("curves are drawn by matplotlib: pip install matplotlib") from None
    with writing(args.out) as file:
        figure.savefig(file, format="png", dpi=120)
    print(f"written   {args.out}: {len(names)} numbers of {len(runs)} runs")


if __name__ == "__main__":
    run_main(main)
