"""The error for users, atomic writes, and checked readers of weights, .npz files and arrays.

Every other file may import this one, which imports nothing of ours. "Checked" means that a damaged
file is refused in one sentence, wherever its format can show the damage, and that no file makes its
reader run code."""

import _compat_pickle
import argparse
import contextlib
import glob
import hashlib
import io
import json
import math
import os
import pathlib
import pickletools
import zipfile
from collections import OrderedDict

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
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError) and error.filename is None:
            # A full disk does not say whose file it had no room for.
            error.filename = path
        raise


def refuse_unwritable(path):
    """Raises a UserError, before long work, where its result could not be written to `path`."""
    folder = os.path.dirname(os.path.abspath(path))
    reason = None
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.isdir(path):
            reason = "it is a folder"
        elif not os.access(folder, os.W_OK):
            reason = f"no permission to write into {folder}"
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
    if reason is not None:
        raise UserError(f"cannot write {path} ({reason}); name another --out")


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


def network_hash(network):
    """The state_hash of a network, which does not depend on the file that its weights are from. Its
    tables of positions do not count: timm resamples them to the size of the pictures, and their
    last bits may differ between machines."""
    state = network.state_dict()
    return state_hash({name: state[name] for name in state if "pos" not in name})


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


def open_array(path, dtype, shape, mode="r+"):
    """A memory map of an .npy file, to read and to write, or with mode "r" to read. Raises
    UserError unless it is a whole array of this type and shape: np.load believes any header, and
    where it maps a cut file for writing, it fills up with zeros what is missing."""
    found = None
    # NumPy's parser of headers raises a dozen types of errors.
    with contextlib.suppress(Exception):
        array = np.load(path, mmap_mode="r")
        size = array.offset + array.nbytes
        found = (array.dtype, array.shape, size, array.flags.c_contiguous)
    if found != (dtype, shape, os.path.getsize(path), True):
        raise UserError(f"{path} is damaged; remove its folder and rerun the command")
    return np.load(path, mmap_mode=mode)


# --------------------------------------------------------------------------------------------------
# Reading weights


def read_weights(path):
    """A .safetensors file, or a PyTorch checkpoint -> (state dict on the CPU, metadata as a dict of
    strings). Pickled code is never run. Raises UserError.

    A checkpoint has no metadata, but "left_out" names the classes and functions of other packages
    in it that were not read."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    with reading(path, "safetensors or as a checkpoint without code"):
        with open(path, "rb") as file:
            start = file.read(9)
        # A safetensors file has the length of a JSON header in 8 bytes, and then the header.
        if start[8:] == b"{":
            return read_safetensors(path)
        return read_checkpoint(path, is_zip=start[:4] == b"PK\3\4")


def read_safetensors(path):
    """-> (state dict, metadata)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it has no iterator
        return state, dict(file.metadata() or {})


def read_checkpoint(path, is_zip):
    """-> (state dict, metadata) of a file of torch.save's: a zip file with checksums, or, from
    before torch 1.6, one without."""
    if is_zip and not is_intact_zip(path):
        raise ValueError("it is damaged: a checksum differs")
    source = path
    if not is_zip:
        # A damaged file may claim more numbers than it holds. A reader of bytes in memory cannot
        # be made to take more; for a zip file, the memory map (mmap) has this effect.
        source = io.BytesIO(pathlib.Path(path).read_bytes())
    state, foreign = load_around_foreign(source, path, is_zip)
    if isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    kept = {}
    for name, value in state.items():
        if isinstance(name, str) and not isinstance(value, StandIn):
            kept[name] = value
    metadata = {}
    if foreign:
        metadata["left_out"] = ", ".join(foreign)
    return kept, metadata


# --------------------------------------------------------------------------------------------------
# Classes of other packages in checkpoints. Lightning, OmegaConf, NumPy and pathlib are common.
# torch.load refuses them with weights_only, so each gets a stand-in here, which does nothing. What
# is in os and sys is refused all the same.


class StandIn:
    """Takes the place of a class or function of another package: it can be called with anything and
    given any state, and forgets both."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class DictStandIn(StandIn):
    """Takes the place of a subclass of dict. torch.load fills plain dicts only."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


class ListStandIn(StandIn):
    """Takes the place of a subclass of list."""

    def __new__(cls, *args, **kwargs):
        return []


