"""Image folders, ADM's preprocessing, batches, and the way between 8 bits and [-1,1]."""

import collections
import functools
import io
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features

from common.archives import (
    IMAGENET_NAME,
    LABEL_FILE,
    TAKEN,
    Place,
    containers_of,
    find_archive,
    kaggle_folders,
    list_archive,
    names_with_labels,
    read_place,
    with_labels,
)
from common.contents import (
    NO_FILE,
    edge_checksum,
    file_state,
    fingerprint_of,
    read_edges,
    read_table,
    status_of,
    table_path,
    unchanged_rows,
    write_table,
    is_same_table,
)
from common.draws import epoch_order, uniform
from common.files import UserError, first_line, reading, writing
from common.processes import (
    asked_to_stop,
    at_signal,
    available_cores,
    barrier,
    conv_memory_format,
    from_first_process,
    progress,
    rank,
    say,
    world,
)

# {what a file may hold: endings of its name}. A file is recognised from its content, whatever its
# name says. Pillow's other formats are not opened: reading some of them starts another program.
TYPES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k"),
}

# Formats that Pillow reads only where it was built with a library for them, and its name for it.
OPTIONAL = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}

# The formats that the installed Pillow reads, and the endings of names that count as pictures.
FORMATS = tuple(form for form in TYPES if form not in OPTIONAL or features.check(OPTIONAL[form]))
IMAGE_TYPES = tuple(ending for form in FORMATS for ending in TYPES[form])

# Folders that operating systems put beside pictures. They and all names that begin with a dot are
# left out.
HIDDEN = ("@eaDir", "__MACOSX")

# Names of the parts of a data set, which are often given by mistake in place of one of them.
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")

# --------------------------------------------------------------------------------------------------
# One file: opening it, and checking it without decoding


def open_picture(source):
    """A path, or an open binary file -> PIL image whose pixels are not read yet.

    Raises ValueError for what is no picture, for a decompression bomb, and for a strip that would
    become one when its short side is enlarged."""
    try:
        image = Image.open(source, formats=FORMATS)
    except UnidentifiedImageError:
        # Pillow's message shows the Python object that stands for the file.
        raise ValueError(
            f"it is no picture in a format that is read ({', '.join(FORMATS)})"
        ) from None
    problem = None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        problem = f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    elif max(image.size) > 100 * min(image.size):
        problem = "one side is more than 100 times the other"
    if problem is not None:
        image.close()
        raise ValueError(f"its size is {image.width}x{image.height}: {problem}")
    return image


# Tags of TIFF files: bits of a number, the photometric interpretation, and the largest number.
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262
MAX_SAMPLE_VALUE = 281


def white_of(image):
    """PIL image of greys with more than 8 bits (modes I and I;16, and F) -> the number that is
    white in it. Raises ValueError where its file does not tell."""
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers (mode F), whose range is not known; save it "
            "with 8 or 16 bits"
        )
    # Pillow brings the greys of all other formats to 16 bits.
    if image.format != "TIFF":
        return 65535
    stated = stated_white(image)
    if stated is not None:
        return stated
    bits = image.tag_v2[BITS_PER_SAMPLE][0]
    if image.mode == "I":
        raise ValueError(
            f"its pixels are whole numbers of {bits} bits (mode I), whose range is not known; save "
            "it with 8 or 16 bits, or set the TIFF tag MaxSampleValue (281)"
        )
    return 2**bits - 1


def stated_white(image):
    """The white that a TIFF file states, or None. A MaxSampleValue such as 3120 is the largest
    number in the picture. Only one such as 4095 tells the range, here of 12 bits."""
    if MAX_SAMPLE_VALUE not in image.tag_v2:
        return None
    stated = int(np.max(image.tag_v2[MAX_SAMPLE_VALUE]))
    if stated >= 255 and (stated + 1).bit_count() == 1:
        return stated
    return None


def may_be_dark(image):
    """Whether a PIL image, of which no pixel is read yet, has 16 bits a number in its file, which
    does not tell whether white is 65535 or less."""
    has_16_bits = bool(image.tile) and ";16" in str(image.tile[0][3])
    if not has_16_bits or image.mode == "CMYK":
        return False
    if image.format != "TIFF" or not image.mode.startswith("I"):
        return True
    return stated_white(image) is None and image.tag_v2[PHOTOMETRIC] != 0


def peak_of(image):
    """The largest number in a PIL image with 16 bits."""
    pixels = np.asarray(image)
    if image.mode.startswith("I"):
        return int(pixels.max())
    # Of colours Pillow keeps 8 bits. A fourth channel is alpha.
    return 257 * int(pixels[:, :, :3].max())


