"""Readers of published benchmarks in the form in which they are distributed, for probe.py.

CelebA, DeepFashion and AwA2 have attributes; so has any folder with CelebA's two files. Any image
folder has classes. docs/probing.md says where to get each benchmark and how its folder is laid out.

A reader takes the benchmark's folder and the command's arguments and returns a Benchmark. READERS,
near the end, says which reader is used for which folder.
"""

import glob
import os

import numpy as np
import torch

from common.contents import fingerprint_of, sizes_and_checksums
from common.files import UserError
from common.pictures import IMAGE_TYPES, ImageSet, load_image

# The splits by their numbers, which are those of CelebA's file.
TRAINING, VALIDATION, TEST = range(3)

# --------------------------------------------------------------------------------------------------
# What every reader returns


class Benchmark:
    """The pictures of a benchmark, sorted by split, and their targets.

    name: stands in tables and file names.
    folder, names: the pictures are the files folder/name. First come those of the training split,
    then validation, then test.
    parts: the three slices of the training, validation and test pictures.
    targets: attributes, int8 (N,A) of 1, 0, and -1 for unknown; or classes, int64 (N,).
    attributes: list of A names, or of the classes' names.
    skipped: number of annotated pictures that are absent.
    fingerprint: 16 hexadecimal digits, of the files' names, sizes and ends in their order. Cached
    features are found by it.
    about: what result.json records."""

    def __init__(self, name, folder, names, split, targets, attributes, args, sets=()):
        """names, split (N,), targets (N,A) or (N,): all annotated pictures in any order, with 0, 1
        or 2 for training, validation or test. sets: the ImageSets that
        hold them one after the other, if any.

        Of the training pictures, a choice of at most args.train_images is kept, and of the other
        two splits at most args.test_images each. The choice depends on args.seed alone. Raises
        UserError if a picture is absent, unless args.skip_missing is set, and if a split is empty.
        """
        split = np.array(split)
        if sets:
            sources = [data.source(i) for data in sets for i in range(len(data))]
            sizes = np.concatenate([data.sizes for data in sets])
            checksums = np.concatenate([data.checksums for data in sets])
        else:
            sources = [os.path.join(folder, name) for name in names]
            sizes, checksums = sizes_and_checksums(folder, names)
        missing = np.flatnonzero(sizes < 0)
        if len(missing) > 0 and not args.skip_missing:
            raise UserError(
                f"{len(missing)} annotated pictures are not in {folder}, the first is "
                f"{names[missing[0]]}; complete the data set, or leave them out with --skip-missing"
            )

        training, validation, test = (
            np.flatnonzero((split == part) & (sizes >= 0)) for part in (TRAINING, VALIDATION, TEST)
        )
        training = choose(training, args.train_images, args.seed)
        validation = choose(validation, args.test_images, args.seed)
        test = choose(test, args.test_images, args.seed)
        counts = [len(training), len(validation), len(test)]
        if 0 in counts:
            raise UserError(
                f"{name}: {folder} gives {', '.join(map(str, counts))} pictures for training, "
                "validation and test; each of them needs at least one"
            )
        order = np.concatenate([training, validation, test])
        training_end, validation_end, end = np.cumsum(counts).tolist()

        self.name = name
        self.folder = folder
        self.names = [names[i] for i in order]
        self.sources = [sources[i] for i in order]
        self.parts = [
            slice(0, training_end),
            slice(training_end, validation_end),
            slice(validation_end, end),
        ]
        self.targets = np.asarray(targets)[order]
        self.attributes = list(attributes)
        self.skipped = len(missing)
        self.fingerprint = fingerprint_of(self.names, sizes[order], checksums[order])
        self.about = {
            "folder": folder,
            "fingerprint": self.fingerprint,
            "pictures": counts,
            "skipped": self.skipped,
            "attributes": len(self.attributes),
        }

    def load(self, indices, size):
        """Indices of n pictures -> uint8 (n,3,size,size)."""
        pictures = np.stack([load_image(self.sources[i], size) for i in indices])  # (n,size,size,3)
        return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def choose(indices, count, seed):
    """A seeded choice of at most `count` of some indices (n,), in their order."""
    shuffled = np.random.default_rng(seed).permutation(indices)
    return np.sort(shuffled[: max(0, count)])


# --------------------------------------------------------------------------------------------------
# Tools of the readers


def first_of(root, *paths):
    """The first of several paths below root that exists. Raises UserError if none does."""
    for path in paths:
        full_path = os.path.join(root, path)
        if os.path.exists(full_path):
            return full_path
    raise UserError(f"{root} has no {' or '.join(paths)}")


