"""A run's folder: its lock, checkpoints and resuming, the log, and arrays that a killed run can go
on filling.
"""

import contextlib
import errno
import functools
import glob
import json
import math
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import torch
from safetensors import safe_open
from PIL import Image
from torch.utils._pytree import tree_map_only

from common.files import (
    UserError,
    first_line,
    is_intact_zip,
    load_strictly,
    open_array,
    reading,
    warn_if_unwritable,
    write_json,
    write_weights,
    writing,
)
from common.flags import FREE_FLAGS, MEASURED_FLAGS, settings_of
from common.pictures import save_grid
from common.processes import (
    barrier,
    from_first_process,
    mean_over_processes,
    progress,
    rank,
    say,
    world,
)
from common.training import reuse_passes

try:
    import fcntl
except ModuleNotFoundError:
    # Windows has none, and so no locks that end with their process.
    fcntl = None

# --------------------------------------------------------------------------------------------------
# The folder


def lock(folder, wait=False):
    """Makes this run the only one that writes into a folder, and removes half-written files that a
    killed run left there.

    The lock ends with the process, however it ends, or when the returned file number is closed
    (None on all processes but the first). While another run holds it, this raises a UserError or,
    with `wait`, waits. Where the file system has no locks, this warns, and the run goes on.
    """
    file = None
    if rank() == 0:
        try:
            os.makedirs(folder, exist_ok=True)
            file = os.open(os.path.join(folder, ".lock"), os.O_WRONLY | os.O_CREAT)
            _lock_file(file, folder, wait)
        except OSError as error:
            raise UserError(
                f"cannot write into {folder}: {error.strerror}; choose another folder with --out, "
                "for latents with --cache"
            ) from None
        _remove_half_written_files(folder)
    barrier()
    return file


# What a file system without locks answers: NFS without its lock service, Lustre without -o flock.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def _lock_file(file, folder, wait):
    """Locks an open file, given by its number, or does what `lock` says where it cannot."""
    if fcntl is None:
        _warn_of_no_locks("this system has no fcntl")
        return
    try:
        # Unlike flock's, these locks are not inherited by loader processes.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise UserError(
                f"another process is writing into {folder}; wait until it ends, or choose another "
                "--out"
            ) from None
        say(f"waiting for another process that writes into {folder}")
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_of_no_locks(f"{folder}: {error.strerror}")


@functools.cache
def _warn_of_no_locks(reason):
    """Warns once of each reason."""
    say(
        f"warning: no lock can be taken ({reason}); take care yourself that no two runs write into "
        "one folder at the same time"
    )


def _remove_half_written_files(folder):
    for place in (folder, os.path.join(folder, "checkpoints")):
        for path in glob.glob(os.path.join(glob.escape(place), "*.tmp")):
            os.remove(path)


def newest_result(name, what, command):
    """The path of the newest runs/**/<name> by modification time, which is also printed. Where
    there is none, raises a UserError that tells how to make one: `what` it is, and the `command`
    that makes it.
    """
    found = glob.glob(os.path.join("runs", "**", name), recursive=True)
    if not found:
        raise UserError(
            f"no {what} under runs/; make one with `{command}`, or a small one with `python "
            "demo.py`"
        )
    path = max(found, key=os.path.getmtime)
    say(f"using the newest {what}: {path}")
    return path


