"""What probe.py tells: a table of all measures, and of each attribute its results and pictures."""

import csv
import io
import os

import numpy as np

from common.files import writing
from common.pictures import save_grid


def slug(text):
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text).strip("-")


def write_results(bench, label, strength, scores, columns, size, args):
    """One encoder's results for each attribute, strength (A,) and columns {name: (A,)}, as a csv; of scores (N,A) on the test
    pictures, if `size`, the pictures of the highest and the lowest."""
    test, y = bench.parts[2], bench.targets
    name = f"{slug(bench.name)}-{slug(label)}"
    if columns:
        columns = dict(
            attribute=bench.attributes,
            strength=[f"{s:g}" for s in strength],
            train_positives=(y[bench.parts[0]] == 1).sum(0),
            test_positives=(y[test] == 1).sum(0),
            **columns,
        )
        text = io.StringIO()
        csv.writer(text).writerows(
            [columns, *zip(*(np.asarray(v).tolist() for v in columns.values()))]
        )
        with writing(os.path.join(args.out, f"{name}.csv")) as file:
            file.write(text.getvalue().encode())
    for a, attribute in enumerate(bench.attributes if size and args.pictures > 0 else ()):
        order = test.start + np.argsort(-scores[:, a], kind="stable")
        rows = [
            bench.load(picks, size)
            for picks in (order[: args.pictures], order[::-1][: args.pictures])
        ]
        save_grid(os.path.join(args.out, "pictures", name, f"{slug(attribute)}.png"), rows)


def lines_of_table(results, columns):
    """A block for each benchmark: its measures against the VAEs and baselines."""
    width = max(24, *(len(c) + 2 for c in columns))
    for bench, measures in results.items():
        yield f"{bench:20}" + "".join(
            c.rjust(width) for c in columns if any(c in row for row in measures.values())
        )
        for name, row in measures.items():
            cells = [
                f"{v[0]:.4f}" + (f" [{v[1]:.4f},{v[2]:.4f}]" if v[1:] else "")
                for v in map(row.get, columns)
                if v
            ]
            yield f"  {name:18}" + "".join(c.rjust(width) for c in cells)
