"""The user's error, atomic writes, and checked readers of weights, .npz files and arrays. It imports nothing of ours."""

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


@contextlib.contextmanager
def writing(path):
    """with writing("a/b") as file: a binary file that becomes a/b when the block ends well."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    for left in glob.glob(f"{glob.escape(path)}.*.tmp"):  # by a process that was killed
        with contextlib.suppress(FileNotFoundError):
            os.remove(left)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def open_npz(path):
    """np.load of an .npz whose checksums are right and whose headers claim what its members hold, no more and no less."""
    with open(path, "rb"):  # absent, or not to be read: its own error
        if not is_intact_zip(path):
            raise ValueError("it is not a zip file, or a checksum in it differs")
    file = np.load(path, allow_pickle=False)
    for member in file.zip.infolist():
        with file.zip.open(member) as rows:
            np.lib.format.read_magic(
                rows
            )  # other versions have long headers, and no array of ours or ADM's
            shape, _, dtype = np.lib.format.read_array_header_1_0(rows)
            if dtype.hasobject:
                raise ValueError(f"{member.filename} holds Python objects")
            if rows.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                raise ValueError(f"{member.filename} is cut, or claims the wrong shape {shape}")
    return file


def open_array(path, dtype, shape):
    """A memory map of an .npy file, to read and write. Its header and size must be what it was made with: np.load believes
    any header, and fills up with zeros what a cut file lacks."""
    found = None
    with contextlib.suppress(Exception):  # NumPy's header parser raises a dozen types
        array = np.load(path, mmap_mode="r")
        found = array.dtype, array.shape, array.offset + array.nbytes, array.flags.c_contiguous
    if found != (dtype, shape, os.path.getsize(path), True):
        raise UserError(f"{path} is damaged; remove its folder and give the same command again")
    return np.load(path, mmap_mode="r+")


def write_weights(path, kind, state, config, info):
    """Tensors and what is needed to build and judge them -> a .safetensors file that models.load_<kind> opens."""
    from safetensors.torch import save

    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    metadata = dict(format="pt", kind=kind, config=json.dumps(config), info=json.dumps(info))
    metadata["hash"] = content_hash(state_hash(state), metadata)
    with writing(path) as file:
        file.write(save(state, metadata))


@contextlib.contextmanager
def warn_if_unwritable(path):
    """Around what a run can do without: a failed write of it is said."""
    try:
        yield
    except OSError as error:
        tqdm.write(f"warning: cannot write {path}: {error.strerror}; going on without it")


def write_json(path, value):
    with writing(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


class UserError(ValueError):
    """What a user did or can mend, in one sentence. The scripts print it and exit with code 2, without a traceback."""


def state_hash(state):
    """sha256 over names, types, shapes and bytes of a state dict's tensors, the first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def content_hash(weights, metadata):
    """Of all that a file of ours holds: the state_hash of its weights and its metadata, but for "hash" itself."""
    text = json.dumps({k: v for k, v in metadata.items() if k != "hash"}, sort_keys=True)
    return hashlib.sha256((weights + text).encode()).hexdigest()[:16]


def is_intact_zip(path):
    """Whether a zip file (.pt, .npz) is whole: each member has a CRC-32. torch.load checks none of them, and np.load not
    those of arrays whose header was shortened. A member marked as a folder torch.load takes for zeros; one that the list of
    members lacks no reader misses, so their number, in the file's last 22 bytes, must agree."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            file.seek(-22, os.SEEK_END)
            count = int.from_bytes(file.read()[10:12], "little")
            whole = (
                not archive.comment
                and min(len(members), 65535) == count
                and not any(m.external_attr & 16 for m in members)
            )
            return whole and archive.testzip() is None
    except Exception:  # zipfile and zlib raise a dozen types
        return False


@contextlib.contextmanager
def reading(path, what):
    """Around code that interprets a file of anyone's: whatever in it makes that fail is said in one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as {what} ({type(error).__name__}: {first_line(error)})"
        ) from error


def read_weights(path):
    """A .safetensors file or a PyTorch checkpoint -> (state dict on the CPU, metadata as a dict of strings).
    No pickled code is ever executed. Tensors of a checkpoint are views of the file, so that none reaches beyond it."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    with reading(path, "safetensors or as a checkpoint without code"):
        with open(path, "rb") as file:
            head = file.read(9)
        zipped = head[:4] == b"PK\3\4"  # else it is older than torch 1.6, without checksums
        if zipped and not is_intact_zip(path):
            raise ValueError("it is damaged: a checksum differs")
        if head[8:] == b"{":  # safetensors: 8 bytes of length, then JSON
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(
                    file.metadata() or {}
                )
        # from memory, which has no more than the file, whatever it is asked for
        source = path if zipped else io.BytesIO(pathlib.Path(path).read_bytes())
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # plain data, in many published checkpoints
            state = torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
        state = state["state_dict"] if isinstance(state.get("state_dict"), dict) else state
        return {k: v for k, v in state.items() if isinstance(k, str)}, {}


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def load_strictly(model, state, path, assign=False):
    try:
        model.load_state_dict(state, assign=assign)
    except RuntimeError as error:  # names and shapes that differ, in many lines
        raise UserError(
            f"{path} does not fit: {' '.join(str(error).split(':', 1)[-1].split())[:300]}"
        ) from None
    return model
