"""How much of what can be said about a picture a linear map finds in a VAE's latents; the shape of the latent space.

    z = posterior mean, flattened, standardised; P(attribute a) = sigmoid(w_a z + b_a), P(class) = softmax(W z + b)
    minimised: mean logistic loss + strength/2 |w|^2; the strength of each attribute is chosen on the validation split

    python probe.py                                                       # newest VAE, every benchmark under data/
    python probe.py --vae runs/vae sdvae --data data/celeba data/awa2     # a table: measures x VAEs
    python probe.py --task classes --data data/imagenet                   # linear-probe accuracy
    python probe.py --task uniformity --task mixture                      # Gini of the density, mixtures' fit
    python probe.py --vae runs/a runs/b runs/c --gfid results.csv         # and how each measure goes with FID

Benchmarks: CelebA, DeepFashion, AwA2 as distributed, any folder in CelebA's form, and for classes any image folder.
Writes --out (runs/probe): result.json, per-attribute CSVs, pictures/, correlation.png. Features (fp16) stay in --cache.
"""
import argparse
import csv
import glob
import hashlib
import io
import itertools
import os
import re

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.special import logsumexp
from scipy.stats import gaussian_kde, multivariate_normal, rankdata
from tqdm import tqdm

import common
from common import say
from models import UserError, load_vae

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
BLOCK = 2048                                                # rows of features on the device at once


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--vae", nargs="+", help="files, run folders or published VAEs (default: the newest under runs/)")
    p.add_argument("--data", nargs="+", help="benchmark folders (default: all under data/, else runs/demo/pictures)")
    p.add_argument("--task", action="append", choices=["attributes", "classes", "uniformity", "mixture"],
                   help="may be given several times (default: attributes)")
    p.add_argument("--zero-shot", action="store_true", help="AwA2: test on the ten classes of testclasses.txt")
    p.add_argument("--skip-missing", action="store_true", help="leave out annotated pictures that are not there")
    p.add_argument("--train-images", type=int, default=250000, help="at most; a seeded choice of the training split")
    p.add_argument("--iterations", type=int, default=300, help="of the solver, at most; it stops when it has converged")
    p.add_argument("--bootstrap", type=int, default=300, help="resamplings of the test pictures, for 95%% intervals")
    p.add_argument("--gfid", help="csv of <VAE>,<FID> for each --vae: correlation of FID with every measure")
    p.add_argument("--pictures", type=int, default=8, help="an attribute's highest and lowest, in a PNG; 0: none")
    p.add_argument("--out", default="runs/probe")
    p.add_argument("--cache", default="runs/cache", help="folder of the features")
    p.add_argument("--batch-size", type=int, default=64, help="pictures a process encodes at once")
    p.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    p.add_argument("--workers", type=int, help="loader processes per process (default: its share of the cores)")
    p.add_argument("--seed", type=int, default=0, help="of splits that are not published, subsets and resamplings")
    return p.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------------
# Benchmarks

class Benchmark:
    """names: paths below `folder`, sorted by split; parts: slices of the training, validation and test pictures;
    targets: int8 (N,A) of 1, 0, or -1 for unknown, or classes int64 (N,); attributes: their names."""

    def __init__(self, name, folder, names, split, targets, attributes, args):
        self.name, self.folder, self.attributes, split = name, folder, list(attributes), np.array(split)
        paths = [os.path.join(folder, n) for n in names]
        size = np.array([os.path.getsize(p) if os.path.isfile(p) else -1 for p in paths])
        missing = np.flatnonzero(size < 0)
        if len(missing) and not args.skip_missing:
            raise UserError(f"{len(missing)} annotated pictures are not in {folder}, the first is {names[missing[0]]}; "
                            "complete the data set, or leave them out with --skip-missing")
        keep = [np.flatnonzero((split == k) & (size >= 0)) for k in range(3)]
        if not all(map(len, keep)):
            counts = ", ".join(str(len(k)) for k in keep)
            raise UserError(f"{name}: {folder} has {counts} pictures for training, validation and test")
        keep[0] = np.sort(np.random.default_rng(args.seed).permutation(keep[0])[:args.train_images])
        ends = np.cumsum([0, *map(len, keep)]).tolist()
        self.parts, keep = [slice(*pair) for pair in zip(ends, ends[1:])], np.concatenate(keep)
        self.names, self.targets, self.skipped = [names[i] for i in keep], np.asarray(targets)[keep], len(missing)
        lines = "\n".join(f"{names[i]} {size[i]}" for i in keep)
        self.fingerprint = hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:16]

    def load(self, index, size):
        """Indices -> uint8 (n,3,size,size)."""
        rows = [common.load_image(os.path.join(self.folder, self.names[i]), size) for i in index]
        return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)


