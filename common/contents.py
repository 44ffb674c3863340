"""What files hold, known without reading all of it.

A file is known by its name, its size, and a checksum of its first and last EDGE bytes. Whatever is
kept of files (lists, latents, features, statistics) is kept under a fingerprint of these, so a copy
in another place is the same data, and a file that was written over is not. The checksums are kept
too, under runs/cache. A file's size and times of change only decide whose checksum is taken again.
"""

import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from common.files import open_npz, warn_if_unwritable, writing
from common.processes import rank

# Bytes at each end of a file that its checksum covers: 4 KiB, the unit in which disks are read.
EDGE = 4096

# The state of what is no regular file, or is absent.
NO_FILE = (-1, 0, 0)

# --------------------------------------------------------------------------------------------------
# One file


def status_of(path):
    """A path or os.DirEntry -> os.stat_result, or None where nothing is found, as at the end of a
    broken link."""
    try:
        return os.stat(path)
    except OSError:
        return None


def file_state(status):
    """The os.stat_result of a file, or None -> (size in bytes, time of modification, time of change
    of its entry), both in ns; NO_FILE for anything but a regular file."""
    if status is None or not stat.S_ISREG(status.st_mode):
        return NO_FILE
    # Programs can set the time of modification back, and archives do. The other time they cannot.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_edges(file, size):
    """An open binary file of `size` bytes -> its first and its last EDGE bytes, which overlap in a
    short file. The file is at its start again afterwards."""
    head = file.read(EDGE)
    file.seek(max(0, size - EDGE))
    tail = file.read(EDGE)
    file.seek(0)
    return head, tail


def edge_checksum(head, tail):
    """The first and the last EDGE bytes of a file -> a whole number of 64 bits."""
    return int.from_bytes(hashlib.blake2b(head + tail, digest_size=8).digest(), "little")


# --------------------------------------------------------------------------------------------------
# Many files


def fingerprint_of(names, sizes, checksums):
    """Names (bytes or str, with / between folders), sizes in bytes and edge_checksums of N files,
    in their order -> 16 hexadecimal digits. It does not matter whether the files are in a folder or
    in an archive."""
    digest = hashlib.sha256()
    # No name can contain a zero byte.
    digest.update(b"\0".join(os.fsencode(name) for name in names))
    digest.update(np.asarray(sizes, "<i8").tobytes())
    digest.update(np.asarray(checksums, "<u8").tobytes())
    return digest.hexdigest()[:16]


def table_path(folder, kind):
    """Where the table of a folder is kept between starts. kind: the first word of its name."""
    folder_hash = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    return os.path.join("runs", "cache", f"{kind}-{folder_hash}.npz")


def read_table(path, columns):
    """Reads a table that write_table kept. columns: {name: (kind of NumPy type, shape of a row)}.

    -> (header, {name: array (N,...)}), or None if it is absent, damaged or of another form."""
    try:
        with open_npz(path) as file:
            header = json.loads(str(file["header"]))
            table = {name: file[name] for name in columns}
    except Exception:  # A damaged file raises a dozen types. A new one is made in any case.
        return None
    rows = len(table["names"])
    for name, (kind, shape) in columns.items():
        if table[name].dtype.kind != kind or table[name].shape != (rows, *shape):
            return None
    return header, table


def write_table(path, header, table):
    """Keeps a table of N files for later starts. header: JSON values. table: {name: array
    (N,...)}. A failed write is a warning."""
    with warn_if_unwritable(path), writing(path) as file:
        np.savez(file, header=np.array(json.dumps(header)), **table)


def is_same_table(kept, header, table):
    """Whether `kept`, which read_table returned, is this header and table."""
    if kept is None or kept[0] != header:
        return False
    return all(np.array_equal(kept[1][name], column) for name, column in table.items())


def unchanged_rows(names, states, kept):
    """For N files as they are now, the rows of a kept table that still hold: int64 (N,), -1 for a
    file that is new or changed. names: bytes (N,). states: int64 (N,3), see file_state."""
    kept_names = kept["names"]
    if len(kept_names) == 0:
        return np.full(len(names), -1)
    if np.array_equal(names, kept_names):
        rows = np.arange(len(names))
    else:
        order = np.argsort(kept_names)
        place = np.searchsorted(kept_names, names, sorter=order)
        rows = order[np.minimum(place, len(kept_names) - 1)]
    same = (kept_names[rows] == names) & (kept["states"][rows] == states).all(1)
    is_file = states[:, 0] >= 0
    return np.where(same & is_file, rows, -1)


# --------------------------------------------------------------------------------------------------
# Files whose names are given

COLUMNS = {"names": ("S", ()), "states": ("i", (3,)), "checksums": ("u", ())}


def checksum_of(path):
    """-> edge_checksum of a file, 0 if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return edge_checksum(*read_edges(file, os.fstat(file.fileno()).st_size))
    except OSError:
        return 0


def sizes_and_checksums(folder, names):
    """For the N files folder/name: int64 (N,), sizes in bytes, -1 for a file that is absent, and
    uint64 (N,), their edge_checksums, which are kept under runs/cache."""
    encoded = np.array([os.fsencode(name) for name in names], "S")
    paths = [os.path.join(folder, name) for name in names]
    with ThreadPoolExecutor(16) as pool:
        # The threads wait for a network file system at the same time.
        states = [file_state(status) for status in pool.map(status_of, paths, chunksize=100)]
        states = np.array(states, np.int64).reshape(-1, 3)

        checksums = np.zeros(len(names), np.uint64)
        rows = np.full(len(names), -1)
        path = table_path(folder, "contents")
        kept = read_table(path, COLUMNS)
        if kept is not None:
            rows = unchanged_rows(encoded, states, kept[1])
            checksums[rows >= 0] = kept[1]["checksums"][rows[rows >= 0]]
        todo = np.flatnonzero((rows < 0) & (states[:, 0] >= 0))
        checksums[todo] = list(pool.map(checksum_of, [paths[i] for i in todo]))
    if len(todo) and rank() == 0:
        write_table(path, {}, {"names": encoded, "states": states, "checksums": checksums})
    return states[:, 0], checksums
