"""Readers of published benchmarks as they are distributed, for probe.py: CelebA, DeepFashion, AwA2, any folder in CelebA's
form, and image folders of classes. README.md says where to get each, and how its folder looks."""

import glob
import hashlib
import os

import numpy as np
import torch

from common.files import UserError
from common.pictures import IMAGE_TYPES, ImageSet, load_image


class Benchmark:
    """names: paths below `folder`, sorted by split; parts: slices of the training, validation and test pictures;
    targets: int8 (N,A) of 1, 0, or -1 for unknown, or classes int64 (N,); attributes: their names; about: for the record."""

    def __init__(self, name, folder, names, split, targets, attributes, args):
        self.name, self.folder, self.attributes, split = (
            name,
            folder,
            list(attributes),
            np.array(split),
        )
        paths = [os.path.join(folder, n) for n in names]
        size = np.array([os.path.getsize(p) if os.path.isfile(p) else -1 for p in paths])
        missing = np.flatnonzero(size < 0)
        if len(missing) and not args.skip_missing:
            raise UserError(
                f"{len(missing)} annotated pictures are not in {folder}, the first is {names[missing[0]]}; "
                "complete the data set, or leave them out with --skip-missing"
            )
        keep = [np.flatnonzero((split == k) & (size >= 0)) for k in range(3)]
        keep[0] = np.sort(
            np.random.default_rng(args.seed).permutation(keep[0])[: max(0, args.train_images)]
        )
        if not all(map(len, keep)):
            counts = ", ".join(str(len(k)) for k in keep)
            raise UserError(
                f"{name}: {folder} gives {counts} pictures for training, validation and test"
            )
        ends = np.cumsum([0, *map(len, keep)]).tolist()
        self.parts, keep = [slice(*pair) for pair in zip(ends, ends[1:])], np.concatenate(keep)
        self.names, self.targets, self.skipped = (
            [names[i] for i in keep],
            np.asarray(targets)[keep],
            len(missing),
        )
        lines = "\n".join(f"{names[i]} {size[i]}" for i in keep)
        self.fingerprint = hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:16]
        self.about = dict(
            folder=folder,
            fingerprint=self.fingerprint,
            pictures=[p.stop - p.start for p in self.parts],
            skipped=self.skipped,
            attributes=len(self.attributes),
        )

    def load(self, index, size):
        """Indices -> uint8 (n,3,size,size)."""
        rows = [load_image(os.path.join(self.folder, self.names[i]), size) for i in index]
        return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)