def read_lines(path):
    """(number, text) of the lines that are not empty; Windows line ends and a byte order mark are dropped."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from ((number, line.strip()) for number, line in enumerate(file, 1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_table(path, meaning, columns=None):
    """<picture> <value> ... lines, spaces or (csv) commas between -> {picture: int8 (A,)} and the columns' names. `meaning`:
    a value's text -> 1, 0 or -1. Above them may stand their number and the columns' names."""
    rows, count, comma = {}, None, "," if path.endswith(".csv") else None
    for number, line in read_lines(path):
        picture, *values = words = [w.strip() for w in line.split(comma)]
        if not rows and line.isdecimal() and len(line) < 16:
            count = int(line)
        elif not rows and number <= 2 and words[-1] not in meaning:
            columns = columns or (values if comma else words)              # a csv names the picture's column too
        else:
            columns = columns or [str(k) for k in range(len(values))]          # a list without names
            wrong = [f"'{w}' is none of {', '.join(meaning)}" for w in values if w not in meaning]
            if picture in rows:
                wrong.append(f"{picture} stands there twice")
            if not values or len(values) != len(columns):
                wrong.append(f"{len(values)} values instead of {len(columns or '1')}")
            if wrong:
                raise UserError(f"{path}, line {number}: {wrong[0]}")
            rows[picture] = np.fromiter(map(meaning.get, values), np.int8, len(values))
    if not rows or count not in (None, len(rows)):
        raise UserError(f"{path} lists {len(rows)} pictures" + (f", its first line says {count}" if count else ""))
    return rows, columns


def read_partition(path, meaning):
    return {n: int(v[0]) for n, v in read_table(path, meaning, ["partition"])[0].items()}


def read_attributes(name, folder, path, partition, columns, args):
    """Benchmark from a file of attributes and {picture: split}, which must agree."""
    rows, columns = read_table(path, {"1": 1, "-1": -1, "0": 0}, columns)
    odd = [n for n in partition if n not in rows] or [n for n in rows if n not in partition]
    if odd:
        raise UserError(f"{path} and the partition differ in {len(odd)} pictures, the first is {odd[0]}")
    values = np.stack([rows[n] for n in partition])
    if (values == -1).any():                                # where a file has -1 for no, its 0 means unknown
        values = np.where(values == 1, 1, -1 - values).astype(np.int8)
    return Benchmark(name, folder, list(partition), list(partition.values()), values, columns, args)


def first_of(root, *paths):
    found = [p for p in (os.path.join(root, path) for path in paths) if os.path.exists(p)]
    if not found:
        raise UserError(f"{root} has no {' or '.join(paths)}")
    return found[0]


def seeded_split(labels, test, seed):
    """split (N,): 2 where `test`, or if that is None in a seeded fifth of each label; of the others a tenth of each label
    1, the rest 0."""
    split = np.zeros(len(labels), int) if test is None else np.where(test, 2, 0)
    for value, share in ((2, 0.2), (1, 0.1)) if test is None else ((1, 0.1),):
        for label in np.unique(labels[split == 0]):
            here = np.random.default_rng([seed, value, label]).permutation(np.flatnonzero((labels == label) & (split == 0)))
            split[here[:max(1, round(share * len(here)))]] = value
    return split


def read_celeba(root, args):
    notes = first_of(root, *(f"{d}list_attr_celeba.{e}" for e in ("txt", "csv") for d in ("", "Anno/")))
    parts = first_of(root, *(f"{d}list_eval_partition.{e}" for e in ("txt", "csv") for d in ("", "Eval/")))
    folder = first_of(root, "img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba", ".")
    partition = read_partition(parts, {"0": 0, "1": 1, "2": 2})
    return read_attributes(os.path.basename(root), folder, notes, partition, None, args)


def read_deepfashion(root, args):
    fine = os.path.basename(root) == "Anno_fine"            # named by itself: its 26 attributes, not the 1000
    root = os.path.dirname(root) if fine else root
    notes = os.path.join(root, "Anno_fine") if fine else first_of(root, "Anno_coarse", "Anno_fine", "Anno")
    lines = [line for _, line in read_lines(first_of(notes, "list_attr_cloth.txt"))]
    columns = [line.rsplit(None, 1)[0] for line in lines[2:]]              # "<name> <type>"; a name may hold spaces
    if not columns or lines[0] != str(len(columns)):
        raise UserError(f"{notes}/list_attr_cloth.txt lists {len(columns)} attributes, its first line is {lines[:1]}")
    lists = [os.path.join(notes, f"{k}.txt") for k in ("train", "val", "test")]
    if all(map(os.path.isfile, lists)):                     # Anno_fine's own splits, of a part of the pictures
        partition = {line: k for k, path in enumerate(lists) for _, line in read_lines(path)}
    else:
        parts = first_of(root, "Eval/list_eval_partition.txt", "list_eval_partition.txt")
        partition = read_partition(parts, dict(train=0, val=1, test=2))
    name = os.path.basename(root) + (" fine" if notes.endswith("fine") else "")
    folder = os.path.dirname(first_of(root, "Img/img", "img"))
    return read_attributes(name, folder, first_of(notes, "list_attr_img.txt"), partition, columns, args)


def read_awa2(root, args):
    def column(file):
        return [line.split()[-1] for _, line in read_lines(first_of(root, file))]
    classes, attributes = column("classes.txt"), column("predicates.txt")
    matrix = [line.split() for _, line in read_lines(first_of(root, "predicate-matrix-binary.txt"))]
    bad = [f"line {i} is not {len(attributes)} times 0 or 1" for i, row in enumerate(matrix, 1)
           if len(row) != len(attributes) or set(row) - {"0", "1"}]
    if len(matrix) != len(classes) or len(set(classes)) != len(classes):
        bad.append(f"{len(matrix)} lines for {len(classes)} classes, {len(set(classes))} of them different")
    if bad:
        raise UserError(f"{root}/predicate-matrix-binary.txt: {bad[0]}")
    names = [f"{c}/{f}" for c in classes for f in sorted(os.listdir(first_of(root, f"JPEGImages/{c}/")))
             if f.lower().endswith(common.IMAGE_TYPES)]
    label = np.array([classes.index(name.split("/")[0]) for name in names])
    chosen = column("testclasses.txt") if args.zero_shot else []
    if set(chosen) - set(classes):
        raise UserError(f"{root}/testclasses.txt: '{sorted(set(chosen) - set(classes))[0]}' is not in classes.txt")
    test = np.isin(np.array(classes)[label], chosen) if args.zero_shot else None
    return Benchmark(os.path.basename(root) + (" zero-shot" if args.zero_shot else ""), os.path.join(root, "JPEGImages"),
                     names, seeded_split(label, test, args.seed), np.array(matrix, np.int8)[label], attributes, args)


def read_classes(root, args):
    """An image folder: its train and val (or test), or, where it has no such parts, a seeded fifth as the test."""
    held_out = [d for d in (os.path.join(root, part) for part in ("val", "test")) if os.path.isdir(d)]
    sets = [common.ImageSet(folder) for folder in [first_of(root, "train", "."), *held_out[:1]]]
    if sets[0].classes != sets[-1].classes or len(sets[0].classes) < 2:
        raise UserError(f"{root}: {len(sets[0].classes)} class folders for training, {len(sets[-1].classes)} to test; "
                        "two or more are needed, the same in both (ImageNet's validation pictures have to be sorted)")
    label = np.concatenate([s.labels for s in sets])
    test = np.arange(len(label)) >= len(sets[0]) if held_out else None
    names = [os.path.join(os.path.relpath(s.root, root), os.fsdecode(n)) for s in sets for n in s.names]
    return Benchmark(f"{os.path.basename(root)} classes", root, names, seeded_split(label, test, args.seed), label,
                     sets[0].classes, args)


READERS = {"list_attr_celeba.*": read_celeba, "Anno/list_attr_celeba.*": read_celeba,
           "Anno*/list_attr_img.txt": read_deepfashion, "list_attr_img.txt": read_deepfashion,
           "predicate-matrix-binary.txt": read_awa2}


def read_folder(root, args):
    """What the tasks need of one folder: its attributes, and classes if they are asked for or it has nothing else."""
    root = os.path.abspath(root)
    readers = [r for name, r in READERS.items() if glob.glob(os.path.join(glob.escape(root), name))][:1]
    readers = [] if args.task == ["classes"] else readers
    if "classes" in args.task or not readers and "attributes" not in args.task:
        readers += [read_classes] if args.data or os.path.isdir(os.path.join(root, "train")) else []
    if args.data and not readers:
        raise UserError(f"{root} has no annotations in CelebA's, DeepFashion's or AwA2's form ({', '.join(READERS)}); "
                        "for an image folder give --task classes" if os.path.isdir(root) else f"{root}: no such folder")
    return [read(root, args) for read in readers]


def read_benchmarks(args):
    """All of --data, or else of data/, or else the demo's."""
    found = [bench for root in args.data or sorted(glob.glob("data/*")) for bench in read_folder(root, args)]
    found = found or read_folder(os.path.join("runs", "demo", "pictures"), args)
    if not found:
        raise UserError("no benchmark under data/; name one with --data, or make a small one with `python demo.py`")
    names = [b.name for b in found]
    for bench in found:                                     # two folders of one name would share a line of the table
        bench.name = bench.name if names.count(bench.name) == 1 else f"{bench.name} {bench.folder}"
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Features: computed once, fp16, memory-mapped