def check_open_picture(file, tail, decode):
    """Checks an open file's header and its end, which is cheap, or with `decode` all of its pixels.
    tail: its last bytes.

    -> (width, height), or words that say what is wrong with it; and peak_of it where it
    may_be_dark, else None"""
    peak = None
    try:
        with open_picture(file) as image:
            if image.mode[0] in "IF":
                white_of(image)
            size = image.size
            # Without the mark of its end a JPEG is cut, or other data follow the picture: decoding
            # tells.
            if image.format in ("JPEG", "MPO") and b"\xff\xd9" not in tail:
                decode = True
            # This compares the checksums of a PNG and reaches its end. It does nothing for others.
            has_peak = may_be_dark(image)
            image.verify()
        if decode or has_peak:
            file.seek(0)
            with open_picture(file) as image:
                image.load()
                if has_peak:
                    peak = peak_of(image)
    except Exception as error:  # Pillow's decoders raise a dozen types.
        return first_line(error), None
    return size, peak


def examine_picture(source, decode=False):
    """-> (edge_checksum of a file, and the two that check_open_picture says of it); the checksum of
    a file that cannot be opened is 0. source: a path, or a Place in an archive."""
    if not isinstance(source, Place) and not os.path.isfile(source):
        if os.path.islink(source):
            return 0, "it is a broken link", None
        return 0, "it is not a regular file", None
    try:
        with open_source(source) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            head, tail = read_edges(file, size)
            found = "it is empty", None
            if size > 0:
                found = check_open_picture(file, tail, decode)
            return edge_checksum(head, tail), *found
    except Exception as error:  # A damaged archive raises others than OSError.
        return 0, first_line(error), None


def open_source(source):
    """A path, or a Place in an archive -> the file there, open to be read."""
    if isinstance(source, Place):
        return io.BytesIO(read_place(source))
    return open(source, "rb")


# --------------------------------------------------------------------------------------------------
# A folder: listing it, refusing odd layouts, checking its pictures


class Listing(NamedTuple):
    """What is in a folder, as their names and the operating system tell."""

    files: list  # names of the N pictures relative to the folder, sorted
    states: np.ndarray  # int64 (N,3), see common.contents.file_state
    folders: list  # names of the folders in it, sorted
    label_files: list  # names of the files in it that are named LABEL_FILE
    labelled: bool  # whether the names of the pictures are <label>/<name>, by files of labels
    left_out: dict  # {what: number of files}: "hidden", or the ending of a name that is no picture


def list_files(root):
    """Walks through a folder, following links to other folders. Hidden files and folders are left
    out. Raises UserError for a folder that cannot be listed. -> Listing"""
    files = []
    label_files = []
    states = [np.zeros((0, 3), np.int64)]
    left_out = collections.Counter()
    level = ["."]
    levels = []
    # Several threads wait for a network file system at the same time.
    with ThreadPoolExecutor(16) as pool:
        while level:
            levels.append(level)
            below = []
            for found in pool.map(functools.partial(list_folder, root), level):
                files += found.files
                label_files += found.label_files
                states.append(found.states)
                below += found.folders
                left_out.update(found.left_out)
            level = below
    order = sorted(range(len(files)), key=files.__getitem__)
    class_folders = sorted(levels[1]) if len(levels) > 1 else []
    return Listing(
        [files[i] for i in order],
        np.concatenate(states)[order],
        class_folders,
        label_files,
        False,
        dict(left_out.most_common()),
    )


def with_labels_of(root, listing):
    """Listing of a folder in EDM's form -> the same as of its zip file, with names
    <label>/<name>. Without files of labels it stays as it is."""
    labels = None
    for name in listing.label_files:
        path = os.path.join(root, name)
        with reading(path, "EDM's labels"), open(path, "rb") as file:
            labels = with_labels(labels, file.read(), os.path.dirname(name).replace(os.sep, "/"))
    if labels is None:
        left_out = collections.Counter(listing.left_out)
        left_out[".json"] += len(listing.label_files)
        return listing._replace(left_out=dict((+left_out).most_common()))
    names = [name.replace(os.sep, "/") for name in listing.files]
    files = [name.replace("/", os.sep) for name in names_with_labels(names, labels, root)]
    order = sorted(range(len(files)), key=files.__getitem__)
    files = [files[i] for i in order]
    folders = sorted({class_name(file) for file in files})
    states = listing.states[order]
    return listing._replace(files=files, states=states, folders=folders, labelled=True)


# What is kept of the N pictures in an archive between starts, see common.contents.read_table.
ARCHIVE_COLUMNS = {
    "names": ("S", ()),  # in the folder that is asked for
    "places": ("i", (5,)),  # see common.archives.Archive
}


