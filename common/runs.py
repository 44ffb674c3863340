"""What a run leaves in its folder: lock, checkpoints, log, resumable arrays."""

import contextlib
import fcntl
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
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from common.files import (
    UserError,
    first_line,
    is_intact_zip,
    open_array,
    reading,
    warn_if_unwritable,
    write_json,
    write_weights,
    writing,
)
from common.flags import FREE_FLAGS
from common.pictures import save_grid
from common.processes import barrier, mean_over_processes, rank, say, world


def resumable_array(folder, name, dtype, shape, block):
    """folder/<name>, a memory-mapped array that all processes fill together, `block` rows at a time -> array, marks of the
    blocks that are filled, numbers of those that are not. A killed run goes on with these. Call mark_done after each."""
    path, marks = os.path.join(folder, name), os.path.join(folder, "done.npy")
    if rank() == 0 and not os.path.exists(marks):
        os.makedirs(folder, exist_ok=True)
        try:
            np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
            if hasattr(os, "posix_fallocate"):  # not on macOS
                with open(
                    path, "r+b"
                ) as file:  # a mapped file that meets a full disk later kills the process
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(path)
            raise UserError(
                f"cannot write {path}, {math.prod(shape) * np.dtype(dtype).itemsize / 1e9:.3g} GB: {error.strerror}"
            ) from None
        with writing(marks) as file:  # last: its presence says that the array is there
            np.save(file, np.zeros(-(-shape[0] // block), np.uint8))
    barrier()
    array, done = (
        open_array(path, dtype, shape),
        open_array(marks, np.uint8, (-(-shape[0] // block),)),
    )
    todo = np.flatnonzero(done != 1)
    barrier()  # nobody marks a block before all have read the list
    return array, done, todo


def mark_done(array, done, k):
    array.flush()  # first: a mark says that its rows are on the disk
    done[k] = 1
    done.flush()


def lock(folder, wait=False):
    """Makes this run the only one that writes into a folder, until its process ends, however it ends, or closes the file of
    this number; refuses, or waits for, another. Also removes half-written files that a killed run left there."""
    file = None
    if rank() == 0:
        try:
            os.makedirs(folder, exist_ok=True)
            file = os.open(os.path.join(folder, ".lock"), os.O_WRONLY | os.O_CREAT)
            fcntl.lockf(
                file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # unlike flock's, not inherited by loaders
        except BlockingIOError:
            if not wait:
                raise UserError(
                    f"another process is writing into {folder}; wait for its end, or name another --out"
                ) from None
            say(f"waiting for another process that writes into {folder}")
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"cannot write into {folder}: {error.strerror}; name another with --out, for latents --cache"
            ) from None
        for inside in (folder, os.path.join(folder, "checkpoints")):
            for path in glob.glob(os.path.join(glob.escape(inside), "*.tmp")):
                os.remove(path)
    barrier()
    return file


class Saver:
    """Writes a run's weights and training state, on the first process, in a thread, from a copy in host memory. What cannot
    be written is said at once and training goes on; only at the end it is an error. What was saved before stays good."""

    def __init__(self, folder, keep_every=0):
        self.folder, self.keep_every, self.thread, self.error = folder, keep_every, None, None

    def save(self, step, weights, state):
        """state: for save_checkpoint; weights: {file name: (kind, state dict, config, info)} for write_weights. A tensor that
        stands in both is copied once."""
        if rank() == 0:
            self.wait()
            to_host = functools.cache(lambda x: x.detach().to("cpu", copy=True))
            self.thread = threading.Thread(
                target=self.write,
                name="saver",
                args=(step, *tree_map_only(torch.Tensor, to_host, (weights, state))),
            )
            self.thread.start()

    def write(self, step, weights, state):
        self.error = None
        try:
            for name, (kind, part, config, info) in weights.items():
                write_weights(
                    os.path.join(self.folder, name), kind, part, config, dict(info, **provenance())
                )
            save_checkpoint(self.folder, step, state, self.keep_every)
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch.save turns some failed writes into RuntimeError
            last = (list_checkpoints(self.folder) or ["none"])[-1]
            self.error = f"cannot save step {step} in {self.folder}: {error}; the last good checkpoint is {last}"
            say(f"warning: {self.error}; training goes on")

    def wait(self):
        if self.thread is not None:
            self.thread.join()

    def close(self):
        """Waits for the last save; raises if it failed."""
        self.wait()
        if self.error:
            raise UserError(f"{self.error}; make room and give the same command again")


def save_checkpoint(folder, step, state, keep_every=0):
    """The whole training state -> folder/checkpoints/<step>.pt, checked by reading it back before it gets this name. The
    last two are kept, and those of every `keep_every` steps."""
    with writing(os.path.join(folder, "checkpoints", f"{step:09d}.pt")) as file:
        torch.save(state, file)
        file.flush()
        if not is_intact_zip(file.name):
            raise OSError(
                "what was read back differs from what was written: the disk may be failing"
            )
    for old in list_checkpoints(folder)[:-2]:
        if not keep_every or int(os.path.basename(old)[:-3]) % keep_every:
            os.remove(old)


def list_checkpoints(folder):
    return sorted(glob.glob(os.path.join(glob.escape(folder), "checkpoints", "*.pt")))


def load_checkpoint(folder, device):
    """The newest whole checkpoint -> its state, or None where there is none. Damaged ones are named and passed by."""
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            if is_intact_zip(path):
                return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # whole, but not a checkpoint
            say(f"note: {path}: {first_line(error)}")
        say(f"warning: {path} is damaged, using the one before it")
    if paths:
        raise UserError(
            f"none of the {len(paths)} checkpoints in {folder} can be read; start anew with --overwrite"
        )
    return None


def resume(args, free, parts, total, device):
    """Makes --out this run's and loads its last state into its parts, in their order -> the step to go on from, None where
    all steps are done, and the sums of the unfinished line of metrics. Other settings than the run began with are refused,
    except for the flags named in `free`."""
    lock(args.out)
    state = None if args.overwrite else load_checkpoint(args.out, device)
    if state is None:
        if args.resume:
            raise UserError(f"--resume: {args.out} holds no checkpoint")
        for path in list_checkpoints(args.out) if rank() == 0 else ():
            os.remove(path)
        return 0, None
    saved, free = (
        {"vae_hash": state.get("vae_hash")} | state["arguments"],
        free | FREE_FLAGS,
    )  # where older SiT runs have it
    if args.lr_schedule == "cosine":
        free = free - {"steps", "epochs"}  # the rate of every step depends on the last one's number
    differ = [
        f"--{k.replace('_', '-')} was {saved[k]} and is now {v}"
        for k, v in vars(args).items()
        if k not in free and k in saved and saved[k] != v
    ]
    if differ:
        raise UserError(
            f"{args.out} holds a run with other settings: {'; '.join(differ)}; use the same flags to resume, "
            "another --out, or --overwrite to begin anew"
        )
    if state["step"] >= total:
        say(f"done      {args.out} has its {state['step']} steps already")
        return None, None
    with reading(args.out, "a run of this version of the code; begin anew with --overwrite"):
        for name, part in parts.items():
            part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):
                match_memory_formats(part)
    say(f"resuming  {args.out} at step {state['step']}")
    return state["step"], state["running"]


def match_memory_formats(optimizer):
    """Gives every moment of an optimiser its parameter's memory format. Fused AdamW walks both in the order of their
    storage, so a state that was saved in channels_last scrambles the update of contiguous weights, and the reverse."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def newest_result(name, what, command):
    """The newest runs/**/<name> by modification time, said aloud; or an error that tells how to make one."""
    found = glob.glob(os.path.join("runs", "**", name), recursive=True)
    if not found:
        raise UserError(
            f"no {what} under runs/; make one with `{command}`, or a small one with `python demo.py`"
        )
    path = max(found, key=os.path.getmtime)
    say(f"using the newest {what}: {path}")
    return path


def provenance():
    """What made this result: commit, versions, device."""
    git = subprocess.run(
        "git describe --always --dirty --abbrev=40 --exclude='*'",
        shell=True,
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.abspath(__file__)),
    )
    commit, _, dirty = git.stdout.strip().partition(
        "-"
    )  # nothing where there is no git, or no repository
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return dict(
        commit=commit or None,
        dirty=bool(dirty),
        python=sys.version.split()[0],
        torch=torch.__version__,
        device=device,
        processes=world(),
        date=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


class RunLog:
    """Progress bar and metrics.jsonl of a training run, on the first process; silent on the others.

    add sums up what line writes the means of; lines after `start`, left by a run that was killed, are dropped.
    `running`: since the last line, the sums of the losses called `names`, number of bad steps, number of good ones."""

    def __init__(self, args, names, running, start, total, steps_per_epoch, device):
        self.args, self.names, self.start, self.total, self.steps_per_epoch = (
            args,
            names,
            start,
            total,
            steps_per_epoch,
        )
        self.running = torch.zeros(len(names) + 2, device=device) if running is None else running
        self.main, folder = rank() == 0, args.out
        self.last_time, self.last_step = time.time(), start
        if self.main:
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, "metrics.jsonl")
            with open(path, "a+b") as file:
                file.seek(0)
                lines = re.findall(
                    rb'^({"step": (\d+), .*}\n)', file.read(), re.MULTILINE
                )  # the last one may be cut off
            with writing(path) as file:
                file.write(b"".join(line for line, step in lines if 0 < int(step) <= start))
            self.file = open(path, "ab", buffering=2**20)
            write_json(
                os.path.join(folder, "config.json"),
                dict(arguments=vars(args), provenance=provenance()),
            )
        self.bar = tqdm(
            total=total,
            initial=start,
            disable=not self.main,
            unit="step",
            smoothing=0.05,
            mininterval=0.5 if sys.stderr.isatty() else 20,
        )
        say(
            f"training  steps {start} to {total}, {total / steps_per_epoch:.1f} epochs of {steps_per_epoch:.1f} steps; batch "
            f"{args.batch_size} = {world()} processes x {args.accum} passes x {args.batch_size // (world() * args.accum)}"
        )

    def every(self, n, step):
        """Whether a turn of the loop is one of every n steps; the last is, unless n is 0."""
        return n > 0 and (step == self.total or step % n == 0 and step > self.start)

    def add(self, losses, good):
        """losses (n,) of one step, and whether it counts, on the device: nothing waits for them."""
        self.running[:-2] += torch.where(good, losses, 0)
        self.running[-2] += ~good
        self.running[-1] += good
        self.bar.update()

    def line(self, step, active):
        """Writes the means of the losses named in `active` since the last line, over all processes."""
        *sums, bad, good = mean_over_processes(self.running.clone()).tolist()
        self.running.zero_()
        now = time.time()
        rate = (step - self.last_step) * self.args.batch_size / max(now - self.last_time, 1e-9)
        self.last_time, self.last_step = now, step
        if self.main:
            values = {k: v / good for k, v in zip(self.names, sums) if k in active and good}
            if bad:
                values["bad_steps"] = round(bad)
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
            self.write(
                dict(
                    step=step,
                    epoch=round(step / self.steps_per_epoch, 4),
                    **values,
                    images_per_s=round(rate, 2),
                )
            )

    def write(self, line):
        """What a full disk does not take stays in the file's buffer until a later line: none is lost or cut."""
        with warn_if_unwritable(self.file.name):
            self.file.write((json.dumps(line) + "\n").encode())
            self.file.flush()

    def pictures(self, step, rows):
        path = os.path.join(self.args.out, "samples", f"{step:07d}.png")
        with warn_if_unwritable(path):
            save_grid(path, rows)

    def note(self, step, values):
        """A line of measurements other than the losses, also said."""
        if self.main:
            say(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
            self.write(dict(step=step, **values))

    def close(self, step, done):
        """The last words, after the last save."""
        self.bar.close()
        say(
            done
            if step == self.total
            else f"stopped   by a signal at step {step}; the same command goes on from the last "
            f"checkpoint in {self.args.out}"
        )