@torch.no_grad()
def features(bench, vae, side, args, device):
    """The VAE's latents of every picture or, given a side, the pictures themselves shrunk to it -> fp16 memory map (N,D).
    The folder's name says of what they are; blocks that are there are not computed again."""
    size = vae.resolution
    dims, key = vae.channels * vae.latent_size ** 2, f"{vae.info['hash'][:12]}-{size}"
    if side:
        dims, key = 3 * side ** 2, f"pixels{side}-{size}"

    def encode(x):                                          # (b,3,size,size) in [-1,1] -> (b,dims)
        if side:
            return F.interpolate(x, (side, side), mode="bilinear", antialias=True).flatten(1)
        return vae.normalize(vae.encode(x)[0]).flatten(1)

    folder = os.path.join(args.cache, f"probe-{key}-{bench.fingerprint[:12]}")
    array, done, todo = common.resumable_array(folder, "features.npy", np.float16, (len(bench.names), dims), 64)
    todo = todo[common.rank()::common.world()]
    pictures = common.Blocks(bench.load, size, len(bench.names), 64)
    loader = common.batches(pictures, todo.tolist(), args.workers, device)
    bar = tqdm(loader, f"features of {bench.name}", len(todo), disable=common.rank() > 0, leave=False, mininterval=1)
    for k, batch in zip(todo, bar):
        block = torch.cat([encode(common.from_uint8(x)) for x in batch["image"].split(args.batch_size)])
        block = block.half().cpu().numpy()
        if not np.isfinite(block).all():
            raise UserError(f"features of {bench.name} ({key}) leave fp16's range")
        array[k * 64:k * 64 + 64] = block
        common.mark_done(array, done, k)
    common.barrier()
    return np.load(os.path.join(folder, "features.npy"), mmap_mode="r")