def provenance():
    """What made a result: commit, versions, device, number of processes, date."""
    git = subprocess.run(
        "git describe --always --dirty --abbrev=40 --exclude='*'",
        shell=True,
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.abspath(__file__)),
    )
    # Without git, or outside a repository, the output is empty.
    commit, _, dirty = git.stdout.strip().partition("-")
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    return dict(
        commit=commit or None,
        dirty=bool(dirty),
        python=sys.version.split()[0],
        torch=torch.__version__,
        device=device,
        processes=world(),
        date=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


# --------------------------------------------------------------------------------------------------
# Arrays that are filled block by block


def resumable_array(folder, name, dtype, shape, block):
    """Opens folder/<name>, a memory-mapped array that all processes fill together, `block` rows at
    a time. Returns the array, the marks of the blocks that are done (1) or not (0), and the numbers
    of those that are not. A rerun after a kill finds the finished blocks. Call mark_done after each
    block.
    """
    path = os.path.join(folder, name)
    marks_path = os.path.join(folder, "done.npy")
    blocks = math.ceil(shape[0] / block)
    # The marks are written last: where they exist, the array exists in full.
    if rank() == 0 and not os.path.exists(marks_path):
        os.makedirs(folder, exist_ok=True)
        _reserve_array(path, dtype, shape)
        with writing(marks_path) as file:
            np.save(file, np.zeros(blocks, np.uint8))
    barrier()
    array = open_array(path, dtype, shape)
    done = open_array(marks_path, np.uint8, (blocks,))
    todo = np.flatnonzero(done != 1)
    # No process may mark a block before all of them have read the list.
    barrier()
    return array, done, todo


def is_filled(folder, name, dtype, shape, block):
    """Whether all blocks of a resumable_array are done, so that it need not be written to. It may
    be in a folder of somebody else."""
    try:
        open_array(os.path.join(folder, name), dtype, shape, mode="r")
        blocks = math.ceil(shape[0] / block)
        done = open_array(os.path.join(folder, "done.npy"), np.uint8, (blocks,), mode="r")
    except (UserError, OSError):
        return False
    return bool((done == 1).all())


@contextlib.contextmanager
def filling(folder, name, dtype, shape, block):
    """The context in which all processes fill a resumable_array: its array, marks and unfinished
    blocks, or None if none is unfinished. No other run may write to the folder meanwhile; one that
    does is waited for."""
    # The first process decides for all: another run may be at its last block.
    if from_first_process(int(is_filled(folder, name, dtype, shape, block))):
        yield None
        return
    lock_file = lock(folder, wait=True)
    yield resumable_array(folder, name, dtype, shape, block)
    barrier()
    if lock_file is not None:
        # From here on the array is only read, which others may do at the same time.
        os.close(lock_file)


def _reserve_array(path, dtype, shape):
    """Makes an .npy file of zeros and takes its room on the disk: a process that writes to a mapped
    file on a full disk is killed by the system, without a message.
    """
    try:
        np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
        # macOS has no posix_fallocate.
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path)
        gigabytes = math.prod(shape) * np.dtype(dtype).itemsize / 1e9
        raise UserError(f"cannot write {path}, {gigabytes:.3g} GB: {error.strerror}") from None


def mark_done(array, done, k):
    """Marks block k, whose rows have been written."""
    # The rows must be on the disk before the mark that says so.
    array.flush()
    done[k] = 1
    done.flush()


# --------------------------------------------------------------------------------------------------
# Checkpoints


def list_checkpoints(folder):
    """Paths of the checkpoints in a run's folder, the oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), "checkpoints", "*.pt")))


def newest_checkpoint(folder):
    """Path of the newest checkpoint in a run's folder, or None."""
    paths = list_checkpoints(folder)
    return paths[-1] if paths else None


def save_checkpoint(folder, step, state, keep_every=0):
    """Writes a training state to folder/checkpoints/<step>.pt. The file is read back and checked
    before it gets that name. The last two checkpoints are kept, and one of every `keep_every` steps
    (0: no others). Raises OSError.
    """
    with writing(os.path.join(folder, "checkpoints", f"{step:09d}.pt")) as file:
        torch.save(state, file)
        file.flush()
        if not is_intact_zip(file.name):
            raise OSError(
                "what was read back differs from what was written: the disk may be failing"
            )
    for old in list_checkpoints(folder)[:-2]:
        old_step = int(os.path.basename(old).removesuffix(".pt"))
        if keep_every == 0 or old_step % keep_every != 0:
            os.remove(old)