def list_members(root):
    """Lists the archive, or the folder in one, that find_archive finds at `root`. The list is kept
    until the archive changes.

    -> Listing; int64 (N,5), see common.archives.Archive; [(path, time of modification)] of the
    container files; sentences about how the content was understood"""
    archive, inner = find_archive(root)
    paths = containers_of(archive)
    states = [file_state(os.stat(path)) for path in paths]
    current = [[path, *state] for path, state in zip(paths, states, strict=True)]
    table_file = table_path(root, "archive")
    kept = read_table(table_file, ARCHIVE_COLUMNS)
    if kept is not None and kept[0].get("containers") == current:
        header, table = kept
    else:
        found = list_archive(archive, inner, IMAGE_TYPES, HIDDEN)
        header = {
            "containers": current,
            "labelled": found.labelled,
            "left_out": found.left_out,
            "notes": found.notes,
        }
        order = sorted(range(len(found.names)), key=found.names.__getitem__)
        names = [os.fsencode(found.names[i]) for i in order]
        table = {"names": np.array(names, "S"), "places": found.places[order]}
        if rank() == 0:
            write_table(table_file, header, table)
    files = [os.fsdecode(name).replace("/", os.sep) for name in table["names"]]
    places = table["places"]
    member_states = np.array(states, np.int64)[places[:, 0]]
    # A picture's own size, and the times of its container.
    member_states[:, 0] = places[:, 3]
    folders = sorted({class_name(file) for file in files} - {"."})
    labelled = header.get("labelled", False)
    listing = Listing(files, member_states, folders, [], labelled, header["left_out"])
    containers = [(path, state[1]) for path, state in zip(paths, states, strict=True)]
    return listing, places, containers, header["notes"]


def list_folder(root, folder):
    """-> Listing of the folder root/folder without those below it, unsorted. All names are relative
    to root."""
    files = []
    states = []
    folders = []
    label_files = []
    left_out = collections.Counter()
    path = os.path.normpath(os.path.join(root, folder))
    prefix = "" if folder == "." else folder + os.sep
    refuse_endless_link(path)
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.name.startswith(".") or entry.name in HIDDEN:
                    left_out["hidden"] += 1
                elif entry.is_dir():
                    folders.append(name)
                elif entry.name.lower().endswith(IMAGE_TYPES):
                    files.append(name)
                    states.append(file_state(status_of(entry)))
                elif entry.name == LABEL_FILE:
                    label_files.append(name)
                else:
                    ending = os.path.splitext(entry.name)[1].lower()
                    left_out[ending or "no ending"] += 1
    except OSError as error:
        raise UserError(f"cannot list {path!r}: {error.strerror}") from None
    states = np.array(states, np.int64).reshape(-1, 3)
    return Listing(files, states, folders, label_files, False, left_out)


def refuse_endless_link(folder):
    """Raises a UserError for a link to a folder that contains the link, which has no end."""
    if not os.path.islink(folder):
        return
    target = os.path.realpath(folder)
    parent = os.path.realpath(os.path.dirname(folder))
    if os.path.commonpath([parent, target]) == target:
        raise UserError(f"{folder!r} is a link to a folder that contains it; remove the link")


def class_name(file):
    """Name of a picture relative to the root -> the first folder in it, or "." if it has none."""
    folder, separator, _ = file.partition(os.sep)
    if separator:
        return folder
    return "."


def sort_classes(names):
    """Names of classes, without repetitions -> the same in the order of their labels: by number if
    all of them are numbers, else as text."""
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def refuse_odd_layout(root, listing):
    """Raises a UserError for a folder that is not laid out as <class>/<picture> or as <picture>."""
    files = listing.files
    class_folders = listing.folders
    left_out = listing.left_out
    if not files:
        raise UserError(
            f"{root} has no pictures (files named {' '.join(IMAGE_TYPES)})"
            f"{describe_left_out(left_out)}"
        )
    refuse_splits(root, files, class_folders)
    used = {class_name(file) for file in files}
    beside = [file for file in files if os.sep not in file]
    if beside and len(used) > 1:
        raise UserError(
            f"{root} holds class folders and, beside them, {count_of(beside)}, the first is "
            f"{os.path.join(root, beside[0])!r}; move what is beside them into a class folder, or "
            "away"
        )
    empty = sorted(set(class_folders) - used)
    if empty:
        raise UserError(
            f"class folders without pictures: {len(empty)}, the first is "
            f"{os.path.join(root, empty[0])!r}; add pictures or remove it"
            f"{describe_left_out(left_out)}"
        )


def refuse_splits(root, files, class_folders):
    """Raises a UserError where the folder of a whole data set is given in place of one split.

    A folder named train is a split if class folders are in it, or if nothing but splits is beside
    it. One that holds pictures itself, beside class folders of other names, is a class."""
    splits = [folder for folder in class_folders if folder.lower() in SPLITS]
    if len(splits) < len(class_folders):
        classes = {class_name(file) for file in files if file.count(os.sep) == 1}
        splits = [folder for folder in splits if folder not in classes]
    if not splits:
        return
    training = [folder for folder in splits if folder.lower().startswith("train")]
    example = os.path.join(root, (training or splits)[0])
    raise UserError(
        f"{root} holds the parts of a data set ({', '.join(splits)}) instead of classes: give one "
        f"of them, such as {example}; if they are classes, give their folders other names, or "
        "links in another folder"
    )


def count_of(pictures):
    return "1 picture" if len(pictures) == 1 else f"{len(pictures)} pictures"


