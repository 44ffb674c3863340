"""What probe.py writes and prints: a table of all measures, and for each attribute its results and
its pictures with the highest and the lowest scores."""

import csv
import io
import os

import numpy as np

from common.files import writing
from common.pictures import save_grid


def slug(text):
    """The text as a part of a file name."""
    characters = [c if c.isalnum() or c in "._-" else "-" for c in text]
    return "".join(characters).strip("-")


def write_results(benchmark, label, strength, scores, columns, size, args):
    """Writes the results of one encoder for each of the A attributes, below args.out.

    label: names the encoder. strength: of the chosen penalties, (A,). scores: of the test pictures,
    (N,A). columns: {title: (A,)} for the .csv, or empty for none. size: side in pixels of the
    pictures with the args.pictures highest and lowest scores, or None for no pictures."""
    name = f"{slug(benchmark.name)}-{slug(label)}"
    if columns:
        write_csv(os.path.join(args.out, f"{name}.csv"), benchmark, strength, columns)
    if size is None or args.pictures <= 0:
        return
    test_start = benchmark.parts[2].start
    for attribute, score in zip(benchmark.attributes, scores.T, strict=True):
        order = test_start + np.argsort(-score, kind="stable")
        highest = benchmark.load(order[: args.pictures], size)
        lowest = benchmark.load(order[::-1][: args.pictures], size)
        path = os.path.join(args.out, "pictures", name, f"{slug(attribute)}.png")
        save_grid(path, [highest, lowest])


def write_csv(path, benchmark, strength, columns):
    """Writes a line for each attribute."""
    training, _, test = benchmark.parts
    columns = {
        "attribute": benchmark.attributes,
        "strength": [f"{value:g}" for value in strength],
        "train_positives": (benchmark.targets[training] == 1).sum(0),
        "test_positives": (benchmark.targets[test] == 1).sum(0),
        **columns,
    }
    # Python's numbers, not numpy's, are written with all their digits and nothing else.
    values = [np.asarray(column).tolist() for column in columns.values()]
    write_lines(path, columns, zip(*values, strict=True))


def write_lines(path, header, lines):
    """Writes a .csv of the titles in `header` and lines of as many values."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(lines)
    with writing(path) as file:
        file.write(text.getvalue().encode())


def lines_of_table(results, columns):
    """Yields the lines of a block for each benchmark, with a line for each of its measures.

    results: {benchmark: {measure: {column: [value] or [value, low, high]}}}. columns: all columns
    in their order, the VAEs and the baselines; a block shows those it has a value for."""
    width = max(24, *(len(column) + 2 for column in columns))
    for benchmark, measures in results.items():
        shown = [c for c in columns if any(c in values for values in measures.values())]
        yield f"{benchmark:20}" + "".join(column.rjust(width) for column in shown)
        for measure, values in measures.items():
            cells = [format_value(values.get(column)).rjust(width) for column in shown]
            yield f"  {measure:18}" + "".join(cells).rstrip()


def format_value(value):
    """The text of a table's cell for None, [value] or [value, low, high]."""
    if value is None:
        return ""
    if len(value) == 1:
        return f"{value[0]:.4f}"
    return f"{value[0]:.4f} [{value[1]:.4f},{value[2]:.4f}]"