def load_checkpoint(folder, device):
    """The state in the newest undamaged checkpoint, or None where there are no checkpoints. A
    damaged one is named and the one before it is tried; if all are damaged, raises a UserError.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            if is_intact_zip(path):
                return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:
            # A whole zip file that is not a checkpoint: torch.load raises many types.
            say(f"note: {path}: {first_line(error)}")
        say(f"warning: {path} is damaged, using the one before it")
    if paths:
        raise UserError(
            f"none of the {len(paths)} checkpoints in {folder} can be read; start anew with "
            "--overwrite"
        )
    return None


def training_state(parts, step, args, log, data):
    """What save_checkpoint writes and `resume` reads: the state of each part, {name: module or
    optimizer}, the step, the flags, the unfinished sums of the log, and what tells whether the
    pictures are still the same."""
    state = {name: part.state_dict() for name, part in parts.items()}
    pictures = dict(fingerprint=data.fingerprint, count=len(data), classes=data.classes)
    return dict(state, step=step, arguments=vars(args), running=log.sums(), data=pictures)


class Saver:
    """Writes a run's weights and training state from the first process, in a thread, so that
    training continues meanwhile. A failed write is a warning at once, and an error only if the last
    one failed. Earlier checkpoints stay as they are.
    """

    def __init__(self, folder, keep_every=0):
        self.folder = folder
        self.keep_every = keep_every
        self.thread = None
        self.error = None

    def save(self, step, weights, state):
        """state is for save_checkpoint; weights is {file name: (kind, state dict, config, info)}
        for write_weights. The thread writes copies in host memory, since training changes the
        tensors. A tensor that is in both is copied once.
        """
        if rank() != 0:
            return
        self.wait()
        copy_to_host = functools.cache(lambda tensor: tensor.detach().to("cpu", copy=True))
        copies = tree_map_only(torch.Tensor, copy_to_host, (weights, state))
        self.thread = threading.Thread(target=self.write, name="saver", args=(step, *copies))
        self.thread.start()

    def write(self, step, weights, state):
        self.error = None
        try:
            # It tells these weights from those of a run whose checkpoints were taken away.
            os.makedirs(os.path.join(self.folder, "checkpoints"), exist_ok=True)
            for name, (kind, part, config, info) in weights.items():
                path = os.path.join(self.folder, name)
                write_weights(path, kind, part, config, dict(info, **provenance()))
            save_checkpoint(self.folder, step, state, self.keep_every)
        # torch.save turns some failed writes into RuntimeError.
        except (OSError, RuntimeError) as error:
            self.error = (
                f"cannot save step {step} in {self.folder}: {error}; "
                f"the last good checkpoint is {newest_checkpoint(self.folder) or 'none'}"
            )
            say(f"warning: {self.error}; training continues")

    def wait(self):
        if self.thread is not None:
            self.thread.join()

    def close(self):
        """Waits for the last save. Raises a UserError if it failed."""
        self.wait()
        if self.error:
            raise UserError(f"{self.error}; make room and rerun the command")


# --------------------------------------------------------------------------------------------------
# Resuming


def resume(args, free, parts, total, device, data, labelled=False):
    """Locks --out and loads its newest checkpoint into `parts`, {name: module or optimizer}, in
    their order.

    Returns the step to continue from and the log's unfinished sums: (0, None) for a new run, (None,
    None) for one that has all of its `total` steps. Raises a UserError where a flag that is not in
    `free`, FREE_FLAGS or --change differs, and for other pictures. data: those of --data. labelled:
    whether the run learns from their labels, so that their classes must be those of before.
    """
    refuse_out_in_data(args.out, args.data)
    own = "sit.safetensors" if labelled else "vae.safetensors"
    refuse_other_stage(args.out, own)
    lock(args.out)
    state = None
    if not args.overwrite:
        state = load_checkpoint(args.out, device)
    if state is None:
        if args.resume:
            raise UserError(f"--resume: {args.out} holds no checkpoint")
        if not args.overwrite:
            refuse_weights_alone(args.out, own)
        if rank() == 0:
            for path in list_checkpoints(args.out):
                os.remove(path)
        return 0, None

    # SiT runs of older versions keep vae_hash beside the arguments.
    saved = settings_of(dict(vae_hash=state.get("vae_hash")) | state["arguments"], args)
    refuse_other_settings(args, saved, free | FREE_FLAGS)
    reuse_passes(args, saved, device)
    if labelled:
        keep_classes(args, state, data)
    compare_data(args, state, data)
    if state["step"] >= total:
        say(f"done      {args.out} has its {state['step']} steps already")
        return None, None
    with reading(args.out, "a run of this version of the code; begin anew with --overwrite"):
        for name, part in parts.items():
            load_part(part, state[name], args.out)
    say(f"resuming  {args.out} at step {state['step']}")
    say_if_warming_up(args, saved)
    return state["step"], named_sums(state["running"])


def load_part(part, state, folder):
    """Loads the state of a module or optimizer from a run's folder. Raises UserError, with the
    names, for a module of another version of the code that has other weights."""
    if isinstance(part, torch.nn.Module):
        origin = f"the checkpoint in {folder}, of another version (begin anew with --overwrite),"
        load_strictly(part, state, origin)
    else:
        part.load_state_dict(state)
        match_memory_formats(part)


def refuse_out_in_data(out, data):
    """Raises a UserError for a run in the folder of its pictures, whose grids would be pictures of
    the data at the next start. Hidden folders are no part of the data."""
    inside = os.path.relpath(os.path.realpath(out), os.path.realpath(data))
    parts = inside.split(os.sep)
    is_hidden = any(part.startswith(".") and part != "." for part in parts)
    if os.path.isdir(data) and not is_hidden:
        raise UserError(
            f"--out {out} is in the folder of --data {data}: what a run writes would become part "
            "of its data; give an --out elsewhere"
        )


def refuse_other_stage(folder, own):
    """Raises a UserError where a folder holds a run of the other stage, whose checkpoints a run of
    this one would remove. own: the name of the weights that this stage writes."""
    names = [os.path.basename(path) for path in glob.glob(f"{glob.escape(folder)}/*.safetensors")]
    others = {"vae.safetensors", "sit.safetensors"} & set(names)
    if others and own not in others and list_checkpoints(folder):
        raise UserError(
            f"{folder} holds a run of the other stage ({others.pop()} and its checkpoints); give "
            "each stage its own --out"
        )


def refuse_weights_alone(folder, name):
    """Raises a UserError where a folder holds the weights of a run without its checkpoints, as a
    copy may: a new run would write over them. A run that was killed in its first save left the
    folder for its checkpoints."""
    path = os.path.join(folder, name)
    if os.path.exists(path) and not os.path.isdir(os.path.join(folder, "checkpoints")):
        raise UserError(
            f"{path} is there without the folder checkpoints/, which is needed to resume: restore "
            "it, give another --out (and --init to start from these weights), or begin anew with "
            "--overwrite"
        )


def say_if_warming_up(args, saved):
    if args.ema_warmup and not saved["ema_warmup"]:
        say("note: its EMA now warms up; --no-ema-warmup goes on as the run began")


def refuse_other_settings(args, saved, free):
    """Raises a UserError that names every flag, but the `free` ones, whose value is not the saved
    one. What differs by leave of --change, or in what is measured, is said.
    """
    if args.lr_schedule == "cosine":
        # The learning rate of every step depends on the number of the last one.
        free = free - {"steps", "epochs"}
    may_change = flags_to_change(args) | MEASURED_FLAGS
    differ = []
    for name in vars(args):
        if name in free - MEASURED_FLAGS or name not in saved:
            continue
        words = describe_change(name, saved, vars(args))
        if words is None:
            continue
        if may_change.isdisjoint({name, name.removesuffix("_hash")}):
            differ.append(words)
        else:
            say(f"changed   {words}")
    if differ:
        raise UserError(
            f"{args.out} holds a run with other settings: {'; '.join(differ)}; use the same flags "
            "to resume, allow a change with --change, give another --out, or begin anew with "
            "--overwrite"
        )


def describe_change(name, saved, now):
    """How a setting differs between two dicts {name: value}, in words, or None if it does not.

    <flag>_hash tells what the file of a flag holds, so it counts instead of the file's path."""
    if is_same_setting(name, saved[name], now[name]):
        return None
    flag = name.removesuffix("_hash")
    before = saved[name]
    after = now[name]
    if flag != name:
        before = describe_file(saved.get(flag), before)
        after = describe_file(now[flag], after)
    return f"--{flag.replace('_', '-')} was {before} and is now {after}"