def describe_left_out(left_out):
    """{what: number of files}, see Listing -> "; left out: 3 hidden, 2 .txt", or nothing."""
    if not left_out:
        return ""
    kinds = [f"{count} {what}" for what, count in left_out.items()]
    words = "; left out: " + ", ".join(kinds[:6])
    if len(kinds) > 6:
        words += f" and {sum(list(left_out.values())[6:])} others"
    if not left_out.keys().isdisjoint((".zip", ".tar", ".parquet")):
        words += " (an archive is read where it is given itself)"
    for form in set(TYPES) - set(FORMATS):
        if not left_out.keys().isdisjoint(TYPES[form]):
            words += f" (the installed Pillow does not read {form})"
    return words


def examine_pictures(sources, decode):
    """Yields examine_picture of every source, in order, from several threads or processes. decode:
    whether to decode it, a bool for each source."""
    many = len(sources) > 5000
    # Processes check faster than threads, but they take a while to start.
    executor = ProcessPoolExecutor if many else ThreadPoolExecutor
    with executor(min(16, available_cores())) as pool:
        results = pool.map(examine_picture, sources, decode, chunksize=100)
        yield from progress(results, "checking pictures", len(sources), disable=not many)


def refuse_unreadable(files, problems, skip_bad, path_of):
    """problems: {index of a picture that cannot be read: what is wrong with it}. path_of: the
    function from an index to a path.

    Raises a UserError if there are any, unless they are to be skipped and each class has others."""
    if not problems:
        return
    readable = {class_name(file) for i, file in enumerate(files) if i not in problems}
    lost = sorted({class_name(file) for file in files} - readable)
    if skip_bad and not lost:
        return
    first = min(problems)
    path = path_of(first)
    if lost:
        remedy = f"repair or remove it; class {lost[0]!r} has no picture that can be read"
    else:
        remedy = "repair or remove it, or train with --skip-bad to use others of its class instead"
    raise UserError(
        f"{count_of(problems)} cannot be read, the first is {path!r}: {problems[first]}; {remedy}"
    )


def refuse_dark(root, peak):
    """Raises a UserError where no picture with 16 bits has a number above those of 14 bits. Such
    pictures have fewer bits than their files say, and would be all but black. peak: see ImageSet.
    """
    if peak is None or not 0 < peak < 2**14:
        return
    raise UserError(
        f"the pictures with 16 bits in {root} reach only {peak} of 65535, as numbers of "
        f"{max(8, peak.bit_length())} bits do, and would be dark; save them with numbers up to "
        "65535, or, if they are grey TIFFs, set their tag MaxSampleValue (281) to a range such as "
        "4095"
    )


# --------------------------------------------------------------------------------------------------
# A set of pictures


# What is kept of each of N files between starts, see common.contents.read_table.
COLUMNS = {
    "names": ("S", ()),  # relative to the root
    "states": ("i", (3,)),  # see common.contents.file_state
    "checksums": ("u", ()),  # see common.contents.edge_checksum
    "sides": ("i", ()),  # the shorter side in pixels; 0: it cannot be read
    "decoded": ("b", ()),  # whether all of its pixels were read
}


# Seconds between two times that a check of many files keeps what it has found so far.
KEEP_EVERY = 60