def read_lines(path):
    """Yields (line number, text) of each line of a text file that is not empty. Spaces at its ends,
    Windows line ends and a byte order mark are dropped."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                text = line.strip()
                if text:
                    yield number, text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_table(path, meaning, columns=None):
    """Reads a file with a line `<picture> <value> <value> ...` for each picture. Between the words
    are spaces, or commas if the file is a .csv.

    Above these lines there may be a line with the number of pictures, and one with the names of
    the columns. `columns`, if given, are the names whatever the file says. If there are no names at
    all, the columns are numbered.

    meaning: {text of a value: its number}, with numbers that fit into int8
    -> {picture: int8 (A,)} in the file's order, and the list of the A columns' names

    Raises UserError for a line that does not fit, and for a wrong number of lines."""
    is_csv = path.endswith(".csv")
    table = {}
    stated_count = None
    for number, line in read_lines(path):
        words = split_words(line, is_csv)
        picture, values = words[0], words[1:]
        if not table:
            # This line may still be one of the two above the pictures.
            if line.isdecimal() and len(line) < 16:
                stated_count = int(line)
                continue
            if number <= 2 and words[-1] not in meaning:
                if not columns:
                    # The first name of a .csv is that of the column of pictures.
                    columns = values if is_csv else words
                continue
        if not columns:
            columns = list(map(str, range(len(values))))
        if picture in table:
            raise UserError(f"{path}, line {number}: {picture} is listed twice")
        table[picture] = numbers_of(values, meaning, columns, f"{path}, line {number}")
    if stated_count not in (None, len(table)):
        raise UserError(
            f"{path} lists {len(table)} pictures, but its first line says {stated_count}: "
            "it is incomplete or damaged"
        )
    if not table:
        raise UserError(f"{path} lists 0 pictures")
    return table, columns


def split_words(line, is_csv):
    if is_csv:
        return [word.strip() for word in line.split(",")]
    return line.split()


def numbers_of(values, meaning, columns, place):
    """A list of one text for each column -> their numbers, int8 (A,). Raises UserError, which names
    the place in the file, if there are fewer or more of them, or one has no meaning."""
    for value in values:
        if value not in meaning:
            raise UserError(f"{place}: '{value}' is not one of {', '.join(meaning)}")
    expected = max(1, len(columns))
    if len(values) != expected:
        raise UserError(f"{place}: {len(values)} values instead of {expected}")
    return np.array([meaning[value] for value in values], np.int8)


def read_partition(path, meaning):
    """A file with a line `<picture> <split>` for each picture -> {picture: number of its split}."""
    table, _ = read_table(path, meaning, ["partition"])
    return {picture: int(numbers[0]) for picture, numbers in table.items()}


def read_attributes(name, folder, path, partition, columns, args):
    """-> Benchmark from a file of attributes, as read_table reads it, and {picture: number of its
    split}. Raises UserError if the two do not list the same pictures."""
    table, columns = read_table(path, {"1": 1, "-1": -1, "0": 0}, columns)
    differing = [picture for picture in partition if picture not in table]
    if not differing:
        differing = [picture for picture in table if picture not in partition]
    if differing:
        raise UserError(
            f"{path} and the partition into training, validation and test differ in "
            f"{len(differing)} pictures, the first is {differing[0]}"
        )
    targets = np.stack([table[picture] for picture in partition])
    if (targets == -1).any():
        # A file with -1 means no by it, and unknown by 0. A file without means no by 0.
        is_no = targets == -1
        targets[targets == 0] = -1
        targets[is_no] = 0
    split = list(partition.values())
    return Benchmark(name, folder, list(partition), split, targets, columns, args)


def move_share(split, labels, part, share, seed):
    """Moves a seeded share of each label's training pictures, at least one, to another part: it
    changes split (N,) where it is TRAINING."""
    for label in np.unique(labels[split == TRAINING]):
        candidates = np.flatnonzero((labels == label) & (split == TRAINING))
        shuffled = np.random.default_rng([seed, part, label]).permutation(candidates)
        count = max(1, round(share * len(candidates)))
        split[shuffled[:count]] = part


def seeded_split(labels, is_test, seed):
    """A split for pictures of which no split, or only a test split, is published.

    labels: int (N,). is_test: bool (N,), or None: then a fifth of each label's pictures are the
    test split. A tenth of each label's other pictures are the validation split.
    -> int (N,) of 0 training, 1 validation, 2 test"""
    split = np.full(len(labels), TRAINING)
    if is_test is None:
        move_share(split, labels, TEST, 0.2, seed)
    else:
        split[is_test] = TEST
    move_share(split, labels, VALIDATION, 0.1, seed)
    return split


# --------------------------------------------------------------------------------------------------
# CelebA, and any folder with CelebA's two files


def read_celeba(root, args):
    """The files are where the authors' archive has them, or directly in the folder, or those of the
    copy at Kaggle, which are .csv."""
    attributes = first_of(
        root,
        "list_attr_celeba.txt",
        "Anno/list_attr_celeba.txt",
        "list_attr_celeba.csv",
        "Anno/list_attr_celeba.csv",
    )
    splits = first_of(
        root,
        "list_eval_partition.txt",
        "Eval/list_eval_partition.txt",
        "list_eval_partition.csv",
        "Eval/list_eval_partition.csv",
    )
    folder = first_of(
        root,
        "img_align_celeba/img_align_celeba",
        "img_align_celeba",
        "Img/img_align_celeba",
        ".",
    )
    partition = read_partition(splits, {"0": TRAINING, "1": VALIDATION, "2": TEST})
    return read_attributes(os.path.basename(root), folder, attributes, partition, None, args)


# --------------------------------------------------------------------------------------------------
# DeepFashion, Category and Attribute Prediction


def read_deepfashion(root, args):
    """Its 1000 attributes. Its 26 fine attributes, which only a part of the pictures has, if the
    folder given is Anno_fine itself or no other attributes are there."""
    if os.path.basename(root) == "Anno_fine":
        notes = root
        root = os.path.dirname(root)
    else:
        notes = first_of(root, "Anno_coarse", "Anno_fine", "Anno")
    columns = read_attribute_names(first_of(notes, "list_attr_cloth.txt"))

    own_splits = [os.path.join(notes, f"{part}.txt") for part in ("train", "val", "test")]
    if all(os.path.isfile(path) for path in own_splits):
        partition = {}
        for part, path in enumerate(own_splits):
            for _, picture in read_lines(path):
                partition[picture] = part
    else:
        splits = first_of(root, "Eval/list_eval_partition.txt", "list_eval_partition.txt")
        meaning = {"train": TRAINING, "val": VALIDATION, "test": TEST}
        partition = read_partition(splits, meaning)

    name = os.path.basename(root)
    if notes.endswith("fine"):
        name += " fine"
    # The pictures' names begin with img/.
    folder = os.path.dirname(first_of(root, "Img/img", "img"))
    attributes = first_of(notes, "list_attr_img.txt")
    return read_attributes(name, folder, attributes, partition, columns, args)


def read_attribute_names(path):
    """A file of the number of attributes, a line of titles, and a line `<name> <type>` for each
    attribute, whose name may contain spaces -> list of names."""
    lines = [line for _, line in read_lines(path)]
    names = [line.rsplit(None, 1)[0] for line in lines[2:]]
    if not names or lines[0] != str(len(names)):
        first_line = lines[0] if lines else ""
        raise UserError(
            f"{path} lists {len(names)} attributes, but its first line is '{first_line}'"
        )
    return names


# --------------------------------------------------------------------------------------------------
# AwA2, Animals with Attributes 2: the attributes are those of a picture's class


def read_awa2(root, args):
    """No split is published, so it is seeded. With args.zero_shot the test split is the pictures of
    the published test classes, and no other picture is of these classes."""
    classes = last_words(first_of(root, "classes.txt"))
    attributes = last_words(first_of(root, "predicates.txt"))
    matrix = read_class_attributes(
        first_of(root, "predicate-matrix-binary.txt"), classes, attributes
    )
    names = []
    labels = []
    for label, class_name in enumerate(classes):
        for file in sorted(os.listdir(first_of(root, f"JPEGImages/{class_name}/"))):
            if file.lower().endswith(IMAGE_TYPES):
                names.append(f"{class_name}/{file}")
                labels.append(label)
    labels = np.array(labels, int)

    name = os.path.basename(root)
    is_test = None
    if args.zero_shot:
        name += " zero-shot"
        test_classes = last_words(first_of(root, "testclasses.txt"))
        unknown = sorted(set(test_classes) - set(classes))
        if unknown:
            raise UserError(f"{root}/testclasses.txt: '{unknown[0]}' is not in classes.txt")
        is_test = np.isin(np.array(classes)[labels], test_classes)
    split = seeded_split(labels, is_test, args.seed)
    folder = os.path.join(root, "JPEGImages")
    return Benchmark(name, folder, names, split, matrix[labels], attributes, args)


def last_words(path):
    """The last word of each line of a file of `<number> <name>`, or only names."""
    return [line.split()[-1] for _, line in read_lines(path)]


def read_class_attributes(path, classes, attributes):
    """A file with a line of A times 0 or 1 for each of the K classes -> int8 (K,A). Raises
    UserError if it has another form, or if two classes have one name."""
    lines = [line.split() for _, line in read_lines(path)]
    for number, values in enumerate(lines, 1):
        if len(values) != len(attributes) or not set(values) <= {"0", "1"}:
            raise UserError(f"{path}: line {number} is not {len(attributes)} times 0 or 1")
    different = len(set(classes))
    if len(lines) != len(classes) or different != len(classes):
        raise UserError(
            f"{path}: {len(lines)} lines for {len(classes)} classes, of which {different} are "
            "different"
        )
    return np.array(lines, np.int8)


# --------------------------------------------------------------------------------------------------
# Image folders of classes


def read_classes(root, args):
    """Classes from <root>/train/<class>/<picture>, with val/ or else test/ as the test split; or
    from <root>/<class>/<picture> or an archive, with a seeded fifth as the test split."""
    training = root
    if os.path.isdir(os.path.join(root, "train")):
        training = os.path.join(root, "train")
    sets = [ImageSet(training)]
    for part in ("val", "test"):
        folder = os.path.join(root, part)
        if len(sets) == 1 and os.path.isdir(folder):
            sets.append(ImageSet(folder))
    classes = sets[0].classes
    if sets[-1].classes != classes or len(classes) < 2:
        raise UserError(
            f"{root}: {len(classes)} class folders for training, {len(sets[-1].classes)} to test; "
            "two or more are needed, the same in both (ImageNet's validation pictures have to be "
            "sorted into class folders)"
        )
    labels = np.concatenate([pictures.labels for pictures in sets])
    is_test = None
    if len(sets) == 2:
        is_test = np.arange(len(labels)) >= len(sets[0])
    names = []
    for pictures in sets:
        subfolder = os.path.relpath(pictures.root, root)
        names += [os.path.join(subfolder, os.fsdecode(name)) for name in pictures.names]
    name = f"{os.path.basename(root)} classes"
    split = seeded_split(labels, is_test, args.seed)
    return Benchmark(name, root, names, split, labels, classes, args, sets)


# --------------------------------------------------------------------------------------------------
# Which reader is for which folder

# {pattern of a file in the folder: reader}. The first that fits is used.
READERS = {
    "list_attr_celeba.*": read_celeba,
    "Anno/list_attr_celeba.*": read_celeba,
    "Anno*/list_attr_img.txt": read_deepfashion,
    "list_attr_img.txt": read_deepfashion,
    "predicate-matrix-binary.txt": read_awa2,
}


# The tasks of probe.py that are about attributes.
NEED_ATTRIBUTES = {"attributes", "disentanglement", "editing"}


def attribute_reader(root):
    """The reader of a folder's annotations, or None if there are none that we know."""
    for pattern, reader in READERS.items():
        if glob.glob(os.path.join(glob.escape(root), pattern)):
            return reader
    return None