def read_lines(path):
    """(number, text) of the lines that are not empty; Windows line ends and a byte order mark are dropped."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from (
                (number, line.strip()) for number, line in enumerate(file, 1) if line.strip()
            )
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_table(path, meaning, columns=None):
    """<picture> <value> ... lines, spaces or (csv) commas between -> {picture: int8 (A,)} and the columns' names. `meaning`:
    a value's text -> 1, 0 or -1. Above them may stand their number and the columns' names."""
    rows, count, comma = {}, None, "," if path.endswith(".csv") else None
    for number, line in read_lines(path):
        picture, *values = words = [w.strip() for w in line.split(comma)]
        if not rows and line.isdecimal() and len(line) < 16:
            count = int(line)
        elif not rows and number <= 2 and words[-1] not in meaning:
            columns = columns or (
                values if comma else words
            )  # a csv names the picture's column too
        else:
            columns = columns or [str(k) for k in range(len(values))]  # a list without names
            wrong = [f"'{w}' is none of {', '.join(meaning)}" for w in values if w not in meaning]
            if picture in rows:
                wrong.append(f"{picture} stands there twice")
            if not values or len(values) != len(columns):
                wrong.append(f"{len(values)} values instead of {len(columns or '1')}")
            if wrong:
                raise UserError(f"{path}, line {number}: {wrong[0]}")
            rows[picture] = np.fromiter(map(meaning.get, values), np.int8, len(values))
    if not rows or count not in (None, len(rows)):
        raise UserError(
            f"{path} lists {len(rows)} pictures"
            + (f", its first line says {count}" if count else "")
        )
    return rows, columns


def read_partition(path, meaning):
    return {n: int(v[0]) for n, v in read_table(path, meaning, ["partition"])[0].items()}


def read_attributes(name, folder, path, partition, columns, args):
    """Benchmark from a file of attributes and {picture: split}, which must agree."""
    rows, columns = read_table(path, {"1": 1, "-1": -1, "0": 0}, columns)
    odd = [n for n in partition if n not in rows] or [n for n in rows if n not in partition]
    if odd:
        raise UserError(
            f"{path} and the partition differ in {len(odd)} pictures, the first is {odd[0]}"
        )
    values = np.stack([rows[n] for n in partition])
    if (values == -1).any():  # where a file has -1 for no, its 0 means unknown
        values = np.where(values == 1, 1, -1 - values).astype(np.int8)
    return Benchmark(name, folder, list(partition), list(partition.values()), values, columns, args)


def first_of(root, *paths):
    found = [p for p in (os.path.join(root, path) for path in paths) if os.path.exists(p)]
    if not found:
        raise UserError(f"{root} has no {' or '.join(paths)}")
    return found[0]


def seeded_split(labels, test, seed):
    """split (N,): 2 where `test`, or if that is None in a seeded fifth of each label; of the others a tenth of each label
    1, the rest 0."""
    split = np.zeros(len(labels), int) if test is None else np.where(test, 2, 0)
    for value, share in ((2, 0.2), (1, 0.1)) if test is None else ((1, 0.1),):
        for label in np.unique(labels[split == 0]):
            here = np.random.default_rng([seed, value, label]).permutation(
                np.flatnonzero((labels == label) & (split == 0))
            )
            split[here[: max(1, round(share * len(here)))]] = value
    return split


def read_celeba(root, args):
    notes = first_of(
        root, *(f"{d}list_attr_celeba.{e}" for e in ("txt", "csv") for d in ("", "Anno/"))
    )
    parts = first_of(
        root, *(f"{d}list_eval_partition.{e}" for e in ("txt", "csv") for d in ("", "Eval/"))
    )
    folder = first_of(
        root, "img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba", "."
    )
    partition = read_partition(parts, {"0": 0, "1": 1, "2": 2})
    return read_attributes(os.path.basename(root), folder, notes, partition, None, args)


def read_deepfashion(root, args):
    fine = os.path.basename(root) == "Anno_fine"  # named by itself: its 26 attributes, not the 1000
    root = os.path.dirname(root) if fine else root
    notes = (
        os.path.join(root, "Anno_fine")
        if fine
        else first_of(root, "Anno_coarse", "Anno_fine", "Anno")
    )
    lines = [line for _, line in read_lines(first_of(notes, "list_attr_cloth.txt"))]
    columns = [
        line.rsplit(None, 1)[0] for line in lines[2:]
    ]  # "<name> <type>"; a name may hold spaces
    if not columns or lines[0] != str(len(columns)):
        raise UserError(
            f"{notes}/list_attr_cloth.txt lists {len(columns)} attributes, its first line is {lines[:1]}"
        )
    lists = [os.path.join(notes, f"{k}.txt") for k in ("train", "val", "test")]
    if all(map(os.path.isfile, lists)):  # Anno_fine's own splits, of a part of the pictures
        partition = {line: k for k, path in enumerate(lists) for _, line in read_lines(path)}
    else:
        parts = first_of(root, "Eval/list_eval_partition.txt", "list_eval_partition.txt")
        partition = read_partition(parts, dict(train=0, val=1, test=2))
    name = os.path.basename(root) + (" fine" if notes.endswith("fine") else "")
    folder = os.path.dirname(first_of(root, "Img/img", "img"))
    return read_attributes(
        name, folder, first_of(notes, "list_attr_img.txt"), partition, columns, args
    )


def read_awa2(root, args):
    def column(file):
        return [line.split()[-1] for _, line in read_lines(first_of(root, file))]

    classes, attributes = column("classes.txt"), column("predicates.txt")
    matrix = [line.split() for _, line in read_lines(first_of(root, "predicate-matrix-binary.txt"))]
    bad = [
        f"line {i} is not {len(attributes)} times 0 or 1"
        for i, row in enumerate(matrix, 1)
        if len(row) != len(attributes) or set(row) - {"0", "1"}
    ]
    if len(matrix) != len(classes) or len(set(classes)) != len(classes):
        bad.append(
            f"{len(matrix)} lines for {len(classes)} classes, {len(set(classes))} of them different"
        )
    if bad:
        raise UserError(f"{root}/predicate-matrix-binary.txt: {bad[0]}")
    names = [
        f"{c}/{f}"
        for c in classes
        for f in sorted(os.listdir(first_of(root, f"JPEGImages/{c}/")))
        if f.lower().endswith(IMAGE_TYPES)
    ]
    label = np.array([classes.index(name.split("/")[0]) for name in names])
    chosen = column("testclasses.txt") if args.zero_shot else []
    if set(chosen) - set(classes):
        raise UserError(
            f"{root}/testclasses.txt: '{sorted(set(chosen) - set(classes))[0]}' is not in classes.txt"
        )
    test = np.isin(np.array(classes)[label], chosen) if args.zero_shot else None
    return Benchmark(
        os.path.basename(root) + (" zero-shot" if args.zero_shot else ""),
        os.path.join(root, "JPEGImages"),
        names,
        seeded_split(label, test, args.seed),
        np.array(matrix, np.int8)[label],
        attributes,
        args,
    )


def read_classes(root, args):
    """An image folder: its train and val (or test), or, where it has no such parts, a seeded fifth as the test."""
    held_out = [
        d for d in (os.path.join(root, part) for part in ("val", "test")) if os.path.isdir(d)
    ]
    sets = [ImageSet(folder) for folder in [first_of(root, "train", "."), *held_out[:1]]]
    if sets[0].classes != sets[-1].classes or len(sets[0].classes) < 2:
        raise UserError(
            f"{root}: {len(sets[0].classes)} class folders for training, {len(sets[-1].classes)} to test; "
            "two or more are needed, the same in both (ImageNet's validation pictures have to be sorted)"
        )
    label = np.concatenate([s.labels for s in sets])
    test = np.arange(len(label)) >= len(sets[0]) if held_out else None
    names = [
        os.path.join(os.path.relpath(s.root, root), os.fsdecode(n)) for s in sets for n in s.names
    ]
    return Benchmark(
        f"{os.path.basename(root)} classes",
        root,
        names,
        seeded_split(label, test, args.seed),
        label,
        sets[0].classes,
        args,
    )


READERS = {
    "list_attr_celeba.*": read_celeba,
    "Anno/list_attr_celeba.*": read_celeba,
    "Anno*/list_attr_img.txt": read_deepfashion,
    "list_attr_img.txt": read_deepfashion,
    "predicate-matrix-binary.txt": read_awa2,
}


def read_folder(root, args):
    """What the tasks need of one folder: its attributes, and classes if they are asked for or it has nothing else."""
    root = os.path.abspath(root)
    readers = [
        r for name, r in READERS.items() if glob.glob(os.path.join(glob.escape(root), name))
    ][:1]
    readers = [] if args.task == ["classes"] else readers
    if "classes" in args.task or not readers and "attributes" not in args.task:
        readers += [read_classes] if args.data or os.path.isdir(os.path.join(root, "train")) else []
    if args.data and not readers:
        raise UserError(
            f"{root} has no annotations in CelebA's, DeepFashion's or AwA2's form ({', '.join(READERS)}); "
            "for an image folder give --task classes"
            if os.path.isdir(root)
            else f"{root}: no such folder"
        )
    return [read(root, args) for read in readers]


def read_benchmarks(args):
    """All of --data, or else of data/, or else the demo's."""
    found = [
        bench
        for root in args.data or sorted(glob.glob("data/*"))
        for bench in read_folder(root, args)
    ]
    found = found or read_folder(os.path.join("runs", "demo", "pictures"), args)
    if not found:
        raise UserError(
            "no benchmark under data/; name one with --data, or make a small one with `python demo.py`"
        )
    names = [b.name for b in found]
    for bench in found:  # two folders of one name would share a line of the table
        bench.name = bench.name if names.count(bench.name) == 1 else f"{bench.name} {bench.folder}"
    return found