def load_around_foreign(source, path, is_zip):
    """torch.load with weights_only, with a stand-in for every class or function that it refuses.
    Returns the content and the names of these. Raises UserError where this fails because of them.

    source: `path`, or the bytes of a checkpoint that is no zip file as a binary file."""
    uses = uses_of_globals(read_pickles(source, is_zip))
    foreign = refused_globals(uses)
    stand_ins = [stand_in_for(name, uses[name]) for name in foreign]
    # Many published checkpoints also hold the arguments of their training, which are plain data.
    with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
        try:
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip)
        except Exception as error:
            if foreign:
                raise UserError(foreign_message(path, foreign)) from error
            raise
    if isinstance(content, StandIn):
        raise UserError(foreign_message(path, foreign))
    return content, foreign


def stand_in_for(path, use):
    """A new class that stands in for the global "module.name", under its name.
    use: what is done with it, of uses_of_globals."""
    base = dict(SETITEM=DictStandIn, APPEND=ListStandIn).get(use, StandIn)
    module, name = path.rsplit(".", 1)
    return type(name, (base,), dict(__module__=module))


def read_pickles(source, is_zip):
    """The pickle of a checkpoint's content as a binary file. source: a path (of a zip file), or the
    bytes of the older format as a binary file, which begin with five pickles."""
    if not is_zip:
        return io.BytesIO(source.getvalue())
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            if name.endswith("/data.pkl"):
                return io.BytesIO(archive.read(name))
    raise ValueError("it is no file of torch.save's")


def uses_of_globals(file):
    """The classes and functions that pickles name -> {"module.name": what is done with objects made
    by it: "SETITEM" (it is a dict), "APPEND" (it is a list) or "" (neither)}. Nothing is run.

    file: a binary file that begins with up to five pickles. This follows the stack of the pickle
    machine, with the name of its global in the place of each object."""
    uses = {}
    for _ in range(5):
        stack = []
        memo = {}
        try:
            for operation, argument, _ in pickletools.genops(file):
                follow(operation, argument, stack, memo, uses)
        except (ValueError, IndexError, KeyError):
            # What is no pickle: torch.load says what is wrong with it.
            break
    return uses


def follow(operation, argument, stack, memo, uses):
    """One operation of the pickle machine; see uses_of_globals. Changes stack, memo and uses."""
    name = operation.name
    if name == "GLOBAL":
        path = python3_name(*argument.split(" ", 1))
        uses.setdefault(path, "")
        stack.append(path)
    elif name in ("REDUCE", "NEWOBJ"):
        stack.pop()  # the arguments; the maker's name stays, for what it makes
    elif name in ("SETITEM", "SETITEMS", "APPEND", "APPENDS"):
        pop_values(operation, stack, keep=1)
        if stack[-1] in uses:
            uses[stack[-1]] = name.removesuffix("S")
    elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET", "GET"):
        stack.append(memo[argument])
    elif name == "BUILD":
        stack.pop()
    else:
        pop_values(operation, stack)
        for value in operation.stack_after:
            stack.append("(" if value is pickletools.markobject else None)


def pop_values(operation, stack, keep=0):
    """Removes from the stack what an operation takes, apart from the first `keep` values."""
    taken = operation.stack_before
    if pickletools.markobject in taken:
        while stack.pop() != "(":
            pass
        taken = taken[: taken.index(pickletools.markobject)]
    for _ in taken[keep:]:
        stack.pop()


def python3_name(module, name):
    """The "module.name" of a global in Python 3. Pickles of torch.save's have Python 2's."""
    if (module, name) in _compat_pickle.NAME_MAPPING:
        return ".".join(_compat_pickle.NAME_MAPPING[module, name])
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


def refused_globals(names):
    """Those of the globals "module.name" that torch.load refuses, in order. torch tells for a file
    only, so this makes one that names them all."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        lines = "".join("c{}\n{}\n".format(*name.rsplit(".", 1)) for name in names)
        archive.writestr("archive/data.pkl", b"\x80\2" + lines.encode() + b"N.")
        archive.writestr("archive/version", "3")
    file.seek(0)
    with torch.serialization.safe_globals([argparse.Namespace]):
        refused = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    return [name for name in names if name in refused]


def foreign_message(path, foreign):
    return (
        f"{path} is no plain checkpoint: it holds {foreign[0]}, which is not read because it may "
        "run code; where you trust the file, convert it in the project that wrote it: "
        "torch.save(network.state_dict(), FILE)"
    )


# --------------------------------------------------------------------------------------------------
# State dicts


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
