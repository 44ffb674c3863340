"""The error for users, atomic writes, and checked readers of weights, .npz files and arrays.

Every other file may import this one, which imports nothing of ours. "Checked" means that a damaged
file is refused in one sentence, wherever its format can show the damage, and that no file makes its
reader run code."""

import argparse
import contextlib
import glob
import hashlib
import io
import json
import math
import os
import pathlib
import zipfile

import numpy as np
import torch
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Errors


class UserError(ValueError):
    """What a user did or can mend, in one sentence. The scripts print it, without a traceback, and
    exit with code 2."""


def first_line(error):
    """The first line of an exception's message, at most 200 characters; its type if it has none."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0][:200]


@contextlib.contextmanager
def reading(path, content):
    """The context of code that interprets a file of unknown origin. Whatever the file makes fail
    becomes one UserError that says that `path` cannot be read as `content`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} cannot be read as {content} ({reason})") from error


# --------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def writing(path):
    """`with writing("a/b") as file` gives a binary file that becomes a/b when the block ends, and
    is removed if the block fails. So a/b is always a whole file, the old one or the new one, also
    after a crash or a power cut. Missing folders are made."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    for leftover in glob.glob(f"{glob.escape(path)}.*.tmp"):
        # A process was killed while it wrote this. Another one may remove it at the same time.
        with contextlib.suppress(FileNotFoundError):
            os.remove(leftover)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            # The content must be on the disk before the name is.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


@contextlib.contextmanager
def warn_if_unwritable(path):
    """The context of writing a file that a run can do without. A failure becomes a warning."""
    try:
        yield
    except OSError as error:
        tqdm.write(f"warning: cannot write {path}: {error.strerror}; continuing without it")


def write_json(path, value):
    text = json.dumps(value, indent=1) + "\n"
    with writing(path) as file:
        file.write(text.encode())


def write_weights(path, kind, state, config, info):
    """Writes a .safetensors file that common/weights.py opens.

    kind     the network: "vae" or "sit"
    state    its state dict
    config   the arguments that build the network
    info     what else a reader must know: step, arguments, classes, ... (JSON values)"""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = dict(format="pt", kind=kind, config=json.dumps(config), info=json.dumps(info))
    metadata["hash"] = content_hash(state_hash(state), metadata)
    with writing(path) as file:
        file.write(save(state, metadata))


def state_hash(state):
    """The first 16 hexadecimal digits of the sha256 over a state dict: names, types, shapes and
    bytes of its tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def content_hash(weights_hash, metadata):
    """The hash of all that a weight file of ours holds: the state_hash of its weights and its
    metadata, apart from the entry "hash", where the result is kept."""
    hashed = {key: value for key, value in metadata.items() if key != "hash"}
    text = json.dumps(hashed, sort_keys=True)
    return hashlib.sha256((weights_hash + text).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# Reading zip files, which .npz and PyTorch's .pt files are, and arrays

FOLDER_ATTRIBUTE = 16
END_RECORD_BYTES = 22


def is_intact_zip(path):
    """Whether a zip file holds exactly what was written into it.

    Every member has a CRC-32, but the usual readers do not see all damage: torch.load compares no
    CRC-32, and np.load stops reading, before it could compare one, where an array's header claims
    fewer numbers than there are. So this compares all of them. It also refuses what no CRC-32 can
    show: a member marked as a folder, which torch.load reads as zeros, and a list of members that
    lacks some."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if archive.comment:  # neither torch nor NumPy writes one
                return False
            if any(member.external_attr & FOLDER_ATTRIBUTE for member in members):
                return False
            if min(len(members), 65535) != recorded_member_count(file):
                return False
            return archive.testzip() is None
    except Exception:
        # zipfile and zlib raise a dozen types of errors where a file is damaged.
        return False


def recorded_member_count(file):
    """The number of members that a zip file without a comment gives in the record at its end; 65535
    stands for that many or more."""
    file.seek(-END_RECORD_BYTES, os.SEEK_END)
    record = file.read()
    return int.from_bytes(record[10:12], "little")


def open_npz(path):
    """np.load of an .npz file whose checksums are right, and whose headers claim exactly the data
    that its members hold. Raises ValueError where they do not, OSError where there is no file."""
    with open(path, "rb"):  # is_intact_zip would report a missing file as a damaged one
        pass
    if not is_intact_zip(path):
        raise ValueError("it is not a zip file, or a checksum in it differs")
    npz = np.load(path, allow_pickle=False)
    for member in npz.zip.infolist():
        with npz.zip.open(member) as file:
            check_npy_header(file, member)
    return npz


def check_npy_header(file, member):
    """Raises ValueError if an array's header does not fit its size. np.load would take all the
    memory that a header names, and read only a part where it names too little."""
    np.lib.format.read_magic(file)
    # Only arrays with headers beyond 64 KiB have another version; no array of ours or ADM's does.
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds Python objects")
    if file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{member.filename} is cut, or claims the wrong shape {shape}")


def open_array(path, dtype, shape):
    """A memory map of an .npy file, to read and to write. Raises UserError unless it is a whole
    array of this type and shape: np.load believes any header, and where it maps a cut file for
    writing, it fills up with zeros what is missing."""
    found = None
    # NumPy's parser of headers raises a dozen types of errors.
    with contextlib.suppress(Exception):
        array = np.load(path, mmap_mode="r")
        size = array.offset + array.nbytes
        found = (array.dtype, array.shape, size, array.flags.c_contiguous)
    if found != (dtype, shape, os.path.getsize(path), True):
        raise UserError(f"{path} is damaged; remove its folder and rerun the command")
    return np.load(path, mmap_mode="r+")


# --------------------------------------------------------------------------------------------------
# Reading weights


def read_weights(path):
    """A .safetensors file, or a PyTorch checkpoint -> (state dict on the CPU, metadata as a dict of
    strings, {} for a checkpoint). Pickled code is never run. Raises UserError."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    with reading(path, "safetensors or as a checkpoint without code"):
        with open(path, "rb") as file:
            start = file.read(9)
        if (
            start[8:] == b"{"
        ):  # safetensors: the length of a JSON header in 8 bytes, then the header
            return read_safetensors(path)
        is_zip = start[:4] == b"PK\3\4"
        return read_checkpoint(path, is_zip), {}


def read_safetensors(path):
    """-> (state dict, metadata)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it has no iterator
        return state, dict(file.metadata() or {})


def read_checkpoint(path, is_zip):
    """The state dict of a file of torch.save's: a zip file with checksums, or, from before torch
    1.6, one without."""
    if is_zip and not is_intact_zip(path):
        raise ValueError("it is damaged: a checksum differs")
    source = path
    if not is_zip:
        # A damaged file may claim more numbers than it holds. A reader of bytes in memory cannot
        # be made to take more; for a zip file, the memory map (mmap) has this effect.
        source = io.BytesIO(pathlib.Path(path).read_bytes())
    # Many published checkpoints also hold the arguments of their training, which are plain data.
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip)
    if isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    return {name: value for name, value in state.items() if isinstance(name, str)}


def load_strictly(model, state, path, assign=False):
    """Loads a state dict, which must have the names and shapes of the model, and returns the model.
    path: where it is from, for the UserError. assign: the tensors become the model's own."""
    try:
        model.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        # The message has a line for each name and shape that differs, after a first one that only
        # says so.
        differences = " ".join(str(error).split(":", 1)[-1].split())
        raise UserError(f"{path} does not fit: {differences[:300]}") from None
    return model
