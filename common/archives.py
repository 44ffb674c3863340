"""Pictures in zip, tar and Parquet files, which are read where they lie, without unpacking.

An archive is listed once: the place of each picture in it and its name. A picture is then read by
its place, by any process. Names are those that a folder with the same classes would have,
<class>/<picture>, so that the same pictures are the same data set in any container."""

import array
import collections
import contextlib
import functools
import io
import json
import os
import re
import tarfile
import time
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from common.files import UserError, reading
from common.processes import progress

TAKEN = (
    "a folder of <class>/<picture>; a .zip or .tar file of such folders; webdataset's .tar files "
    "or a folder of them; ILSVRC2012_img_train.tar; Parquet files with the columns image and label"
)

# How a picture lies in its container: as it is, behind a zip's local header as it is or deflated,
# or as a row of a Parquet file.
PLAIN, STORED, DEFLATED, ROW = range(4)

# The name of a picture of ImageNet, such as n01440764_10026.JPEG, begins with its class.
IMAGENET_NAME = re.compile(r"(n\d{8})_")

# EDM's file of labels: {"labels": [[name, label], ...]}, or null in place of the list.
LABEL_FILE = "dataset.json"
NO_LABELS = {}

# Names of webdataset's shards, such as 00012 or train-0012, which say nothing about the content.
SHARD_NAME = re.compile(r"(.*[-_.])?\d+")


class Archive(NamedTuple):
    """The pictures in one or several container files."""

    containers: list  # paths of the files
    names: list  # N names, <class>/<picture>, unsorted
    places: np.ndarray  # int64 (N,5): container, offset, length there, length of the file, how
    labelled: bool  # whether <class> is a label from a file, and no folder
    left_out: dict  # {what: number of files that are no pictures}
    notes: list  # sentences about how the content was understood


# --------------------------------------------------------------------------------------------------
# What a path is


def find_archive(path):
    """-> (path of an archive, folder in it or ""), or None where a path leads to none. An archive
    is a file, or a folder that holds .tar or .parquet files and no other file or folder, except
    small ones beside them (.json, .txt, .idx, .md)."""
    inner = []
    while not os.path.exists(path):
        path, last = os.path.split(path)
        if not last:
            return None
        inner.insert(0, last)
    if os.path.isfile(path) or (not inner and containers_in(path)):
        return path, "/".join(inner)
    return None


def holds_pictures(path):
    """Whether a path is one that ImageSet takes: a folder, or what find_archive finds and is not an
    .npz file, which holds arrays."""
    if os.path.isdir(path):
        return True
    return not path.lower().endswith(".npz") and find_archive(path) is not None


def containers_in(folder):
    """-> paths of the .tar or .parquet files in a folder, sorted, or [] if it holds others, too."""
    paths = []
    with os.scandir(folder) as entries:
        for entry in entries:
            ending = os.path.splitext(entry.name)[1].lower()
            if ending in (".tar", ".parquet"):
                paths.append(entry.path)
            elif not entry.name.startswith(".") and ending not in (".json", ".txt", ".idx", ".md"):
                return []
    return sorted(paths)


def containers_of(path):
    """-> paths of the container files of an archive that find_archive has found."""
    if os.path.isdir(path):
        return containers_in(path)
    return [path]


COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def kind_of(path):
    """-> "zip", "tar" or "parquet", by a file's content. Raises a UserError for anything else."""
    try:
        with open(path, "rb") as file:
            start = file.read(tarfile.BLOCKSIZE)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if start[:4] in (b"PK\3\4", b"PK\5\6"):
        return "zip"
    if start[:4] == b"PAR1":
        return "parquet"
    for magic, program in COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{path} is compressed by {program}, so its pictures cannot be read one by one; "
                f"decompress it ({program} -dk {path}) and give what comes out"
            )
    # Its first block is the header of its first file, and holds a checksum of itself.
    with contextlib.suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
        return "tar"
    raise UserError(f"{path} holds no pictures in a form that is read; what is taken: {TAKEN}")


# --------------------------------------------------------------------------------------------------
# Listing


