"""Image folders, ADM's preprocessing, batches."""

import functools
import hashlib
import json
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.draws import epoch_order, uniform
from common.files import UserError, first_line, open_npz, warn_if_unwritable, writing
from common.processes import (
    at_signal,
    available_cores,
    barrier,
    conv_memory_format,
    rank,
    say,
    world,
)


IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


def to_rgb(image):
    """Any PIL image -> RGB. Alpha is dropped, as ADM's loader does; 16-bit greys are scaled, which PIL would clip."""
    if image.mode.startswith("I"):
        image = Image.fromarray(
            (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)
        )
    return image.convert("RGB")


def adm_crop(image, size):
    """RGB PIL image -> uint8 (size,size,3): halve with a box filter while the short side is at least 2*size, resize it
    to size (bicubic), cut the centre. The preprocessing of ADM (Dhariwal and Nichol 2021), hence of every FID."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "TIFF",
    "PPM",
    "GIF",
)  # whatever the name says; others may run programs


def open_picture(path):
    """-> PIL image, its pixels not read yet. Decompression bombs, and strips that resizing would make one, are refused."""
    image = Image.open(path, formats=FORMATS)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS or max(image.size) > 100 * min(
        image.size
    ):
        image.close()
        raise ValueError(
            f"{image.width}x{image.height} pixels: more than {Image.MAX_IMAGE_PIXELS}, or a side 100 times the other"
        )
    return image


def load_image(path, size):
    """File -> uint8 (size,size,3). EXIF rotation is ignored, as ADM does; of an animation the first frame is taken."""
    try:
        with open_picture(path) as image:
            return adm_crop(to_rgb(image), size)
    except Exception as error:  # Pillow's decoders raise a dozen types
        raise UserError(
            f"cannot read the picture {os.fsdecode(path)!r}: {first_line(error)}"
        ) from None


def check_picture(path, decode=False):
    """Cheap test of one file: its header is read and its end must be there; or all of it. -> width, height, or what is wrong."""
    try:
        if not os.path.isfile(path):
            return "it is a broken link" if os.path.islink(path) else "it is no file"
        with open_picture(path) as image:
            if image.mode == "F":
                return "floating-point pixels have no known range"
            size = image.size
            if image.format in (
                "JPEG",
                "MPO",
            ):  # without its mark at the end it is cut, or followed by other data
                image.fp.seek(-min(os.path.getsize(path), 1024), os.SEEK_END)
                decode = decode or b"\xff\xd9" not in image.fp.read()
            image.verify()  # a PNG's checksums, to its end
        if decode:
            with open_picture(path) as image:
                image.load()
        return size
    except Exception as error:
        return first_line(error)


class ImageSet:
    """A folder of pictures in ImageNet's layout, root/<class>/<picture>, or with all pictures in root (one class).

    names: bytes (N,) relative to root, sorted; labels int64 (N,); classes: list of folder names, sorted; fingerprint:
    hash of the names and sizes of the files. Listing and checking happen once: the result is kept under runs/cache and
    used again while no folder's modification time changes. `check_data`: the check decodes every picture in full.
    `skip_bad`: another one stands in for a picture that cannot be read, else it is an error."""

    def __init__(self, root, check_data=False, skip_bad=False):
        self.root, self.check_data, self.skip_bad = os.path.abspath(root), check_data, skip_bad
        if not os.path.isdir(root):
            raise UserError(
                f"{root}: no such folder; name one with --data, laid out as <class>/<picture> "
                "(`python demo.py` makes a small one under runs/demo)"
            )
        name = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        self.cache = os.path.join("runs", "cache", f"files-{name}.npz")
        if rank() == 0 and not self.read_cache():
            self.scan()
        barrier()
        if rank() != 0 and not self.read_cache():
            self.scan()  # the cache could not be written
        if self.bad:
            say(
                f"note: {len(self.bad)} of {len(self)} pictures cannot be read and others of their class take their places, the "
                f"first for {self.path(min(self.bad))!r}"
            )

    def read_cache(self):
        """Whether there is a list that still holds; then it is read."""
        try:
            with open_npz(self.cache) as file:
                header = json.loads(str(file["header"]))
                self.names, self.labels, self.bad = (
                    file["names"],
                    file["labels"],
                    set(file["bad"].tolist()),
                )
            self.classes, self.fingerprint, self.smallest = (
                header[k] for k in ("classes", "fingerprint", "smallest")
            )
            sound = (
                self.labels.shape == self.names.shape == (len(self.names),)
                and self.labels.dtype == np.int64
                and self.names.dtype.kind == "S"
                and set(self.labels.tolist()) == set(range(len(self.classes)))
            )
            fresh = all(
                os.stat(os.path.join(self.root, d)).st_mtime_ns == t
                for d, t in header["folders"].items()
            )
            return (
                sound
                and fresh
                and header["decoded"] >= self.check_data
                and (self.skip_bad or not self.bad)
            )
        except Exception:  # absent, damaged, or of another version: made again
            return False

    def scan(self):
        """Lists the files, checks them, and keeps the result."""

        def unreadable(error):
            raise UserError(f"cannot list {error.filename!r}: {error.strerror}")

        folders, files = {}, []  # every folder below root -> its modification time
        for folder, _, names in os.walk(self.root, followlinks=True, onerror=unreadable):
            if os.path.islink(
                folder
            ) and f"{os.path.realpath(os.path.dirname(folder))}/".startswith(
                f"{os.path.realpath(folder)}/"
            ):
                raise UserError(f"{folder!r} is a link to a folder that it is in itself; remove it")
            relative = os.path.relpath(folder, self.root)
            folders[relative] = os.stat(folder).st_mtime_ns
            files += [
                os.path.normpath(os.path.join(relative, f))
                for f in names
                if f.lower().endswith(IMAGE_TYPES)
            ]
        files.sort()
        subfolders = sorted(d for d in folders if d != "." and os.sep not in d)
        if not files:
            raise UserError(f"{self.root} has no pictures ({' '.join(IMAGE_TYPES)})")
        if set(subfolders) & {"train", "val", "test"} and len(subfolders) <= 3:
            raise UserError(
                f"{self.root} holds the folders {', '.join(subfolders)}: name one of them, such as "
                f"{os.path.join(self.root, subfolders[-1])}"
            )
        of = [f.split(os.sep, 1)[0] if os.sep in f else "." for f in files]
        empty = sorted(set(subfolders) - set(of))
        if empty:
            raise UserError(
                f"{len(empty)} class folder{'s' if empty[1:] else ''} without pictures, the first is "
                f"{os.path.join(self.root, empty[0])!r}; fill or remove it"
            )
        self.classes, self.labels = np.unique(of, return_inverse=True)
        self.classes, self.names = self.classes.tolist(), np.array([os.fsencode(f) for f in files])
        paths = [os.path.join(self.root, f) for f in files]
        check = functools.partial(check_picture, decode=self.check_data)
        executor = (
            ProcessPoolExecutor if len(paths) > 5000 else ThreadPoolExecutor
        )  # processes take a while to begin
        with executor(min(16, available_cores())) as pool:
            found = list(
                tqdm(
                    pool.map(check, paths, chunksize=100),
                    "checking pictures",
                    len(paths),
                    disable=len(paths) < 5000,
                    leave=False,
                )
            )
        self.bad = {i for i, size in enumerate(found) if isinstance(size, str)}
        lost = sorted(set(of) - {name for i, name in enumerate(of) if i not in self.bad})
        if self.bad and (lost or not self.skip_bad):
            first = min(self.bad)
            raise UserError(
                f"{len(self.bad)} picture{'s' * (len(self.bad) > 1)} cannot be read, the first is {paths[first]!r}: "
                f"{found[first]}; mend or remove it"
                + (
                    f", {lost[0]!r} has no other"
                    if lost
                    else " (training takes another instead with --skip-bad)"
                )
            )
        self.smallest = min(min(size) for size in found if not isinstance(size, str))
        lines = [
            f"{f} {os.path.getsize(p) if os.path.isfile(p) else -1}" for f, p in zip(files, paths)
        ]
        self.fingerprint = hashlib.sha256(
            "\n".join(lines).encode(errors="surrogateescape")
        ).hexdigest()[:16]
        header = dict(
            folders=folders,
            classes=self.classes,
            fingerprint=self.fingerprint,
            smallest=self.smallest,
            decoded=self.check_data,
        )
        with warn_if_unwritable(self.cache), writing(self.cache) as file:
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
        return os.path.join(self.root, os.fsdecode(self.names[i]))

    def load(self, i, size):
        """-> uint8 (size,size,3) of picture i or, with skip_bad, of the next one of its class that can be read: a function of i
        alone, the same on every process."""
        j = i
        while True:
            try:
                if j not in self.bad:
                    return load_image(self.path(j), size)
            except UserError as error:
                if not self.skip_bad:
                    raise
                self.bad.add(j)
                print(
                    f"warning: {error}; another one of its class takes its place ({len(self.bad)} so far)",
                    file=sys.stderr,
                    flush=True,
                )
            same = [k for k in np.flatnonzero(self.labels == self.labels[i]) if k not in self.bad]
            if not same:
                raise UserError(
                    f"no picture of {os.path.join(self.root, self.classes[self.labels[i]])!r} can be read any more"
                )
            j = same[np.searchsorted(same, i) % len(same)]

    def stack(self, index, size):
        """Indices -> uint8 (b,3,size,size)."""
        return torch.from_numpy(np.stack([self.load(i, size) for i in index])).permute(0, 3, 1, 2)


class TrainingBatches(torch.utils.data.Dataset):
    """Item k is what this process sees in step k of the run: positions in the endless stream of samples, and the
    pictures there. Position p is picture epoch_order(p // N)[p % N]; a batch may span two epochs.

    Item: dict(position, index, flip, label: int64 (b,), image: uint8 (b,3,size,size) if `size`, and the arrays that
    `extra(index, flip)` adds)."""

    def __init__(self, data, batch_size, seed, size=None, flip=True, extra=None):
        self.data, self.batch_size, self.seed, self.size, self.flip, self.extra = (
            data,
            batch_size,
            seed,
            size,
            flip,
            extra,
        )
        self.rank, self.world = rank(), world()

    def __getitem__(self, step):
        share, count = self.batch_size // self.world, len(self.data)
        position = step * self.batch_size + self.rank * share + np.arange(share)
        index = np.array(
            [epoch_order(self.seed, p // count, count)[p % count] for p in position.tolist()]
        )
        position = torch.from_numpy(position)
        flip = (uniform(self.seed, "flip", position) < 0.5) & self.flip
        batch = dict(
            position=position,
            index=torch.from_numpy(index),
            flip=flip,
            label=torch.from_numpy(self.data.labels[index]),
        )
        if self.size:
            image = self.data.stack(index, self.size)
            batch["image"] = torch.where(flip.view(-1, 1, 1, 1), image.flip(3), image)
        if self.extra:
            batch.update(self.extra(index, flip.numpy()))
        return batch


class PictureBlocks(torch.utils.data.Dataset):
    """Item k: dict(image=load_network(indices of the k-th `block` of `count` pictures, size)), uint8 (b,3,size,size)."""

    def __init__(self, load, size, count, block):
        self.load, self.size, self.count, self.block = load, size, count, block

    def __getitem__(self, k):
        return dict(
            image=self.load(range(k * self.block, min((k + 1) * self.block, self.count)), self.size)
        )


def ignore_signals(worker):
    """A scheduler's signal goes to loaders too: they go on until the process they read for has ended."""
    at_signal(signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def item_or_error(dataset, k):
    """dataset[k], or the UserError that it raises: torch's own way to hand on an error keeps loaders from ending."""
    try:
        return dataset[k]
    except UserError as error:
        return error


def load_batches(dataset, items, workers, device):
    """Iterates over dataset[k] for k in items, in order, read ahead by `workers` processes."""
    if workers is None:
        workers = min(8, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    loader = torch.utils.data.DataLoader(
        items,
        batch_size=None,
        collate_fn=functools.partial(item_or_error, dataset),
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield {
            k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v
            for k, v in batch.items()
        }


def from_uint8(x):
    """uint8 (B,3,H,W) 0..255 -> float32 in [-1,1]."""
    return x.float().div(127.5).sub(1).contiguous(memory_format=conv_memory_format(x.device))


def to_uint8(x):
    """Float in [-1,1] -> uint8 0..255, rounded."""
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def save_grid(path, rows):
    """Rows of as many pictures each, uint8 (n,3,H,W) -> one PNG. Pictures under 64 pixels are enlarged, sharp."""
    from torchvision.utils import save_image  # takes a second to import

    x = torch.cat([row.cpu() for row in rows])
    scale = 128 // x.shape[2] if x.shape[2] < 64 else 1
    x = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3) / 255
    with writing(path) as file:
        save_image(x, file, "png", nrow=len(rows[0]), padding=2 * scale, pad_value=1)
