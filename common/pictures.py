"""Image folders, ADM's preprocessing, batches, and the way between 8 bits and [-1,1]."""

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.draws import epoch_order, uniform
from common.files import UserError, first_line, open_npz, warn_if_unwritable, writing
from common.processes import (
    asked_to_stop,
    at_signal,
    available_cores,
    barrier,
    conv_memory_format,
    rank,
    say,
    world,
)

# Endings of the names that count as pictures.
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")

# What a file may hold, whatever its name says. Pillow's other formats are not opened: reading some
# of them starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")

# --------------------------------------------------------------------------------------------------
# One file: opening it, and checking it without decoding


def open_picture(path):
    """-> PIL image whose pixels are not read yet.

    Raises ValueError for a decompression bomb, and for a strip that would become one when its short
    side is enlarged."""
    image = Image.open(path, formats=FORMATS)
    problem = None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        problem = f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    elif max(image.size) > 100 * min(image.size):
        problem = "one side is more than 100 times the other"
    if problem is not None:
        image.close()
        raise ValueError(f"its size is {image.width}x{image.height}: {problem}")
    return image


def has_jpeg_end(image, path):
    """Whether the last KiB of an opened JPEG file contains the mark that ends its data."""
    image.fp.seek(-min(os.path.getsize(path), 1024), os.SEEK_END)
    return b"\xff\xd9" in image.fp.read()


def check_picture(path, decode=False):
    """Checks a file's header and its end, which is cheap, or with `decode` all of its pixels.

    -> (width, height), or words that say what is wrong with the file."""
    if not os.path.isfile(path):
        if os.path.islink(path):
            return "it is a broken link"
        return "it is not a regular file"
    try:
        with open_picture(path) as image:
            if image.mode == "F":
                return "floating-point pixels have no known range"
            size = image.size
            # Without the mark the file is cut, or other data follow the picture: decoding tells.
            if image.format in ("JPEG", "MPO") and not has_jpeg_end(image, path):
                decode = True
            # This compares the checksums of a PNG and reaches its end. It does nothing for others.
            image.verify()
        if decode:
            with open_picture(path) as image:
                image.load()
    except Exception as error:  # Pillow's decoders raise a dozen types.
        return first_line(error)
    return size


# --------------------------------------------------------------------------------------------------
# A folder: listing it, refusing odd layouts, checking its pictures


def list_files(root):
    """Walks through a folder, following links to other folders.

    -> names of its pictures relative to root, sorted; and {folder relative to root: modification
    time in ns} of root and every folder below it."""

    def refuse(error):
        raise UserError(f"cannot list {error.filename!r}: {error.strerror}")

    files = []
    folders = {}
    for folder, _, names in os.walk(root, followlinks=True, onerror=refuse):
        refuse_endless_link(folder)
        relative = os.path.relpath(folder, root)
        folders[relative] = os.stat(folder).st_mtime_ns
        for name in names:
            if name.lower().endswith(IMAGE_TYPES):
                files.append(os.path.normpath(os.path.join(relative, name)))
    return sorted(files), folders


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


def refuse_odd_layout(root, files, folders):
    """Raises a UserError for a folder that is not laid out as <class>/<picture> or as <picture>."""
    if not files:
        raise UserError(f"{root} has no pictures (files named {' '.join(IMAGE_TYPES)})")
    class_folders = sorted(f for f in folders if f != "." and os.sep not in f)
    if len(class_folders) <= 3 and not {"train", "val", "test"}.isdisjoint(class_folders):
        raise UserError(
            f"{root} holds the folders {', '.join(class_folders)} instead of classes: "
            f"give one of them, such as {os.path.join(root, class_folders[-1])}"
        )
    empty = sorted(set(class_folders) - {class_name(file) for file in files})
    if empty:
        raise UserError(
            f"class folders without pictures: {len(empty)}, the first is "
            f"{os.path.join(root, empty[0])!r}; add pictures or remove it"
        )


def check_pictures(paths, decode):
    """check_picture of every path, in order, by several threads or processes."""
    check = functools.partial(check_picture, decode=decode)
    many = len(paths) > 5000
    # Processes check faster than threads, but they take a while to start.
    executor = ProcessPoolExecutor if many else ThreadPoolExecutor
    with executor(min(16, available_cores())) as pool:
        results = pool.map(check, paths, chunksize=100)
        bar = tqdm(results, "checking pictures", len(paths), disable=not many, leave=False)
        return list(bar)


def refuse_unreadable(root, files, problems, skip_bad):
    """problems: {index of a picture that cannot be read: what is wrong with it}.

    Raises a UserError if there are any, unless they are to be skipped and each class has others."""
    if not problems:
        return
    readable = {class_name(file) for i, file in enumerate(files) if i not in problems}
    lost = sorted({class_name(file) for file in files} - readable)
    if skip_bad and not lost:
        return
    count = "1 picture" if len(problems) == 1 else f"{len(problems)} pictures"
    first = min(problems)
    path = os.path.join(root, files[first])
    if lost:
        remedy = f"repair or remove it; class {lost[0]!r} has no picture that can be read"
    else:
        remedy = "repair or remove it, or train with --skip-bad to use others of its class instead"
    raise UserError(f"{count} cannot be read, the first is {path!r}: {problems[first]}; {remedy}")


def fingerprint_files(root, files):
    """-> 16 hexadecimal digits, a hash of the pictures' names and sizes in bytes."""
    lines = []
    for file in files:
        path = os.path.join(root, file)
        size = os.path.getsize(path) if os.path.isfile(path) else -1
        lines.append(f"{file} {size}")
    # Names that are not UTF-8 keep their own bytes.
    text = "\n".join(lines).encode(errors="surrogateescape")
    return hashlib.sha256(text).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# A set of pictures