class Contents:
    """Collects what is in container files.

    endings: of the names of pictures. hidden: names of folders that are left out, as are those that
    begin with a dot."""

    def __init__(self, endings, hidden):
        self.endings = tuple(endings)
        self.hidden = hidden
        self.names = []  # of N pictures, with their folders
        self.stems = []  # N, the name of the tar file that a picture is directly in, without .tar
        self.places = array.array("q")  # 5N, see Archive
        self.left_out = collections.Counter()
        self.has_inner_tars = False
        self.label_places = {}  # {(stem, key of a webdataset sample): place of its .cls file}
        self.labels = None  # {name: label} from files named LABEL_FILE, see with_labels
        self.bar = progress(desc="listing", unit=" files", delay=1)

    def add(self, name, stem, place):
        """Takes a file, or counts it as left out. place: its row in Archive.places."""
        self.bar.update()
        name = os.path.normpath(name).replace(os.sep, "/").lstrip("/")
        ending = os.path.splitext(name)[1].lower()
        if any(part.startswith(".") or part in self.hidden for part in name.split("/")):
            self.left_out["hidden"] += 1
        elif ending == ".cls":
            self.label_places[stem, sample_key(name)] = place
        elif ending in self.endings:
            self.names.append(name)
            self.stems.append(stem)
            self.places.extend(place)
        else:
            self.left_out[ending or "no ending"] += 1

    def add_labels(self, name, data):
        """Takes the labels in a LABEL_FILE, or counts it as left out."""
        folder = os.path.dirname(os.path.normpath(name).replace(os.sep, "/").lstrip("/"))
        self.labels = with_labels(self.labels, data, folder)
        if self.labels is None:
            self.left_out[".json"] += 1

    def keep(self, chosen):
        """Forgets all pictures but those with the indices `chosen`. -> places int64 (n,5)"""
        places = np.array(self.places, np.int64).reshape(-1, 5)
        self.names = [self.names[i] for i in chosen]
        self.stems = [self.stems[i] for i in chosen]
        self.places = array.array("q", places[chosen].tobytes())


def list_archive(path, inner, endings, hidden):
    """Lists an archive that find_archive has found. -> Archive of the pictures in its folder
    `inner`. endings, hidden: see Contents. Raises a UserError for a damaged file."""
    containers = containers_of(path)
    contents = Contents(endings, hidden)
    for number, container in enumerate(containers):
        kind = kind_of(container)
        with reading(container, f"a {kind} file"):
            if kind == "zip":
                list_zip(container, number, contents)
            elif kind == "parquet":
                list_parquet(container, number, contents)
            else:
                with open(container, "rb") as file:
                    list_tar(file, stem_of(container), number, contents, len(containers) == 1)
    contents.bar.close()
    notes = []
    select_folder(contents, inner, notes)
    keep_the_last_of_each_name(contents)
    names = names_with_classes(containers, contents, notes)
    if len(set(names)) < len(names):
        names = names_apart(names, contents.stems)
    places = np.array(contents.places, np.int64).reshape(-1, 5)
    labelled = contents.labels is not None or bool(contents.label_places)
    return Archive(containers, names, places, labelled, dict(contents.left_out), notes)


def stem_of(path):
    """-> the name of a tar file without its folder and .tar."""
    return os.path.basename(path).removesuffix(".tar")


class BoundedFile(io.FileIO):
    """A file of which no more is asked for than it holds. zipfile reads at once as much as a
    damaged file claims that there is."""

    def read(self, size=-1):
        rest = max(0, os.fstat(self.fileno()).st_size - self.tell())
        if size < 0 or size > rest:
            size = rest
        return super().read(size)


def list_zip(path, number, contents):
    """Lists a zip file. contents.labels become those of its LABEL_FILE, as EDM packs it."""
    with BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            if os.path.basename(member.filename) == LABEL_FILE:
                contents.add_labels(member.filename, archive.read(member))
                continue
            if member.flag_bits & 1:
                raise UserError(f"{path} is encrypted; pack it anew without a password")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(
                    f"{path} is packed by a method other than stored and deflated; pack it anew "
                    "(zip -0 -r new.zip folder)"
                )
            how = DEFLATED if member.compress_type == zipfile.ZIP_DEFLATED else STORED
            place = (number, member.header_offset, member.compress_size, member.file_size, how)
            contents.add(member.filename, "", place)


def with_labels(labels, data, folder):
    """Adds the labels in a dataset.json, whose content is `data`, to those of the ones before it.

    labels: {name: label}; NO_LABELS where a file says that there are none; None before the first
    file with labels. folder: that of the file, "" or with / between its parts. A file that is no
    list of labels adds nothing, since others have files of this name, too."""
    content = json.loads(data)
    if not isinstance(content, dict) or "labels" not in content:
        return labels
    pairs = content["labels"]
    if pairs is None:
        return labels or NO_LABELS
    if not isinstance(pairs, list) or not pairs or not isinstance(pairs[0], list):
        return labels
    prefix = f"{folder}/" if folder else ""
    own = {f"{prefix}{name}": int(label) for name, label in pairs}
    return own | (labels or NO_LABELS)