class ImageSet:
    """The pictures of a folder in ImageNet's layout, root/<class>/<picture>, or of a folder that
    holds pictures directly (one class).

    names: bytes (N,), relative to root, sorted. labels: int64 (N,), indices into classes.
    classes: list of folder names; those that are all numbers are sorted by number. smallest,
    largest: of the pictures' shorter sides, in pixels. bad: indices of those that cannot be read.
    sizes: int64 (N,), bytes of the files. checksums: uint64 (N,), of their first and last few KiB.
    fingerprint: hash of names, sizes and checksums.

    check_data: every picture is decoded once, before it is used.
    skip_bad: a picture that cannot be read is replaced by another one of its class; else it is a
    UserError, as is a folder that is absent, empty or oddly laid out.

    What is found out about the files is kept under runs/cache. A later start examines only those
    that are new or have changed."""

    def __init__(self, root, check_data=False, skip_bad=False):
        self.root = os.path.abspath(root)
        self.check_data = check_data
        self.skip_bad = skip_bad
        self.containers = None  # of an archive, and `places` in them: see list_members
        self.places = None
        self.notes = []
        self.labelled = False  # whether the names begin with a label, which is not in the paths
        self.is_archive = find_archive(self.root) is not None
        if not self.is_archive and not os.path.isdir(root):
            raise UserError(
                f"{root}: no such folder or file; give with --data {TAKEN} (`python demo.py` makes "
                "a small folder under runs/demo)"
            )
        for folder in kaggle_folders():
            if os.path.isdir(os.path.join(self.root, folder)):
                self.root = os.path.join(self.root, folder)
                self.notes.append(f"the training pictures in {folder} are taken")
        self.peak = None  # of all pictures with 16 bits, see peak_of
        self.table_file = table_path(self.root, "pictures")
        # The first process examines the files while the others wait. These do the same themselves
        # only if they cannot read what the first has kept, as on another node without a common
        # file system.
        if rank() == 0:
            self.examine()
        barrier()
        if rank() != 0 and not self.read_table():
            self.examine()
        self.refuse_another_copy()
        self.describe_oddities()

    def read_table(self):
        """Takes over what the first process has kept of the files. -> whether it could be read."""
        kept = read_table(self.table_file, COLUMNS)
        if kept is None:
            return False
        header, table = kept
        if "unfinished" in header:
            return False
        files = [os.fsdecode(name) for name in table["names"]]
        if self.is_archive and self.list_pictures().files != files:
            return False
        self.labelled = header.get("labelled", False)
        self.take(files, table, header["left_out"])
        return True

    def list_pictures(self):
        """-> Listing of the folder or the archive."""
        if not self.is_archive:
            listing = list_files(self.root)
            return with_labels_of(self.root, listing)
        listing, self.places, self.containers, self.notes = list_members(self.root)
        return listing

    def examine(self):
        """Lists the files, checks those that are new or have changed since an earlier start, and
        keeps what is found."""
        listing = self.list_pictures()
        files = listing.files
        self.labelled = listing.labelled
        refuse_odd_layout(self.root, listing)
        names = np.array([os.fsencode(file) for file in files])
        table = {
            "names": names,
            "states": listing.states,
            "checksums": np.zeros(len(files), np.uint64),
            "sides": np.zeros(len(files), np.int64),
            "decoded": np.full(len(files), self.check_data),
        }
        kept = read_table(self.table_file, COLUMNS)
        todo = np.arange(len(files))
        if kept is not None:
            self.peak = kept[0].get("peak")
            todo = self.take_over(kept[1], table)
        problems = {}
        if len(todo):
            self.names = names
            problems = self.fill(table, todo)
        refuse_unreadable(files, problems, self.skip_bad, self.path)
        refuse_dark(self.root, self.peak)
        self.take(files, table, listing.left_out)
        header = {"left_out": listing.left_out}
        if self.labelled:
            header["labelled"] = True
        if self.peak is not None:
            header["peak"] = self.peak
        if not is_same_table(kept, header, table):
            write_table(self.table_file, header, table)

    def fill(self, table, todo):
        """Examines the files with the indices `todo`, and writes what is found into their rows of a
        table. What is finished is kept now and then, for a start after a kill.

        -> {index of a file that cannot be read: what is wrong with it}"""
        problems = {}
        unfinished = np.full(len(table["names"]), False)
        unfinished[todo] = True
        sources = [self.source(i) for i in todo]
        decode = table["decoded"][todo].tolist()
        last_time = time.monotonic()
        for i, found in zip(todo, examine_pictures(sources, decode), strict=True):
            table["checksums"][i], result, peak = found
            if peak is not None:
                self.peak = max(peak, self.peak or 0)
            if isinstance(result, str):
                problems[int(i)] = result
            else:
                table["sides"][i] = min(result)
            unfinished[i] = False
            if time.monotonic() > last_time + KEEP_EVERY:
                self.keep_unfinished(table, unfinished)
                last_time = time.monotonic()
        if problems:
            self.keep_unfinished(table, unfinished)
        return problems

    def keep_unfinished(self, table, unfinished):
        """Keeps a table for a later start, but for the rows that a bool (N,) marks."""
        if rank() == 0:
            states = np.where(unfinished[:, None], NO_FILE, table["states"])
            header = {"unfinished": True, "peak": self.peak}
            write_table(self.table_file, header, dict(table, states=states))

    def take_over(self, kept, table):
        """Fills a table with what an earlier start kept. -> indices of the files to examine: those
        that are new, have changed, are yet to be decoded, or could not be read before."""
        rows = unchanged_rows(table["names"], table["states"], kept)
        known = np.flatnonzero(rows >= 0)
        # What only decoding found unreadable must be decoded again to be found.
        table["decoded"][known] |= kept["decoded"][rows[known]]
        known = known[kept["decoded"][rows[known]] >= table["decoded"][known]]
        known = known[kept["sides"][rows[known]] > 0]
        for name in ("checksums", "sides"):
            table[name][known] = kept[name][rows[known]]
        return np.setdiff1d(np.arange(len(rows)), known)

    def take(self, files, table, left_out):
        """Makes a table, whose names are `files`, the content of this set."""
        class_names = [class_name(file) for file in files]
        if set(class_names) == {"."} and all(IMAGENET_NAME.match(file) for file in files):
            class_names = [IMAGENET_NAME.match(file)[1] for file in files]
            self.notes = [*self.notes, "the classes are what the names of the pictures begin with"]
        self.classes = sort_classes(set(class_names))
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array([label_of[name] for name in class_names], np.int64)
        self.names = table["names"]
        self.sizes = table["states"][:, 0]
        self.checksums = table["checksums"]
        readable = table["sides"] > 0
        self.bad = set(np.flatnonzero(~readable).tolist())
        self.smallest = int(table["sides"][readable].min())
        self.largest = int(table["sides"][readable].max())
        self.fingerprint = fingerprint_of(files, self.sizes, self.checksums)
        self.left_out = left_out

    def refuse_another_copy(self):
        """Raises a UserError if the folder holds other pictures on this node than on the first
        process's."""
        number = int(self.fingerprint, 16) - 2**63  # as a signed whole number of 64 bits
        if from_first_process(number) != number:
            raise UserError(
                f"{self.root} holds other pictures for process {rank()} than for process 0; give "
                "all nodes the same ones"
            )

    def describe_oddities(self):
        """Says what a user may not know of this folder."""
        for note in self.notes:
            say(f"note: {self.root}: {note}")
        if self.left_out:
            say(f"note: {self.root}{describe_left_out(self.left_out).replace(';', ':', 1)}")
        if len(self.classes) == 1 and all(name.count(os.sep.encode()) > 1 for name in self.names):
            say(
                f"note: {self.root} holds one folder, {self.classes[0]!r}, which is taken for the "
                "only class; if the folders in it are the classes, give "
                f"{os.path.join(self.root, self.classes[0])!r}"
            )
        if self.bad:
            say(
                f"note: {len(self.bad)} of {len(self)} pictures cannot be read; others of their "
                f"class take their place. The first is {self.path(min(self.bad))!r}"
            )

    def __len__(self):
        return len(self.names)

    def path(self, i):
        """-> path of picture i; in an archive, that of the archive and the name in it."""
        return os.path.join(self.root, self.name_there(i))

    def name_there(self, i):
        """-> name of picture i in the folder or the archive."""
        name = os.fsdecode(self.names[i])
        if self.labelled:
            name = name.partition(os.sep)[2]
        return name

    def source(self, i):
        """-> where load_image finds picture i: its path, or its Place in an archive."""
        if self.places is None:
            return self.path(i)
        container, *place = self.places[i].tolist()
        return Place(self.name_there(i), *self.containers[container], *place)

    def load(self, i, size):
        """-> uint8 (size,size,3): picture i.

        With skip_bad, a picture that cannot be read is replaced by the next one of its class that
        can. Which one that is depends on i alone, so that every process takes the same."""
        j = i
        while True:
            if j not in self.bad:
                try:
                    return load_image(self.source(j), size)
                except UserError as error:
                    if not self.skip_bad:
                        raise
                    self.bad.add(j)
                    print(
                        f"warning: {error}; another picture of its class takes its place "
                        f"({len(self.bad)} so far)",
                        file=sys.stderr,
                        flush=True,
                    )
            j = self.next_readable(i)

    def next_readable(self, i):
        """-> index of the next readable picture of i's class; the first follows the last."""
        same_class = np.flatnonzero(self.labels == self.labels[i])
        readable = [k for k in same_class if k not in self.bad]
        if not readable:
            folder = os.path.join(self.root, self.classes[self.labels[i]])
            raise UserError(f"no picture of {folder!r} can be read any longer")
        return readable[np.searchsorted(readable, i) % len(readable)]

    def stack(self, indices, size):
        """Indices of b pictures -> uint8 (b,3,size,size)."""
        pictures = np.stack([self.load(i, size) for i in indices])  # (b,size,size,3)
        return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def decode_all(data, wanted):
    """Where `wanted`, does what check_data asks for, for an ImageSet that was made without it. The
    labels stay as they are, since resuming may have changed them."""
    if not wanted:
        return
    checked = ImageSet(data.root, check_data=True, skip_bad=data.skip_bad)
    if checked.fingerprint != data.fingerprint:
        raise UserError(f"{data.root} has changed since the command began; rerun it")
    data.bad = checked.bad