def read_folder(root, args):
    """-> list of what the tasks need of one folder: a Benchmark of its attributes, and one of its
    classes if these are asked for or it has nothing else."""
    root = os.path.abspath(root)
    readers = []
    reader = attribute_reader(root)
    if reader is not None and args.task != ["classes"]:
        readers.append(reader)
    needs_attributes = NEED_ATTRIBUTES.intersection(args.task)
    wants_classes = "classes" in args.task or (not readers and not needs_attributes)
    # A folder that was found under data/ may be anything, unless it has a train/.
    may_have_classes = args.data or os.path.isdir(os.path.join(root, "train"))
    if wants_classes and may_have_classes:
        readers.append(read_classes)
    if args.data and not readers:
        if not os.path.isdir(root):
            raise UserError(f"{root}: no such folder")
        raise UserError(
            f"{root} has no annotations in CelebA's, DeepFashion's or AwA2's form "
            f"({', '.join(READERS)}); for an image folder give --task classes"
        )
    return [read(root, args) for read in readers]


def read_benchmarks(args):
    """-> list of the benchmarks in the folders of --data, else in those under data/, else in the
    demo's folder. No two of them have the same name. Raises UserError if there are none."""
    benchmarks = []
    for root in args.data or sorted(glob.glob("data/*")):
        benchmarks += read_folder(root, args)
    if not benchmarks:
        benchmarks = read_folder(os.path.join("runs", "demo", "pictures"), args)
    if not benchmarks:
        raise UserError(
            "no benchmark under data/; name one with --data, or make a small one with "
            "`python demo.py`"
        )
    names = [benchmark.name for benchmark in benchmarks]
    for benchmark in benchmarks:
        # Two folders of the same name would share a line of the table.
        if names.count(benchmark.name) > 1:
            benchmark.name = f"{benchmark.name} {benchmark.folder}"
    return benchmarks