def names_with_labels(names, labels, root):
    """Names of pictures and {name: label}, as with_labels collected them -> names <label>/<name>.
    root: for the UserError about pictures that have none."""
    if labels == NO_LABELS:
        return [f"all/{name}" for name in names]
    missing = [name for name in names if name not in labels]
    if missing:
        raise UserError(
            f"{root}: {len(missing)} of {len(names)} pictures have no label in "
            f"{LABEL_FILE}, the first is {missing[0]!r}"
        )
    return [f"{labels[name]}/{name}" for name in names]


def list_tar(file, stem, number, contents, is_outer):
    """Lists the tar file that begins where the open file is. With is_outer, the tar files in it are
    listed, too: ImageNet's has one for each class."""
    tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (closing it would close the file)
    while (member := tar.next()) is not None:
        # tarfile remembers all members.
        tar.members.clear()
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            contents.left_out["links and devices"] += 1
        elif is_outer and member.name.endswith(".tar"):
            contents.has_inner_tars = True
            file.seek(member.offset_data)
            list_tar(file, stem_of(member.name), number, contents, False)
        elif os.path.basename(member.name) == LABEL_FILE:
            file.seek(member.offset_data)
            contents.add_labels(member.name, file.read(member.size))
        else:
            place = (number, member.offset_data, member.size, member.size, PLAIN)
            contents.add(member.name, stem, place)
    # tarfile takes any damage for the end.
    file.seek(tar.offset)
    if file.read(512) != bytes(512):
        raise ValueError(f"it is cut or damaged at byte {tar.offset}")


def list_parquet(path, number, contents):
    """Lists a Parquet file in Hugging Face's form: the column image has the fields bytes and path,
    and label is a whole number. The bytes are read, to know how many there are."""
    file = open_parquet(path)
    for group in range(file.num_row_groups):
        rows = file.read_row_group(group, columns=["image", "label"]).to_pylist()
        for i, row in enumerate(rows):
            data = row["image"]["bytes"]
            name = os.path.basename(row["image"].get("path") or "")
            if not name.lower().endswith(contents.endings):
                # What the file holds is recognised from its content.
                name = f"{number:05d}-{group:05d}-{i:05d}.jpg"
            place = (number, group, i, len(data), ROW)
            contents.add(f"{row['label']}/{name}", "", place)


def open_parquet(path):
    """-> pyarrow's ParquetFile. Raises a UserError where pyarrow is missing."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path} is a Parquet file, which pyarrow reads: pip install pyarrow"
        ) from None
    return pyarrow.parquet.ParquetFile(path)


# --------------------------------------------------------------------------------------------------
# Names


def select_folder(contents, inner, notes):
    """Keeps only the pictures in the folder `inner`, and removes it from their names. Without
    `inner`, that is the training pictures of Kaggle's ImageNet, if this is that."""
    if not inner:
        for folder in kaggle_folders():
            if any(name.startswith(f"{folder}/") for name in contents.names):
                inner = folder
                notes.append(f"the training pictures in {inner} are taken")
                break
    if inner:
        names = contents.names
        contents.keep([i for i, name in enumerate(names) if name.startswith(f"{inner}/")])
        contents.names = [name[len(inner) + 1 :] for name in contents.names]


def kaggle_folders():
    """-> where the training pictures of Kaggle's ImageNet are: ILSVRC/Data/CLS-LOC/train, or less
    of it where the upper folders are missing."""
    parts = ["ILSVRC", "Data", "CLS-LOC", "train"]
    return ["/".join(parts[i:]) for i in range(3)]


def keep_the_last_of_each_name(contents):
    """Keeps the last picture of each name in a file, which is the valid one where an archive was
    added to."""
    last = {}
    for i, key in enumerate(zip(contents.places[::5], contents.stems, contents.names, strict=True)):
        last[key] = i
    if len(last) < len(contents.names):
        contents.keep(sorted(last.values()))


def names_with_classes(containers, contents, notes):
    """-> names of the pictures, <class>/<picture>, or as they are where there are no classes."""
    if contents.labels is not None:
        return names_with_labels(contents.names, contents.labels, containers[0])
    if contents.label_places:
        labels = webdataset_labels(containers, contents)
        return [f"{label}/{name}" for label, name in zip(labels, contents.names, strict=True)]
    names = contents.names
    if contents.has_inner_tars or len(set(contents.stems)) > 1:
        names = names_with_stems(contents, notes)
    return without_common_folders(names, notes)