def say_if_enlarged(data, size):
    """Says if some pictures of a set are enlarged to `size` pixels."""
    if data.smallest < size:
        say(
            f"note: some pictures are smaller than {size} pixels (the smallest {data.smallest}) "
            "and are enlarged; --resolution sets another size"
        )


# --------------------------------------------------------------------------------------------------
# Preprocessing


def to_rgb(image):
    """PIL image of any mode -> RGB. Alpha is dropped, as in ADM's loader. Greys of more than 8 bits
    are scaled to 8; Pillow would clip them. Raises ValueError where their range is not known."""
    if image.mode[0] in "IF":
        grey = np.asarray(image).astype(np.float64) * 255 / white_of(image)
        grey = grey.round().clip(0, 255)
        if image.format == "TIFF" and image.tag_v2[PHOTOMETRIC] == 0:
            # Pillow inverts where 0 is white, but not here.
            grey = 255 - grey
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")


def adm_crop(image, size):
    """RGB PIL image -> uint8 (size,size,3), preprocessed as for ADM (Dhariwal and Nichol 2021,
    guided_diffusion/image_datasets.py), and so as for most published FIDs.

    A box filter halves the image while its short side is at least 2*size, a bicubic resize brings
    the short side to size, and the centre is cut out."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def load_image(source, size):
    """A path, or a Place in an archive -> uint8 (size,size,3), or a UserError that names the file.

    EXIF rotation is ignored, as in ADM's loader. The first frame of an animation is taken."""
    try:
        with open_source(source) as file, open_picture(file) as image:
            return adm_crop(to_rgb(image), size)
    except Exception as error:  # Pillow's decoders raise a dozen types.
        name = str(source) if isinstance(source, Place) else os.fsdecode(source)
        raise UserError(f"cannot read the picture {name!r}: {first_line(error)}") from None