def is_same_setting(name, before, after):
    if name in MEASURED_FLAGS and before and after:
        # Two spellings of one path. It does not change a hash.
        return os.path.realpath(before) == os.path.realpath(after)
    return before == after


def describe_file(path, content):
    """A flag's path, or paths, or None, and the hash of what is there, None without a file -> words
    for a message."""
    if content is None:
        return "not given"
    if not path:
        path = "the default"
    elif not isinstance(path, str):
        path = " ".join(path)
    return f"{path} with the hash {content}"


def flags_to_change(args):
    """The names in --change as they are in `args`. Raises a UserError for one that is no flag."""
    names = {name.lstrip("-").replace("-", "_") for name in args.change}
    unknown = sorted(names - set(vars(args)))
    if unknown:
        raise UserError(f"--change {unknown[0]}: there is no such flag; write, for example, lr")
    return names


def compare_data(args, state, data):
    """Raises a UserError if the pictures are not those that a checkpoint records, unless --change
    names data. It does not matter where they are.
    """
    recorded = state.get("data")
    if recorded is None:
        before = state["arguments"]["data"]
        after = args.data
        same = os.path.realpath(before) == os.path.realpath(after)
        say(
            f"note: the checkpoint in {args.out} is of an older version, which recorded only the "
            "folder of its pictures; what is there now is taken for the same"
        )
    else:
        before = f"{recorded['count']} with fingerprint {recorded['fingerprint']}"
        after = f"{len(data)} with fingerprint {data.fingerprint}, in {args.data}"
        same = recorded["fingerprint"] == data.fingerprint
    if same:
        return
    words = f"the pictures were {before}, and are now {after}"
    if "data" not in flags_to_change(args):
        raise UserError(
            f"{args.out} holds a run on other data: {words}; give the same pictures, or resume on "
            "these with --change data"
        )
    say(f"changed   {words}")