def webdataset_labels(containers, contents):
    """-> the label of each picture, as a .cls file gives it."""
    now = time.time_ns()
    labels = {}
    for key, (number, *place) in contents.label_places.items():
        name = f"{key[1]}.cls".lstrip("/")
        data = read_place(Place(name, containers[number], now, *place))
        labels[key] = data.decode().strip()
        if not labels[key]:
            raise UserError(f"{containers[number]}: the label in {name!r} is empty")
    keys = zip(contents.stems, map(sample_key, contents.names), strict=True)
    found = [labels.get(key) for key in keys]
    missing = [name for name, label in zip(contents.names, found, strict=True) if label is None]
    if missing:
        raise UserError(
            f"{containers[0]}: {len(missing)} of {len(found)} pictures have no label in a .cls "
            f"file, the first is {missing[0]!r}"
        )
    return found


def sample_key(name):
    """The name of a file of webdataset's -> the key of its sample: all before the first dot behind
    the last slash."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def names_with_stems(contents, notes):
    """-> names of pictures in several tar files without labels. A tar file is a class, as in
    ImageNet's, unless its pictures are in folders of their own, its name is that of a shard, or the
    pictures' names begin with another class."""
    names = contents.names
    stems = contents.stems
    if any("/" in name for name in names):
        return names
    if not contents.has_inner_tars and all(map(SHARD_NAME.fullmatch, stems)):
        return names
    classes = [IMAGENET_NAME.match(name) for name in names]
    if all(classes) and [found[1] for found in classes] != stems:
        return names
    notes.append("each .tar file in it is a class")
    return [f"{stem}/{name}" for stem, name in zip(stems, names, strict=True)]


def without_common_folders(names, notes):
    """Removes the folders that all names have in common, but for the class."""
    common = []
    while names:
        first = names[0].partition("/")[0]
        if not all(n.startswith(f"{first}/") and n.count("/") > 1 for n in names):
            break
        common.append(first)
        names = [name[len(first) + 1 :] for name in names]
    if common:
        notes.append(f"the classes are the folders in {'/'.join(common)}")
    return names


def names_apart(names, stems):
    """Names of which some are the same, in different tar files -> names that differ."""
    apart = []
    for name, stem in zip(names, stems, strict=True):
        folder, slash, file = name.rpartition("/")
        apart.append(f"{folder}{slash}{stem}-{file}")
    return apart


# --------------------------------------------------------------------------------------------------
# Reading


class Place(NamedTuple):
    """Where a picture is. Any process and any thread may read it, at any time."""

    name: str
    container: str  # path of the file
    version: int  # its time of modification, so that a new file of this name is opened anew
    offset: int
    length: int
    size: int
    how: int

    def __str__(self):
        return os.path.join(self.container, self.name)


LOCAL_HEADER_BYTES = 30


def read_place(place):
    """-> the bytes of the file at a Place. Raises OSError, ValueError or zlib.error for a damaged
    one."""
    offset = place.offset
    if place.how == ROW:
        return read_group(place.container, place.version, offset)[place.length].as_py()
    if place.how in (STORED, DEFLATED):
        # Before the data are a header, the name, and a field whose length only the header has.
        header = read_at(place, offset, LOCAL_HEADER_BYTES)
        if header[:4] != b"PK\3\4":
            raise ValueError(f"{place.container} is damaged at byte {offset}")
        offset += LOCAL_HEADER_BYTES
        offset += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    data = read_at(place, offset, place.length)
    if place.how == DEFLATED:
        # A damaged file cannot make this take more memory than the picture is to have.
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, place.size)
    if len(data) != place.size:
        raise ValueError(f"{place.container} is cut or damaged at byte {offset}")
    return data


def read_at(place, offset, length):
    """-> `length` bytes of a container from `offset` on, or fewer at its end."""
    # Windows has no pread.
    if not hasattr(os, "pread"):
        with open(place.container, "rb") as file:
            file.seek(offset)
            return file.read(length)
    file = open_container(place.container, place.version)
    data = os.pread(file.fileno(), length, offset)
    while len(data) < length:
        more = os.pread(file.fileno(), length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


# The system allows a process about a thousand open files.
@functools.lru_cache(maxsize=64)
def open_container(path, version):
    """-> an open file, which is closed when many others have been opened since."""
    return open(path, "rb", buffering=0)


@functools.lru_cache(maxsize=4)
def read_group(path, version, group):
    """-> the pictures' bytes, a column, in a row group of a Parquet file. Only whole groups can be
    read, so the last ones are kept."""
    table = open_parquet(path).read_row_group(group, columns=["image.bytes"])
    return table["image"].combine_chunks().field("bytes")