# ----------------------------------------------------------------------------------------------------------------------
# The probe

def blocks(x, device):
    """Features (N,D), on disk or not -> (slice, float32 block on the device)."""
    for i in range(0, len(x), BLOCK):
        yield slice(i, i + BLOCK), torch.as_tensor(np.array(x[i:i + BLOCK])).to(device).float()


class Rows:
    """Features (N,D), iterated over as `blocks` does, standardised with their own `mean` and `std` (D,)."""

    def __init__(self, x, device):
        self.x, self.device, self.kept = x, device, None
        sums = sum(torch.stack([b.double().sum(0), b.double().square().sum(0)]) for _, b in blocks(x, device)) / len(x)
        self.mean, self.std = sums[0].float(), (sums[1] - sums[0].square()).clamp(min=0).sqrt().float()
        self.std[self.std < 1e-6] = 1                       # a feature that is always the same says nothing
        if x.shape[0] * x.shape[1] < 5e8:
            self.kept = list(self)

    def __iter__(self):
        if self.kept is not None:
            return iter(self.kept)
        return ((part, block.sub_(self.mean).div_(self.std)) for part, block in blocks(self.x, self.device))

    def principal_axes(self):
        """Axes (D,r) and variances (r,): all D of them, or those the rows span, which hold the optimum, if N < D."""
        n, d = self.x.shape
        if n < d:
            x = torch.cat([block for _, block in self])
            values, vectors = torch.linalg.eigh((x @ x.T).double() / n)
            good = values > 1e-9 * values[-1]
            return x.T @ (vectors[:, good] / (values[good] * n).sqrt()).float(), values[good].float()
        covariance = torch.zeros(d, d, device=self.device)
        for _, block in self:
            covariance.addmm_(block.T, block, alpha=1 / n)
        values, axes = torch.linalg.eigh(covariance)
        return axes, values.clamp(min=0)


class Probe:
    """scores(x (N,D)) -> logits (N,A); `strength` (A,) that was chosen; `info` on the fit."""

    def __init__(self, weight, bias, strength, info):
        self.weight, self.bias, self.strength, self.info = weight, bias, strength, info

    def scores(self, x):
        return torch.cat([(b @ self.weight + self.bias).cpu() for _, b in blocks(x, self.weight.device)]).numpy()


def errors(z, y, count, softmax):
    """Logits (n,S,A), targets (n,A) -> probabilities, their error, and their weight: 1/N, or 0 where y is not known."""
    p, weight = z.softmax(-1) if softmax else z.sigmoid(), (y >= 0)[:, None] / count
    return p, (p - (y == 1)[:, None].float()) * weight, weight


def descend(rows, axes, variances, y, strengths, softmax, iterations, tolerance):
    """Targets y (N,A), strengths (S,) -> weights (r+1,S,A) along `axes`, biases last; iterations; fits not converged.

    Non-linear conjugate gradients (Polak-Ribiere) after scaling by 1 / (curvature x variance + strength), about the inverse
    Hessian, measured anew every 20 steps. A step is found by Newton's method on the line, which needs no product with the
    features, as logits are linear in its length t. Every (strength, attribute) has its own t, but all classes of one
    softmax the same."""
    n, s, a, device = len(y), len(strengths), y.shape[1], y.device
    variances = F.pad(variances, (0, 1), value=1.0).view(-1, 1, 1)                 # the bias's is 1
    penalty = strengths.view(1, s, 1).repeat(len(variances), 1, 1)
    penalty[-1] = 0                                         # biases go free
    count = (y >= 0).sum(0).clamp(min=1)
    share = (y == 1).sum(0) / count
    w = torch.zeros(len(variances), s, a, device=device)
    w[-1] = share.clamp(min=0.5 / n).log() if softmax else share.clamp(0.5 / n, 1 - 0.5 / n).logit()
    done = ((share == 0) | (share == 1)).repeat(s, 1)       # nothing to learn: the bias says it all
    done = done.all(1, keepdim=True) if softmax else done

    def dot(u, v):
        return (u * v).sum((0, 2))[:, None] if softmax else (u * v).sum(0)

    def logits(w):
        weight, z = axes @ w[:-1].flatten(1), torch.empty(n, s * a, device=device)
        for part, x in rows:
            torch.addmm(w[-1].flatten(), x, weight, out=z[part])
        return z.view(n, s, a)

    z = logits(w)
    for iteration in range(iterations + 1):
        inner, bias, curve = torch.zeros(len(axes), s * a, device=device), 0, 0
        for part, x in rows:
            p, error, weight = errors(z[part], y[part], count, softmax)
            inner.addmm_(x.T, error.flatten(1))
            bias, curve = bias + error.sum(0), curve + (p * (1 - p) * weight).sum(0)
        g = torch.cat([(axes.T @ inner).view_as(w[:-1]), bias[None]]) + penalty * w
        if iteration % 20 == 0:
            scale = 1 / (curve.clamp(min=1e-7) * variances + penalty)
        downhill = -scale * g
        gain = -dot(g, downhill)                            # about twice the loss that is left to gain
        done |= gain < tolerance
        if done.all() or iteration == iterations:
            return w, iteration, int((~done).sum())
        d = downhill
        if iteration % 20:
            d = (dot(before - g, downhill) / last).clamp(min=0) * d_before + downhill
            d = torch.where(dot(d, g) < 0, d, downhill)
        d = torch.where(done, 0, d)
        before, last, d_before, dz = g, gain, d, logits(d)
        t = torch.zeros_like(gain)
        for k in range(3):
            first, second = dot(penalty * (w + t * d), d), dot(penalty * d, d)
            for part in (slice(i, i + BLOCK) for i in range(0, n, BLOCK)):
                p, error, weight = errors(z[part] + t * dz[part], y[part], count, softmax)
                mean = (p * dz[part]).sum(-1, keepdim=True) if softmax else p * dz[part]
                first += dot(error, dz[part])
                second += dot(p * weight * dz[part], dz[part] - mean)
            new = t - first / second.clamp(min=1e-30)
            t = new.clamp(t / 4, 4 * t) if k else new       # where the loss bends, Newton's method may go far astray
        w, z = w + t * d, z.addcmul_(t, dz)