# --------------------------------------------------------------------------------------------------
# Batches


class TrainingBatches(torch.utils.data.Dataset):
    """Item k is this process's share of the batch of step k, a function of (seed, k) alone.

    The run is an endless stream of samples: position p holds picture epoch_order(p // N)[p % N] of
    the N pictures, so a batch may span two epochs. Item: dict of
        position, index, label   int64 (b,): in the stream, in the set, and the class
        flip                     bool (b,): whether the picture is mirrored
        image                    uint8 (b,3,size,size), if `size` is given
    and of the arrays that `extra(index, flip)` returns as a dict, given NumPy arrays (b,)."""

    def __init__(self, data, batch_size, seed, size=None, flip=True, extra=None):
        self.data = data
        self.batch_size = batch_size  # of all processes together
        self.seed = seed
        self.size = size
        self.flip = flip
        self.extra = extra
        # Loader processes have no process group to ask.
        self.rank = rank()
        self.world = world()

    def __getitem__(self, step):
        # The processes take turns. So a step of several passes has the same pictures in each pass,
        # all processes together, whatever their number: batch norms see one pass at a time.
        share = self.batch_size // self.world
        position = step * self.batch_size + self.rank + self.world * np.arange(share)
        index = np.array([self.index_at(p) for p in position.tolist()])
        position = torch.from_numpy(position)
        flip = uniform(self.seed, "flip", position) < 0.5
        if not self.flip:
            flip = torch.zeros_like(flip)
        batch = {
            "position": position,
            "index": torch.from_numpy(index),
            "flip": flip,
            "label": torch.from_numpy(self.data.labels[index]),
        }
        if self.size is not None:
            image = self.data.stack(index, self.size)  # (b,3,size,size)
            batch["image"] = torch.where(flip.view(-1, 1, 1, 1), image.flip(3), image)
        if self.extra is not None:
            batch.update(self.extra(index, flip.numpy()))
        return batch

    def item_bytes(self):
        """-> size of an item in bytes."""
        picture = 3 * 8 + 1  # position, index and label; flip
        if self.size is not None:
            picture += 3 * self.size**2
        if self.extra is not None:
            arrays = self.extra(np.zeros(1, np.int64), np.zeros(1, bool))
            picture += sum(array.nbytes for array in arrays.values())
        return picture * (self.batch_size // self.world)

    def index_at(self, position):
        """Position in the stream of samples -> index of the picture there."""
        count = len(self.data)
        return epoch_order(self.seed, position // count, count)[position % count]


class PictureBlocks(torch.utils.data.Dataset):
    """`count` pictures in blocks of `block`, the last one maybe smaller. Item k is the dict of
    image: load(indices of the pictures in block k, size), uint8 (b,3,size,size)."""

    def __init__(self, load, size, count, block):
        self.load = load
        self.size = size
        self.count = count
        self.block = block

    def __getitem__(self, k):
        start = k * self.block
        stop = min(start + self.block, self.count)
        return {"image": self.load(range(start, stop), self.size)}

    def item_bytes(self):
        """-> size of an item in bytes."""
        return 3 * self.size**2 * max(1, min(self.block, self.count))


# --------------------------------------------------------------------------------------------------
# Loading in the background


def ignore_signals(worker):
    """Lets a loader process run until the process it reads for has ended: a scheduler's signal, or
    Ctrl-C, reaches both."""
    at_signal(signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def item_or_error(dataset, k):
    """-> dataset[k], or the UserError that it raises. An exception that torch itself hands on from
    a loader process keeps the loaders from ending.

    A loader process puts the tensors into shared memory here. Left to torch, this happens in a
    thread of the loader, and where there is no room for them the item is lost and waited for."""
    try:
        item = dataset[k]
        if torch.utils.data.get_worker_info() is not None:
            for value in item.values():
                if torch.is_tensor(value):
                    value.share_memory_()
        return item
    except UserError as error:
        return error
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        return UserError(f"{SMALL_SHARED_MEMORY} ({first_line(error)})")


SMALL_SHARED_MEMORY = (
    "the shared memory, /dev/shm, is too small for what the loader processes read ahead; give a "
    "container more (docker run --shm-size=8g), or use --workers 0"
)

# The most that the loaders of a process read ahead beyond one item each, in bytes.
READ_AHEAD = 256 * 2**20


def read_ahead(item_bytes, workers, room):
    """How far loaders read ahead: each one item, or up to four while all are within READ_AHEAD.

    item_bytes: the size of an item. workers: the number of loaders asked for, at least 1. room: the
    shared memory for this process's items in bytes, or None where its size is unknown.
    -> (number of loaders, items that each reads ahead). There are fewer loaders where the room is
    small. Raises a UserError where it does not hold the items of a single one."""
    ahead = max(1, min(4, READ_AHEAD // (workers * item_bytes)))
    if room is None:
        return workers, ahead
    # Of the items that a loader has delivered, one is in use and another one on its way.
    items = room // item_bytes - 2
    if items < 1:
        raise UserError(
            f"{SMALL_SHARED_MEMORY} (a batch has {item_bytes / 1e6:.3g} MB, of which three must "
            f"fit, and there are {room / 1e6:.3g} MB for each process)"
        )
    workers = min(workers, items)
    return workers, min(ahead, items // workers)


def shared_memory_room():
    """-> bytes that are free in /dev/shm for each of the processes on this machine; None where
    there is no such file system (macOS, Windows)."""
    if not os.path.isdir("/dev/shm"):
        return None
    state = os.statvfs("/dev/shm")
    return state.f_bavail * state.f_frsize // processes_here()


def processes_here():
    """Number of processes that torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# While loaders are waited for: seconds between two looks whether a signal has come, and seconds
# that are waited for a batch after one.
LOOK_EVERY = 5
WAIT_AFTER_SIGNAL = 15


def next_batch(iterator):
    """-> the next batch of a DataLoader's iterator, or None after the last. Raises a UserError when
    a signal has asked the process to stop and the loaders hang."""
    begin = time.monotonic()
    while True:
        try:
            return next(iterator, None)
        except RuntimeError as error:
            if "timed out after" not in str(error):
                raise
        waited = time.monotonic() - begin
        if asked_to_stop.is_set() and waited >= WAIT_AFTER_SIGNAL:
            raise UserError(
                f"stopped by a signal after waiting {waited:.0f} seconds for pictures; rerun the "
                "command to resume from what is saved"
            )


def load_batches(dataset, items, workers, device):
    """Yields dataset[k], a dict, for k in items, in order, with its tensors on the device.

    `workers` processes read ahead. With 0 this process reads; with None their number is this
    process's share of the available cores, 8 at most. dataset.item_bytes() is the size of an
    item."""
    if workers is None:
        workers = min(8, available_cores() // processes_here())
    ahead = None
    if workers > 0:
        asked_for = workers
        workers, ahead = read_ahead(dataset.item_bytes(), workers, shared_memory_room())
        if workers < asked_for:
            say(f"note: --workers {workers} instead of {asked_for}: /dev/shm holds no more batches")
    loader = torch.utils.data.DataLoader(
        items,
        batch_size=None,
        collate_fn=functools.partial(item_or_error, dataset),
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
        prefetch_factor=ahead,
        timeout=LOOK_EVERY if workers > 0 else 0,
    )
    children_before = multiprocessing.active_children()
    iterator = iter(loader)
    loaders = [p for p in multiprocessing.active_children() if p not in children_before]
    try:
        while (batch := next_batch(iterator)) is not None:
            if isinstance(batch, UserError):
                raise batch
            for name, value in batch.items():
                if torch.is_tensor(value):
                    batch[name] = value.to(device, non_blocking=True)
            yield batch
    finally:
        end_loaders(iterator, loaders)


def end_loaders(iterator, loaders):
    """Ends the loader processes of a DataLoader's iterator. One that hangs in a read would keep
    this process from ending."""
    if loaders:
        # This waits five seconds for each of them.
        iterator._shutdown_workers()
    for process in loaders:
        if process.is_alive():
            process.kill()


# --------------------------------------------------------------------------------------------------
# Between 8 bits and [-1,1]


def from_uint8(x):
    """uint8 (B,3,H,W) in 0..255 -> float32 (B,3,H,W) in [-1,1], in the device's memory format."""
    x = x.float().div(127.5).sub(1)
    return x.contiguous(memory_format=conv_memory_format(x.device))


def to_uint8(x):
    """Float tensor of any shape -> uint8 in 0..255, rounded. Values outside [-1,1] are clipped."""
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


# --------------------------------------------------------------------------------------------------
# Grids


def save_grid(path, rows):
    """Writes rows of n pictures each, uint8 (n,3,H,W), to one PNG, on white.

    Pictures under 64 pixels are enlarged by repeating their pixels."""
    # This import takes a second, which only those who draw grids should wait for.
    from torchvision.utils import save_image

    x = torch.cat([pictures.cpu() for pictures in rows])  # (rows*n,3,H,W)
    scale = 1
    if x.shape[2] < 64:
        scale = 128 // x.shape[2]
    x = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3) / 255
    with writing(path) as file:
        save_image(x, file, "png", nrow=len(rows[0]), padding=2 * scale, pad_value=1)