class ImageSet:
    """The pictures of a folder in ImageNet's layout, root/<class>/<picture>, or of a folder that
    holds pictures directly (one class).

    names: bytes (N,), relative to root, sorted. labels: int64 (N,), indices into classes.
    classes: list of folder names, sorted. smallest: the shortest side of any picture, in pixels.
    bad: indices of pictures that cannot be read. fingerprint: hash of the files' names and sizes.

    check_data: every picture is decoded once, before it is used.
    skip_bad: a picture that cannot be read is replaced by another one of its class; else it is a
    UserError, as is a folder that is absent, empty or oddly laid out.

    The list is made once and kept under runs/cache. It is used again until the modification time of
    a folder changes."""

    def __init__(self, root, check_data=False, skip_bad=False):
        self.root = os.path.abspath(root)
        self.check_data = check_data
        self.skip_bad = skip_bad
        if not os.path.isdir(root):
            raise UserError(
                f"{root}: no such folder; give one laid out as <class>/<picture> with --data "
                "(`python demo.py` makes a small one under runs/demo)"
            )
        root_hash = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        self.list_file = os.path.join("runs", "cache", f"files-{root_hash}.npz")
        # The first process makes the list while the others wait. They make their own only if the
        # first could not write it.
        if rank() == 0 and not self.read_list():
            self.make_list()
        barrier()
        if rank() != 0 and not self.read_list():
            self.make_list()
        if self.bad:
            say(
                f"note: {len(self.bad)} of {len(self)} pictures cannot be read; others of their "
                f"class take their place. The first is {self.path(min(self.bad))!r}"
            )

    def read_list(self):
        """Reads the list that an earlier start kept. -> whether there is one that still holds."""
        try:
            with open_npz(self.list_file) as file:
                header = json.loads(str(file["header"]))
                self.names = file["names"]
                self.labels = file["labels"]
                self.bad = set(file["bad"].tolist())
            self.classes = header["classes"]
            self.fingerprint = header["fingerprint"]
            self.smallest = header["smallest"]
            return self.is_sound() and self.is_current(header)
        except Exception:  # The list is absent, damaged or of another version: a new one is made.
            return False

    def is_sound(self):
        """Whether the parts of a list that was read fit together."""
        return (
            self.names.shape == self.labels.shape == (len(self.names),)
            and self.names.dtype.kind == "S"
            and self.labels.dtype == np.int64
            and set(self.labels.tolist()) == set(range(len(self.classes)))
        )

    def is_current(self, header):
        """Whether a list that was read is of the folders as they are now, and was checked and
        filtered as this set asks for."""
        if self.check_data and not header["decoded"]:
            return False
        if self.bad and not self.skip_bad:
            return False
        for folder, time_ns in header["folders"].items():
            if os.stat(os.path.join(self.root, folder)).st_mtime_ns != time_ns:
                return False
        return True

    def make_list(self):
        """Lists and checks the files, and keeps the result for the next start."""
        files, folders = list_files(self.root)
        refuse_odd_layout(self.root, files, folders)
        paths = [os.path.join(self.root, file) for file in files]
        sizes = {}
        problems = {}
        for i, result in enumerate(check_pictures(paths, self.check_data)):
            if isinstance(result, str):
                problems[i] = result
            else:
                sizes[i] = result
        refuse_unreadable(self.root, files, problems, self.skip_bad)

        class_names = [class_name(file) for file in files]
        self.classes = sorted(set(class_names))
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array([label_of[name] for name in class_names], np.int64)
        self.names = np.array([os.fsencode(file) for file in files])
        self.bad = set(problems)
        self.smallest = min(min(size) for size in sizes.values())
        self.fingerprint = fingerprint_files(self.root, files)
        self.keep_list(folders)

    def keep_list(self, folders):
        """Writes the list. folders: {folder relative to root: modification time in ns}."""
        header = {
            "folders": folders,
            "classes": self.classes,
            "fingerprint": self.fingerprint,
            "smallest": self.smallest,
            "decoded": self.check_data,
        }
        with warn_if_unwritable(self.list_file), writing(self.list_file) as file:
            np.savez(
                file,
                header=np.array(json.dumps(header)),
                names=self.names,
                labels=self.labels,
                bad=np.array(sorted(self.bad), np.int64),
            )

    def __len__(self):
        return len(self.names)

    def path(self, i):
        """-> path of picture i."""
        return os.path.join(self.root, os.fsdecode(self.names[i]))

    def load(self, i, size):
        """-> uint8 (size,size,3): picture i.

        With skip_bad, a picture that cannot be read is replaced by the next one of its class that
        can. Which one that is depends on i alone, so that every process takes the same."""
        j = i
        while True:
            if j not in self.bad:
                try:
                    return load_image(self.path(j), size)
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


# --------------------------------------------------------------------------------------------------
# Preprocessing


def to_rgb(image):
    """PIL image of any mode -> RGB. Alpha is dropped, as in ADM's loader. 16-bit greys are scaled
    to 8 bits; Pillow would clip them."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
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


def load_image(path, size):
    """File -> uint8 (size,size,3), or a UserError that names the file.

    EXIF rotation is ignored, as in ADM's loader. The first frame of an animation is taken."""
    try:
        with open_picture(path) as image:
            return adm_crop(to_rgb(image), size)
    except Exception as error:  # Pillow's decoders raise a dozen types.
        name = os.fsdecode(path)
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