@torch.no_grad()
def fit_linear_probe(train_x, train_y, val_x, val_y, strengths=STRENGTHS, iterations=300, tolerance=1e-7, device="cpu",
                     memory=4e9):
    """Features (N,D), targets (N,A) of 1, 0, and -1 for unknown, or classes (N,) -> Probe. All strengths are fitted at
    once, of as many attributes as `memory` bytes for logits and weights allow."""
    y, val_y = (torch.as_tensor(np.asarray(v)).to(device) for v in (train_y, val_y))
    softmax = y.ndim == 1
    if softmax:
        classes = int(max(y.max(), val_y.max())) + 1
        y, val_y = (F.one_hot(v.long(), classes).to(torch.int8) for v in (y, val_y))
    strengths = torch.tensor(sorted(strengths, reverse=True), dtype=torch.float32, device=device)
    (n, d), a, s = train_x.shape, y.shape[1], len(strengths)
    rows = Rows(train_x, device)
    axes, variances = rows.principal_axes()
    weight, bias = torch.empty(d, s, a, device=device), torch.empty(s, a, device=device)
    info = dict(rows=n, dims=d, iterations=0, unconverged=0, tolerance=tolerance)
    at_once = max(1, int(memory / (8 * n + 24 * d)))        # outputs: two logits a row, six vectors each
    levels, columns = (max(1, at_once // a), a) if softmax else (s, max(1, at_once // s))      # a softmax cannot be cut
    for i, k in itertools.product(range(0, s, levels), range(0, a, columns)):
        some, these = slice(i, i + levels), slice(k, k + columns)
        w, count, left = descend(rows, axes, variances, y[:, these], strengths[some], softmax, iterations, tolerance)
        info["iterations"], info["unconverged"] = max(info["iterations"], count), info["unconverged"] + left
        weight[:, some, these] = (axes @ w[:-1].flatten(1)).view(d, *w.shape[1:]) / rows.std.view(-1, 1, 1)
        bias[some, these] = w[-1] - torch.tensordot(rows.mean, weight[:, some, these], 1)
    loss = torch.zeros(s, a, device=device)
    for part, x in blocks(val_x, device):
        z, target = (x @ weight.flatten(1)).view(-1, s, a) + bias, val_y[part, None]
        losses = -z.log_softmax(-1) if softmax else F.softplus(z) - z * (target == 1)
        loss += (losses * (target == 1 if softmax else target >= 0)).sum(0)
    best = (loss.sum(1, keepdim=True).expand(s, a) if softmax else loss).argmin(0)         # ties: the strongest
    every = torch.arange(a, device=device)
    return Probe(weight[:, best, every], bias[best, every], strengths[best].cpu().numpy(), info)


def training_probe(folder, size, precision="fp32", train_images=2000, test_images=1000):
    """-> function(vae) -> F1 of a probe on a few pictures of a benchmark's folder, always the same and kept in memory: a
    look during training. Its penalty is fixed, so its numbers compare with each other and not with the table's."""
    bench = read_benchmarks(parse_arguments(["--data", folder, "--task", "attributes"]))[0]
    picks = [np.sort(part.start + np.random.default_rng(0).permutation(part.stop - part.start)[:count])
             for part, count in ((bench.parts[0], train_images), (bench.parts[2], test_images))]
    pictures, y = [bench.load(pick, size) for pick in picks], [bench.targets[pick] for pick in picks]

    @torch.no_grad()
    def measured(vae):
        def encode(x):
            with common.autocast(device, precision):
                return vae.encode(common.from_uint8(x.to(device)))[0].flatten(1).float().cpu()
        device = vae.latent_mean.device
        x = [torch.cat([encode(block) for block in part.split(64)]).numpy() for part in pictures]
        probe = fit_linear_probe(x[0], y[0], x[1], y[1], [1e-2], device=device)
        return dict(zip(("probe_f1_macro", "probe_f1_micro"), f1_scores(probe.scores(x[1]), y[1])))
    return measured


# ----------------------------------------------------------------------------------------------------------------------
# Measures. `weights` are those of the test pictures, (N,), or of B bootstrap draws at once, (B,N); None: all 1

def f1_scores(scores, targets, threshold=0.0, weights=None):
    """Scores (N,A), targets (N,A) of 1, 0, and -1 for unknown -> macro F1, micro F1, F1 of each attribute (A,). It is
    predicted where the score exceeds the threshold, one or (A,). Nothing there and nothing found: 0."""
    weights = np.ones(len(scores)) if weights is None else weights
    predicted, true, known = scores > threshold, targets == 1, targets >= 0
    hits, said, there = ((weights @ mask).astype(np.float64) for mask in (predicted & true, predicted & known, true))
    each = 2 * hits / np.maximum(said + there, 1)
    return each.mean(-1), 2 * hits.sum(-1) / np.maximum((said + there).sum(-1), 1), each


def average_precision(scores, targets, weights=None):
    """-> (A,): mean over an attribute's positives of the precision among all that score no lower; 0 where it has none."""
    weights, each = np.ones(len(scores)) if weights is None else weights, []
    for score, target in zip(scores.T, targets.T):
        known = np.flatnonzero(target >= 0)
        order = known[np.argsort(-score[known], kind="stable")]
        score, hit, w = score[order], target[order] == 1, weights[..., order]
        end = np.searchsorted(-score, -score[hit], side="right") - 1                     # of those with equal scores
        precision = (w * hit).cumsum(-1)[..., end] / np.maximum(w.cumsum(-1)[..., end], 1)
        each.append((w[..., hit] * precision).sum(-1, dtype=np.float64) / np.maximum(w[..., hit].sum(-1), 1))
    return np.stack(each, -1)


def topk_recall(scores, targets, k, weights=None):
    """Share of a picture's attributes among its k highest scores, mean over the pictures that have any. Of equal scores
    the first counts as higher."""
    true = targets == 1
    top = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    share = np.take_along_axis(true, top, 1).sum(1) / np.maximum(true.sum(1), 1)
    weights = (np.ones(len(scores)) if weights is None else weights) * true.any(1)
    return weights @ share / np.maximum(weights.sum(-1), 1)


def best_thresholds(scores, targets):
    """Thresholds (A,) of the highest F1, halfway between two scores."""
    thresholds = np.zeros(scores.shape[1], np.float32)
    for a in range(scores.shape[1]):
        known = targets[:, a] >= 0
        order = np.argsort(-scores[known, a], kind="stable")
        score, hit = scores[known, a][order], targets[known, a][order] == 1
        f1 = 2 * np.cumsum(hit) / (np.arange(1, len(hit) + 1) + hit.sum())
        f1[:-1][score[:-1] == score[1:]] = -1               # equal scores cannot be parted
        k = int(f1.argmax()) if hit.any() else 0
        thresholds[a] = (score[k] + score[k + 1]) / 2 if k + 1 < len(score) else score[k] - 1
    return thresholds


def gini(values):
    """0: all values are equal; towards 1: one has everything. Mean absolute difference over twice the mean."""
    x = np.sort(np.asarray(values, np.float64).ravel())
    return float(((2 * np.arange(1, len(x) + 1) - len(x) - 1) * x).sum() / (len(x) * x.sum()))


def measure(scores, targets, val_scores, val_targets, args):
    """-> {measure: [value, low, high]} with 95% intervals over the test pictures, {column: (A,)} of each attribute."""
    n, rng = len(scores), np.random.default_rng(args.seed)
    draws = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(args.bootstrap)]
    weights = np.stack([np.ones(n), *draws]).astype(np.float32)
    if targets.ndim == 1:
        values, columns = {"accuracy": weights @ (scores.argmax(1) == targets) / n}, {}
    else:
        tuned = best_thresholds(val_scores, val_targets)
        macro, micro, f1 = f1_scores(scores, targets, 0, weights)
        macro_tuned, micro_tuned, f1_tuned = f1_scores(scores, targets, tuned, weights)
        precision = average_precision(scores, targets, weights)
        values = {"F1 macro": macro, "F1 micro": micro, "F1 macro, tuned": macro_tuned, "F1 micro, tuned": micro_tuned,
                  "mean AP": precision.mean(1)}
        values.update({f"top-{k} recall": topk_recall(scores, targets, k, weights) for k in (3, 5)})
        columns = dict(f1=f1[0], f1_tuned=f1_tuned[0], tuned_threshold=tuned, average_precision=precision[0])
    span = slice(min(1, args.bootstrap), None)
    return {k: [float(v[0]), *np.quantile(v[span], [0.025, 0.975]).tolist()] for k, v in values.items()}, columns


# ----------------------------------------------------------------------------------------------------------------------
# Shape of the latent space

def latent_points(x, channels, seed, count=10000):
    """One position of each of `count` pictures, seeded -> principal components (count,C), each of variance 1."""
    rng = np.random.default_rng(seed)
    picture = np.sort(rng.permutation(len(x))[:count])
    place = rng.integers(0, x.shape[1] // channels, len(picture))
    points = x[picture].reshape(len(picture), channels, -1)[np.arange(len(picture)), :, place].astype(np.float64)
    points -= points.mean(0)
    values, axes = np.linalg.eigh(points.T @ points / len(points))
    return (points @ axes / np.sqrt(values.clip(1e-12)))[:, ::-1].copy()


def uniformity(points):
    """Gini coefficient of a Gaussian KDE's density at its own points, in the plane of the first two principal
    components; bandwidth by Scott's rule. Low: the points are spread evenly."""
    kde = gaussian_kde(points[:, :2].T)
    about = dict(points=len(points), plane="PCA, whitened", dims=2, bandwidth=float(kde.factor))
    return {"Gini of density": gini(kde(points[:, :2].T))}, about


def mixture(points, seed, counts=(1, 2, 4, 8, 16, 32), steps=100):
    """Gaussian mixtures of full covariance, by EM from seeded points of four fifths -> the others' mean log-likelihood
    a dimension, less that of one Gaussian. The more, the less Gaussian the latents are."""
    points, found = np.random.default_rng(seed).permutation(points), {}
    (train, test), dims = np.split(points, [len(points) * 4 // 5]), points.shape[1]

    def log_joint(x):                                       # log(share_k N(x_n; mean_k, covariance_k)), (n,K)
        return np.stack([np.log(s) + multivariate_normal.logpdf(x, m, c) for s, m, c in model], 1)

    for k in (c for c in counts if c * 20 <= len(train)):
        model, last = [(1 / k, mean, np.eye(dims)) for mean in train[:k]], -np.inf
        for _ in range(steps):
            joint = log_joint(train)
            total = logsumexp(joint, 1)
            if total.mean() - last < 1e-5:
                break
            weights, last = np.exp(joint.T - total) + 1e-9, total.mean()                            # (K,n)
            model = [(w.mean(), np.average(train, 0, w), np.cov(train.T, aweights=w, ddof=0) + 1e-3 * np.eye(dims))
                     for w in weights]
        found[k] = float(logsumexp(log_joint(test), 1).mean()) / dims
    gains = {f"mixture of {k}": v - found[1] for k, v in found.items() if k > 1}
    return gains, dict(points=len(train), held_out=len(test), dims=dims, log_likelihood=found)


# ----------------------------------------------------------------------------------------------------------------------
# Correlation with FID

def read_gfid(path, vaes):
    """csv of <VAE>,<FID> -> FIDs in the order of `vaes`, named as in the command or by the last part of it."""
    table = {}
    for number, line in read_lines(path):
        name, _, value = (w.strip() for w in line.partition(","))
        try:
            table[name] = float(value)
        except ValueError:
            if number > 1:                                  # the first may be a header
                raise UserError(f"{path}, line {number}: '{line}' is not <VAE>,<FID>") from None
    fids = [table.get(v, table.get(os.path.basename(v.rstrip("/")))) for v in vaes]
    lack = [v for v, value in zip(vaes, fids) if value is None]
    if lack or len(vaes) < 3:
        raise UserError(f"--gfid {path}: a correlation needs three VAEs or more, and the FID of each"
                        + (f"; {', '.join(lack)} has none" if lack else ""))
    return fids


def correlate(x, y, seed, count=2000):
    """-> Pearson's and Spearman's correlation, each [value, low, high]: 95% intervals over resampled VAEs."""
    picks = np.vstack([np.arange(len(x)), np.random.default_rng(seed).integers(0, len(x), (count, len(x)))])
    if not np.ptp(x) or not np.ptp(y):
        return dict(Pearson=[0.0] * 3, Spearman=[0.0] * 3)
    pairs = [(x, y) for x, y in zip(np.array(x)[picks], np.array(y)[picks]) if np.ptp(x) and np.ptp(y)]
    found = dict(Pearson=[np.corrcoef(x, y)[0, 1] for x, y in pairs],
                 Spearman=[np.corrcoef(rankdata(x), rankdata(y))[0, 1] for x, y in pairs])
    return {name: [float(v[0]), *np.quantile(v, [0.025, 0.975]).tolist()] for name, v in found.items()}


def draw_scatter(path, panels, labels):
    """A panel of 400 x 320 for each (title, x, y): FID over a measure, a dot for each VAE; the axes bear their extremes."""
    canvas = Image.new("RGB", (400, 320 * len(panels)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (title, x, y) in enumerate(panels):
        left, right, top, bottom = 60, 380, 320 * i + 50, 320 * i + 280
        pen.rectangle((left, top, right, bottom), outline="grey")
        for at, text in (((left, top - 42), title), ((8, (top + bottom) / 2), "FID"),
                         ((left, bottom + 6), f"{min(x):.4g}"), ((right - 40, bottom + 6), f"{max(x):.4g}"),
                         ((8, top), f"{max(y):.4g}"), ((8, bottom - 12), f"{min(y):.4g}")):
            pen.text(at, text, "black")
        for u, v, label in zip(x, y, labels):
            px = np.interp(u, [min(x), max(x)], [left + 12, right - 12])
            py = np.interp(v, [min(y), max(y)], [bottom - 12, top + 12])
            pen.ellipse((px - 4, py - 4, px + 4, py + 4), "navy")
            pen.text((min(px + 6, right - 6 * len(label)), max(py - 14, top)), label, "black")
    with common.writing(path) as file:
        canvas.save(file, "PNG")


# ----------------------------------------------------------------------------------------------------------------------

def slug(text):
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


def probe_one(bench, x, label, size, args, device):
    """Fit and measures on features x (N,D); writes each attribute's results and, if `size`, its extreme pictures
    -> {measure: [value, low, high]}, about the fit."""
    (train, val, test), y = bench.parts, bench.targets
    probe = fit_linear_probe(x[train], y[train], x[val], y[val], iterations=args.iterations, device=device)
    if probe.info["unconverged"]:
        say(f"warning: {bench.name}, {label}: {probe.info['unconverged']} fits unconverged; more --iterations?")
    scores = probe.scores(x[test])
    values, columns = measure(scores, y[test], probe.scores(x[val]), y[val], args)
    name = f"{slug(bench.name)}-{slug(label)}"
    if columns:
        columns = dict(attribute=bench.attributes, strength=[f"{s:g}" for s in probe.strength],
                       train_positives=(y[train] == 1).sum(0), test_positives=(y[test] == 1).sum(0), **columns)
        text = io.StringIO()
        csv.writer(text).writerows([columns, *zip(*(np.asarray(v).tolist() for v in columns.values()))])
        with common.writing(os.path.join(args.out, f"{name}.csv")) as file:
            file.write(text.getvalue().encode())
    for a, attribute in enumerate(bench.attributes if size and args.pictures else ()):
        order = test.start + np.argsort(-scores[:, a], kind="stable")
        rows = [bench.load(picks, size) for picks in (order[:args.pictures], order[::-1][:args.pictures])]
        common.save_grid(os.path.join(args.out, "pictures", name, f"{slug(attribute)}.png"), rows)
    chosen, counts = np.unique(probe.strength, return_counts=True)
    return values, dict(probe.info, strengths={f"{s:g}": int(c) for s, c in zip(chosen, counts)})


def lines_of_table(results, columns):
    """A block for each benchmark: its measures against the VAEs and baselines."""
    width = max(24, *(len(c) + 2 for c in columns))
    for bench, measures in results.items():
        yield f"{bench:20}" + "".join(c.rjust(width) for c in columns if any(c in row for row in measures.values()))
        for name, row in measures.items():
            cells = [f"{v[0]:.4f}" + (f" [{v[1]:.4f},{v[2]:.4f}]" if v[1:] else "") for v in map(row.get, columns) if v]
            yield f"  {name:18}" + "".join(c.rjust(width) for c in cells)


def main():
    args = parse_arguments()
    args.task = args.task or ["attributes"]
    device = common.setup(args.device)
    paths = args.vae or [os.path.dirname(common.newest("vae.safetensors", "VAE", "python train_vae.py"))]
    fids = read_gfid(args.gfid, paths) if args.gfid else None
    benches = read_benchmarks(args)
    probed, shaped = {"attributes", "classes"} & set(args.task), {"uniformity", "mixture"} & set(args.task)
    jobs, info = {}, {}                                     # jobs: (benchmark, column of the table) -> features, side
    for path in paths:
        vae = load_vae(path, device)
        size, dims = vae.resolution, vae.channels * vae.latent_size ** 2
        info[path] = dict(vae.config, hash=vae.info["hash"], dims=dims, channels=vae.channels, step=vae.info["step"])
        say(f"VAE       {path}, {dims} dimensions at {size} pixels, hash {vae.info['hash']}")
        for bench in benches:
            jobs[bench, path] = features(bench, vae, None, args, device), size
            if probed:                                      # the largest square of at most as many numbers
                side = max(1, min(size, int((dims / 3) ** 0.5)))
                jobs[bench, f"{dims} pixels"] = features(bench, vae, side, args, device), None
                jobs[bench, "majority"] = np.zeros((len(bench.names), 1), np.float32), None      # only biases can learn
    first = common.rank() == 0
    if dist.is_initialized():
        dist.destroy_process_group()                        # the rest is for one process, and nobody waits for it
    if not first:
        return

    results, fits, correlations, panels = {}, {}, {}, []
    for (bench, label), (x, size) in jobs.items():
        row, about = probe_one(bench, x, label, size, args, device) if probed else ({}, {})
        if label in info and shaped:
            points = latent_points(x, info[label]["channels"], args.seed)
            for task in sorted(shaped):
                values, about[task] = uniformity(points) if task == "uniformity" else mixture(points, args.seed)
                row.update({name: [value] for name, value in values.items()})
        for name, value in row.items():
            results.setdefault(bench.name, {}).setdefault(name, {})[label] = value
        fits[f"{bench.name}, {label}"] = about
    say("\n".join(lines_of_table(results, list(dict.fromkeys([*paths, *(label for _, label in jobs)])))))
    for bench, measures in results.items() if fids else ():
        for name, row in measures.items():
            x = [row[path][0] for path in paths]
            found = correlations[f"{bench}, {name}"] = correlate(x, fids, args.seed)
            words = ", ".join(f"{k} {v:.3f} [{low:.3f},{high:.3f}]" for k, (v, low, high) in found.items())
            say(f"FID and {bench}, {name}: {words}")
            panels.append((f"{bench}, {name}\n{words}", x, fids))
    if fids:
        draw_scatter(os.path.join(args.out, "correlation.png"), panels, [os.path.basename(p.rstrip("/")) for p in paths])
    about = {b.name: dict(folder=b.folder, fingerprint=b.fingerprint, pictures=[p.stop - p.start for p in b.parts],
                          skipped=b.skipped, attributes=len(b.attributes)) for b in benches}
    common.write_json(os.path.join(args.out, "result.json"), dict(
        results=results, correlations=correlations, fids=dict(zip(paths, fids or ())), vaes=info, benchmarks=about,
        fits=fits, arguments=vars(args), provenance=common.provenance()))
    say(f"done      {args.out}/result.json")


if __name__ == "__main__":
    common.run(main)