def keep_classes(args, state, data):
    """Gives the classes of `data` the labels that they had before. Raises a UserError if there are
    others now.
    """
    recorded = state.get("data") or published_info(os.path.join(args.out, "sit.safetensors"))
    classes = recorded.get("classes")
    if classes is None or classes == data.classes:
        return
    gone = [repr(name) for name in classes if name not in data.classes]
    new = [repr(name) for name in data.classes if name not in classes]
    if gone or new:
        raise UserError(
            f"{args.out} was trained on other classes: {', '.join(gone[:4]) or 'none'} of its "
            f"{len(classes)} are gone, {', '.join(new[:4]) or 'none'} of the {len(data.classes)} "
            f"in {args.data} are new; give the folders their names back, or begin anew with "
            "another --out"
        )
    say(f"note: the labels are those of before, in the order {', '.join(classes[:4])}, ...")
    labels = np.array([classes.index(name) for name in data.classes])
    data.labels = labels[data.labels]
    data.classes = classes


def published_info(path):
    """What a weight file of ours tells beside the weights, {} if there is none."""
    if not os.path.exists(path):
        return {}
    with reading(path, "weights of ours"), safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["info"])


def match_memory_formats(optimizer):
    """Gives every moment of an optimiser the memory format of its parameter. Fused AdamW walks both
    in the order of their storage, so a state that was saved in channels_last scrambles the update
    of contiguous weights, and the reverse.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


# --------------------------------------------------------------------------------------------------
# The log: config.json, metrics.jsonl, samples/*.png, and the same as TensorBoard's event files

# Checkpoints before the log knew its terms by name hold one vector: the sums of these, then the
# counts of bad and good steps. Its length tells the stage.
OLD_TERMS = {
    9: ("align", "recon", "lpips", "kl", "gan", "disc", "grad_norm"),
    5: ("flow", "repa", "grad_norm"),
}


def named_sums(running):
    """The log's unfinished sums in a checkpoint, of this version or an older one -> {"bad_steps":
    scalar, "sums": {term: scalar}, "counts": {term: scalar}}.
    """
    if not torch.is_tensor(running):
        return running
    *sums, bad, good = running
    terms = zip(OLD_TERMS[len(running)], sums, strict=True)
    # The old vector held a 0 for every term that was not in use.
    used = {term: value for term, value in terms if value != 0}
    return dict(bad_steps=bad, sums=used, counts=dict.fromkeys(used, good))


class EventFiles:
    """A run's numbers and pictures for TensorBoard, in <folder>/tensorboard. Those of steps after
    `start`, left by a run that was killed, are marked as dropped."""

    def __init__(self, folder, start):
        # Imported here: it takes seconds, and the package may not be installed.
        from torch.utils.tensorboard import SummaryWriter

        first_step = start + 1 if start > 0 else 0
        self.path = os.path.join(folder, "tensorboard")
        self.writer = SummaryWriter(self.path, purge_step=first_step)

    def numbers(self, line):
        """Writes a line of metrics.jsonl, {"step": int, name: float}, each number by its name."""
        for name, value in line.items():
            if name != "step":
                self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()

    def picture(self, step, path):
        """Writes the PNG file at `path`."""
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self.writer.add_image("pictures", pixels, step, dataformats="HWC")
        self.writer.flush()


class RunLog:
    """Progress bar and metrics.jsonl of a training run, on the first process; the others only take
    part in the means.

    `add` sums up the losses on the device, each under its name, so that nothing waits for them;
    `line` writes the means over the good steps since the last line. Lines after step `start`, left
    by a run that was killed, are dropped.
    """

    def __init__(self, args, running, start, total, steps_per_epoch):
        """running: the unfinished sums that `resume` returned, or None."""
        self.args = args
        self.start = start
        self.total = total
        self.steps_per_epoch = steps_per_epoch
        self.running = running or self._no_sums()
        self.last_time = time.time()
        self.last_step = start
        self.is_first_process = rank() == 0
        if self.is_first_process:
            self._open_files()
        self.bar = progress(total=total, leave=True, initial=start, unit="step", smoothing=0.05)
        per_pass = args.batch_size // (world() * args.accum)
        say(
            f"training  steps {start} to {total}, {total / steps_per_epoch:.1f} epochs of "
            f"{steps_per_epoch:.1f} steps; batch "
            f"{args.batch_size} = {world()} processes x {args.accum} passes x {per_pass}"
        )

    def _no_sums(self):
        return dict(bad_steps=0, sums={}, counts={})

    def _open_files(self):
        folder = self.args.out
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "metrics.jsonl")
        with open(path, "a+b") as file:
            file.seek(0)
            # The last line may be cut off, hence the newline in the pattern.
            lines = re.findall(rb'^({"step": (\d+), .*}\n)', file.read(), re.MULTILINE)
        with writing(path) as file:
            file.write(b"".join(line for line, step in lines if 0 < int(step) <= self.start))
        # Kept open with a large buffer: what a full disk does not take stays in it until a later
        # line.
        self.file = open(path, "ab", buffering=2**20)  # noqa: SIM115 (it stays open as long as the run)
        record = dict(arguments=vars(self.args), provenance=provenance())
        write_json(os.path.join(folder, "config.json"), record)
        self.event_files = None
        if vars(self.args).get("tensorboard"):
            self.event_files = EventFiles(folder, self.start)

    def due(self, every, step):
        """Whether something that happens at every `every`-th step (0: never) happens before this
        one; it also does at the end, and never at the step that a run starts or resumes from.
        """
        if every == 0:
            return False
        return step == self.total or (step % every == 0 and step > self.start)

    def add(self, losses, finite):
        """Adds the losses of one step, {term: scalar}, if it was finite (a bool tensor); else
        counts a bad step.
        """
        sums = self.running["sums"]
        counts = self.running["counts"]
        for term, loss in losses.items():
            sums[term] = sums.get(term, 0.0) + torch.where(finite, loss, 0.0)
            counts[term] = counts.get(term, 0.0) + finite.float()
        self.running["bad_steps"] = self.running["bad_steps"] + (~finite).float()
        self.bar.update()

    def sums(self):
        """The unfinished sums for a checkpoint. They become their means over the processes, here as
        in a run that resumes from the checkpoint with any number of processes."""
        self.running["sums"] = _means_over_processes(self.running["sums"])
        copies = dict(sums=dict(self.running["sums"]), counts=dict(self.running["counts"]))
        return dict(copies, bad_steps=self.running["bad_steps"])

    def line(self, step):
        """Writes the mean of each loss since the last line, over all processes, and the pictures a
        second.
        """
        if step == self.start:
            return
        means = self._read_means()
        self.running = self._no_sums()

        now = time.time()
        seconds = max(now - self.last_time, 1e-9)
        images_per_s = (step - self.last_step) * self.args.batch_size / seconds
        self.last_time = now
        self.last_step = step
        if self.is_first_process:
            words = {term: f"{value:.4g}" for term, value in means.items()}
            self.bar.set_postfix(words, refresh=False)
            epoch = round(step / self.steps_per_epoch, 4)
            self.write(dict(step=step, epoch=epoch, **means, images_per_s=round(images_per_s, 2)))

    def _read_means(self):
        """The mean of each loss over the good steps, {term: float}, and "bad_steps" if there were
        any. All of it is read at once, since each reading waits for the GPU."""
        sums = _means_over_processes(self.running["sums"])
        counts = self.running["counts"]
        bad_steps = self.running["bad_steps"]
        scalars = [*sums.values(), *(counts[term] for term in sums), bad_steps]
        numbers = torch.stack(scalars).tolist()
        means = {}
        for i, term in enumerate(sums):
            count = numbers[len(sums) + i]
            if count > 0:
                means[term] = numbers[i] / count
        if numbers[-1] > 0:
            means["bad_steps"] = round(numbers[-1])
        return means

    def write(self, line):
        """Appends a line to metrics.jsonl. A failed write is a warning, and no line is lost or cut:
        see _open_files.
        """
        with warn_if_unwritable(self.file.name):
            self.file.write((json.dumps(line) + "\n").encode())
            self.file.flush()
        if self.event_files is not None:
            with warn_if_unwritable(self.event_files.path):
                self.event_files.numbers(line)

    def note(self, step, values):
        """Prints and writes measurements other than the losses, {name: float}."""
        if self.is_first_process:
            say(f"step {step}: " + ", ".join(f"{name} {v:.4f}" for name, v in values.items()))
            self.write(dict(step=step, **values))

    def measure(self, step, measurements, subject):
        """Takes the measurements that are due: [(every so many steps, function from the subject to
        {name: float})]."""
        for every, measurement in measurements:
            if self.due(every, step):
                self.note(step, measurement(subject))

    def pictures(self, step, rows):
        """Writes rows of pictures, each uint8 (n,3,H,W), to samples/<step>.png."""
        path = os.path.join(self.args.out, "samples", f"{step:07d}.png")
        with warn_if_unwritable(path):
            save_grid(path, rows)
            if self.event_files is not None:
                self.event_files.picture(step, path)

    def close(self, step, done):
        """Ends the progress bar and prints `done`, or that a signal stopped the run before its last
        step.
        """
        self.bar.close()
        if step == self.total:
            say(done)
        else:
            say(
                f"stopped   by a signal at step {step}; rerun the command to resume from the last "
                f"checkpoint in {self.args.out}"
            )


def _means_over_processes(sums):
    """{term: scalar} -> the same, each the mean over the processes."""
    if not sums:
        return {}
    means = mean_over_processes(torch.stack(list(sums.values())))
    return dict(zip(sums, means, strict=True))
