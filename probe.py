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
import os
import re

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.stats import gaussian_kde, rankdata
from tqdm import tqdm

import common
from common import say
from models import UserError, load_vae

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
BLOCK = 2048                                                # rows of features that are on the device at once


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what")
    g.add_argument("--vae", nargs="+", help="files, run folders or published VAEs (default: the newest under runs/)")
    g.add_argument("--data", nargs="+", help="benchmark folders (default: all under data/, else runs/demo/pictures)")
    g.add_argument("--task", action="append", choices=["attributes", "classes", "uniformity", "mixture"],
                   help="may be given several times (default: attributes)")
    g.add_argument("--zero-shot", action="store_true", help="AwA2: test on the ten classes of testclasses.txt")
    g.add_argument("--skip-missing", action="store_true", help="leave out annotated pictures that are not there")
    g.add_argument("--train-images", type=int, default=250000, help="at most; a seeded choice of the training split")
    g.add_argument("--resolution", type=int, help="side of the pictures (default: the VAE's)")
    g.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS, help="of the L2 penalty, to choose from")
    g.add_argument("--iterations", type=int, default=300, help="of the solver, at most; it stops when it has converged")
    g.add_argument("--bootstrap", type=int, default=300, help="resamplings of the test pictures, for 95%% intervals")
    g.add_argument("--no-baselines", dest="baselines", action="store_false", help="no majority class, no raw pixels")
    g.add_argument("--gfid", help="csv of <VAE>,<FID> for each --vae: correlation of FID with every measure")
    g.add_argument("--pictures", type=int, default=8, help="an attribute's highest and lowest, in a PNG; 0: none")
    g.add_argument("--out", default="runs/probe")
    g.add_argument("--cache", default="runs/cache", help="folder of the features")
    g = p.add_argument_group("machine")
    g.add_argument("--batch-size", type=int, default=64, help="pictures a process encodes at once")
    g.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the encoder; moves the numbers")
    g.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    g.add_argument("--workers", type=int, help="loader processes per process (default: its share of the cores)")
    g.add_argument("--seed", type=int, default=0, help="of splits that are not published, subsets and resamplings")
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
        split[missing] = 3
        keep = [np.flatnonzero(split == k) for k in range(3)]
        if min(map(len, keep)) == 0:
            counts = ", ".join(str(len(k)) for k in keep)
            raise UserError(f"{name}: {folder} has {counts} pictures for training, validation and test")
        keep[0] = np.sort(np.random.default_rng(args.seed).permutation(keep[0])[:args.train_images])
        ends, keep = np.cumsum([0, *map(len, keep)]), np.concatenate(keep)
        self.parts = [slice(int(a), int(b)) for a, b in zip(ends[:-1], ends[1:])]
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
    """<picture> <value> ... lines, spaces or commas between -> {picture: int8 (A,)} and the columns' names. `meaning`:
    a value's text -> 0..255 (255 becomes -1). Above them may stand their number and the columns' names."""
    rows, count = {}, None
    for number, line in read_lines(path):
        words = [w.strip() for w in line.split(",")] if path.endswith(".csv") else line.split()
        if not rows and line.isdecimal() and len(line) < 16:
            count = int(line)
        elif not rows and words[-1] not in meaning and number <= 2:
            if columns is None:                             # a csv names the picture's column too
                columns = words[1:] if path.endswith(".csv") else words
        else:
            bad = [w for w in words[1:] if w not in meaning]
            columns = columns or [str(k) for k in range(len(words) - 1)]       # a list without names
            if bad or len(words) - 1 != len(columns) or words[0] in rows or not words[1:]:
                raise UserError(f"{path}, line {number}: " + (f"'{bad[0]}' is none of {', '.join(meaning)}" if bad else
                                f"{words[0]} stands there twice" if words[0] in rows else
                                f"{len(words) - 1} values instead of {len(columns or '1')}"))
            rows[words[0]] = np.frombuffer(bytes(map(meaning.get, words[1:])), np.int8)
    if not rows or count not in (None, len(rows)):
        raise UserError(f"{path} lists {len(rows)} pictures" + (f", its first line says {count}" if count else ""))
    return rows, columns


def read_attributes(name, folder, path, partition, columns, args):
    """Benchmark from a file of attributes and {picture: split}, which must agree."""
    rows, columns = read_table(path, {"1": 1, "-1": 255, "0": 0}, columns)
    odd = [n for n in partition if n not in rows] or [n for n in rows if n not in partition]
    if odd:
        raise UserError(f"{path} and the partition differ in {len(odd)} pictures, the first is {odd[0]}")
    values = np.stack([rows[n] for n in partition])
    negative = -1 if (values == -1).any() else 0            # where a file has -1 for no, its 0 means unknown
    targets = np.where(values == 1, 1, np.where(values == negative, 0, -1)).astype(np.int8)
    return Benchmark(name, folder, list(partition), list(partition.values()), targets, columns, args)


def first_of(root, *paths, needed=True):
    found = [p for p in (os.path.join(root, path) for path in paths) if os.path.exists(p)]
    if needed and not found:
        raise UserError(f"{root} has no {' or '.join(paths)}")
    return found[0] if found else None


def stratified(labels, share, seed):
    """bool (N,): a seeded share of the pictures of each label, at least one."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        here = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        chosen[here[:max(1, round(share * len(here)))]] = True
    return chosen


def with_validation(labels, test, seed):
    """split (N,): 2 where test; of the others a seeded tenth of each label 1, the rest 0."""
    split, rest = np.where(test, 2, 0), np.flatnonzero(~test)
    split[rest[stratified(labels[rest], 0.1, seed + 1)]] = 1
    return split


def read_celeba(root, args):
    notes = first_of(root, *(f"{d}list_attr_celeba.{e}" for e in ("txt", "csv") for d in ("", "Anno/")))
    parts = first_of(root, *(f"{d}list_eval_partition.{e}" for e in ("txt", "csv") for d in ("", "Eval/")))
    folder = first_of(root, "img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba", ".")
    partition = {n: int(v[0]) for n, v in read_table(parts, {"0": 0, "1": 1, "2": 2}, ["partition"])[0].items()}
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
        partition = {n: int(v[0]) for n, v in read_table(parts, dict(train=0, val=1, test=2), ["status"])[0].items()}
    folder = os.path.dirname(first_of(root, "Img/img", "img"))
    name = os.path.basename(root) + (" fine" if notes.endswith("fine") else "")
    return read_attributes(name, folder, first_of(notes, "list_attr_img.txt"), partition, columns, args)


def read_awa2(root, args):
    def column(file):
        return [line.split()[-1] for _, line in read_lines(first_of(root, file))]
    classes, attributes = column("classes.txt"), column("predicates.txt")
    matrix = [line.split() for _, line in read_lines(first_of(root, "predicate-matrix-binary.txt"))]
    bad = [f"line {i} is not {len(attributes)} times 0 or 1" for i, row in enumerate(matrix, 1)
           if len(row) != len(attributes) or set(row) - {"0", "1"}]
    if bad or not len(matrix) == len(classes) == len(set(classes)):
        bad.append(f"{len(matrix)} lines for {len(classes)} classes, {len(set(classes))} of them different")
        raise UserError(f"{root}/predicate-matrix-binary.txt: {bad[0]}")
    names = [f"{c}/{f}" for c in classes for f in sorted(os.listdir(first_of(root, f"JPEGImages/{c}/")))
             if f.lower().endswith(common.IMAGE_TYPES)]
    label = np.array([classes.index(name.split("/")[0]) for name in names])
    if args.zero_shot:
        chosen = column("testclasses.txt")
        if set(chosen) - set(classes):
            raise UserError(f"{root}/testclasses.txt: '{sorted(set(chosen) - set(classes))[0]}' is not in classes.txt")
        test = np.isin(label, [classes.index(c) for c in chosen])
    else:
        test = stratified(label, 0.2, args.seed)
    split = with_validation(label, test, args.seed)
    name = os.path.basename(root) + (" zero-shot" if args.zero_shot else "")
    targets = np.array(matrix, np.int8)[label]
    return Benchmark(name, os.path.join(root, "JPEGImages"), names, split, targets, attributes, args)


def read_classes(root, args):
    """An image folder: its train and val (or test), or, where it has no such parts, a seeded fifth as the test."""
    folders = [first_of(root, "train", "."), first_of(root, "val", "test", needed=False)]
    sets = [common.ImageSet(folder) for folder in folders if folder]
    if sets[0].classes != sets[-1].classes or len(sets[0].classes) < 2:
        raise UserError(f"{root}: {len(sets[0].classes)} class folders for training, {len(sets[-1].classes)} to test; "
                        "two or more are needed, the same in both (ImageNet's validation pictures have to be sorted)")
    label = np.concatenate([s.labels for s in sets])
    test = np.arange(len(label)) >= len(sets[0]) if sets[1:] else stratified(label, 0.2, args.seed)
    split = with_validation(label, test, args.seed)
    names = [os.path.join(os.path.relpath(s.root, root), os.fsdecode(n)) for s in sets for n in s.names]
    return Benchmark(f"{os.path.basename(root)} classes", root, names, split, label, sets[0].classes, args)


READERS = {"list_attr_celeba.*": read_celeba, "Anno/list_attr_celeba.*": read_celeba,
           "Anno*/list_attr_img.txt": read_deepfashion, "list_attr_img.txt": read_deepfashion,
           "predicate-matrix-binary.txt": read_awa2}


def read_benchmarks(args):
    """What the tasks need of --data: attributes where a folder has them, else, or if they are asked for, classes."""
    found, demo = [], os.path.join("runs", "demo", "pictures")
    for root in map(os.path.abspath, args.data or sorted(glob.glob("data/*")) or [demo]):
        read = [r for name, r in READERS.items() if glob.glob(os.path.join(glob.escape(root), name))][:1]
        if args.task == ["classes"]:
            read = []
        if "classes" in args.task or not read and "attributes" not in args.task:
            read += [read_classes] if args.data or os.path.isdir(os.path.join(root, "train")) else []
        if args.data and not os.path.isdir(root):
            raise UserError(f"{root}: no such folder")
        if args.data and not read:
            raise UserError(f"{root} has no annotations in CelebA's, DeepFashion's or AwA2's form "
                            f"({', '.join(READERS)}); for an image folder give --task classes")
        found += [r(root, args) for r in read]
    if not found and not args.data and os.path.isdir(demo):
        found = [(read_classes if args.task == ["classes"] else read_celeba)(os.path.abspath(demo), args)]
    if not found:
        raise UserError("no benchmark under data/; name one with --data, or make a small one with `python demo.py`")
    names = [b.name for b in found]
    for bench in found:                                     # two folders of one name would share a line of the table
        bench.name = bench.name if names.count(bench.name) == 1 else f"{bench.name} {bench.folder}"
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Features: computed once, fp16, memory-mapped

@torch.no_grad()
def features(bench, encode, dims, size, key, args, device):
    """encode(pictures (b,3,size,size) in [-1,1]) -> (b,dims) of every picture -> fp16 memory map (N,dims). The folder's
    name holds `key` and the pictures' fingerprint; blocks that are there are not computed again."""
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


def vae_features(bench, vae, args, device):
    def encode(x):
        with common.autocast(device, args.precision):
            return vae.normalize(vae.encode(x)[0]).flatten(1)
    key = f"{vae.info['hash'][:12]}-{vae.resolution}-{args.precision}"
    return features(bench, encode, vae.channels * vae.latent_size ** 2, vae.resolution, key, args, device)


def pixel_features(bench, dims, size, args, device):
    """The picture itself, shrunk to the largest square of at most `dims` numbers."""
    side = min(size, int((dims / 3) ** 0.5))

    def encode(x):
        return F.interpolate(x, (side, side), mode="bilinear", antialias=True).flatten(1)
    return features(bench, encode, 3 * side ** 2, size, f"pixels{side}-{size}", args, device)


# ----------------------------------------------------------------------------------------------------------------------
# The probe

class Rows:
    """Iterates over features (N,D), on disk or not, as (slice, float32 block on the device), standardised."""

    def __init__(self, x, device):
        self.x, self.device, self.kept = x, device, None
        self.mean, self.std = torch.zeros(x.shape[1], device=device), torch.ones(x.shape[1], device=device)
        sums = sum(torch.stack([b.double().sum(0), b.double().square().sum(0)]) for _, b in self) / len(x)
        self.mean, self.std = sums[0].float(), (sums[1] - sums[0].square()).clamp(min=0).sqrt().float()
        self.std[self.std < 1e-6] = 1                       # a feature that is always the same says nothing
        if x.shape[0] * x.shape[1] < 5e8:
            self.kept = list(self)

    def __iter__(self):
        for i in range(0, len(self.x), BLOCK) if self.kept is None else ():
            block = torch.as_tensor(np.array(self.x[i:i + BLOCK])).to(self.device).float()
            yield slice(i, i + BLOCK), block.sub_(self.mean).div_(self.std)
        yield from self.kept or ()

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


class Problem:
    """G regressions on the same rows at once: an attribute with a strength each (K = 1, `column` (G,) of the targets),
    or a strength each of a softmax over K classes. Weights (r+1,G,K) lie along the principal axes, biases last."""

    def __init__(self, rows, axes, y, column, classes, strength):
        self.rows, self.axes, self.y, self.column, self.classes = rows, axes, y, column, classes
        self.strength = strength.view(1, -1, 1).repeat(axes.shape[1] + 1, 1, 1)
        self.strength[-1] = 0                               # biases go free
        known = (y[:, column] >= 0).sum(0) if not classes else torch.full_like(strength, len(y))
        self.count = known.clamp(min=1)[:, None].float()    # (G,1)

    def at(self, part, z):
        """Logits z (n,G,K) -> probabilities, their error, and their weight: 1/N, or 0 where the target is not known."""
        if self.classes:
            p = z.softmax(-1)
            return p, p - F.one_hot(self.y[part], self.classes)[:, None], 1 / self.count
        p, y = z.sigmoid(), self.y[part][:, self.column, None]
        return p, p - (y == 1).float(), (y >= 0) / self.count

    def logits(self, w):
        weight, z = self.axes @ w[:-1].flatten(1), torch.empty(len(self.y), w[0].numel(), device=w.device)
        for part, x in self.rows:
            torch.addmm(w[-1].flatten(), x, weight, out=z[part])
        return z.view(-1, *w.shape[1:])

    def gradient(self, w, z):
        """-> gradient (r+1,G,K), and the mean curvature of the loss in each logit (G,K)."""
        inner, bias, curve = torch.zeros(self.axes.shape[0], w[0].numel(), device=w.device), 0, 0
        for part, x in self.rows:
            p, error, weight = self.at(part, z[part])
            inner.addmm_(x.T, (error * weight).flatten(1))
            bias, curve = bias + (error * weight).sum(0), curve + (p * (1 - p) * weight).sum(0)
        return torch.cat([(self.axes.T @ inner).view_as(w[:-1]), bias[None]]) + self.strength * w, curve

    def along(self, w, z, d, dz, t):
        """First and second derivative (G,) of the loss by t at weights w + t d, whose logits are z + t dz."""
        first, second = dot(self.strength * (w + t[:, None] * d), d), dot(self.strength * d, d)
        for part in (slice(i, i + BLOCK) for i in range(0, len(z), BLOCK)):
            step = dz[part]
            p, error, weight = self.at(part, z[part] + t[:, None] * step)
            first += dot(error * weight, step)
            mean = (p * step).sum(-1, keepdim=True) if self.classes else p * step
            second += dot(p * weight * step, step - mean)
        return first, second

    def descend(self, w, variances, steps, tolerance):
        """Non-linear conjugate gradients (Polak-Ribiere) after scaling by 1 / (curvature x variance + strength), about
        the inverse Hessian. A step is found by Newton's method on the line, which needs no product with the features,
        as logits are linear in t. -> w, and about twice the loss that is left to gain (G,)."""
        z = self.logits(w)
        for step in range(steps + 1):
            g, curve = self.gradient(w, z)
            if step == 0:
                scale = F.pad(variances, (0, 1), value=1.0).view(-1, 1, 1)
                scale = 1 / (curve.clamp(min=1e-7) * scale + self.strength)
            s = scale * g
            gain = dot(g, s)
            if step == steps or bool((gain < tolerance).all()):
                return w, gain
            if step == 0:
                d = -s
            else:
                d = (dot(g - before, s) / last).clamp(min=0)[:, None] * d - s
                d = torch.where(dot(d, g)[:, None] < 0, d, -s)
            before, last, dz = g, gain, self.logits(d)
            t, low, high = torch.zeros_like(gain), torch.zeros_like(gain), torch.full_like(gain, torch.inf)
            for _ in range(3):
                first, second = self.along(w, z, d, dz, t)
                low, high = torch.where(first < 0, t, low), torch.where(first < 0, high, t)
                new = t - first / second.clamp(min=1e-30)
                beyond = torch.where(high < torch.inf, (low + high) / 2, 2 * t + 1e-3)
                t = torch.where((new > low) & (new < high), new, beyond)
            w, z = w + t[:, None] * d, z.addcmul_(t[:, None], dz)


def dot(a, b):
    """(n,G,K) twice -> (G,)"""
    return (a * b).sum((0, 2))


class Probe:
    """scores(x (N,D)) -> logits (N,A); `strength` (A,) that was chosen; `info` on the fit."""

    def __init__(self, weight, bias, strength, info):
        self.weight, self.bias, self.strength, self.info = weight, bias, strength, info

    def scores(self, x):
        return torch.cat([score_block(x, i, self.weight, self.bias).cpu() for i in range(0, len(x), BLOCK)]).numpy()


def score_block(x, i, weight, bias):
    """Rows i to i + BLOCK of x (N,D), weight (D,...), bias (...) -> (n,...)"""
    block = torch.as_tensor(np.array(x[i:i + BLOCK])).to(weight.device).float()
    return (block @ weight.flatten(1)).view(-1, *bias.shape) + bias


@torch.no_grad()
def fit_linear_probe(train_x, train_y, val_x, val_y, strengths=STRENGTHS, iterations=300, tolerance=1e-7, device="cpu",
                     memory=4e9):
    """Features (N,D), targets (N,A) of 1, 0, and -1 for unknown, or classes (N,) -> Probe. All strengths are fitted at
    once, of as many attributes as `memory` bytes for logits and weights allow."""
    y, val_y = (torch.as_tensor(np.asarray(v)).to(device) for v in (train_y, val_y))
    classes = int(max(y.max(), val_y.max())) + 1 if y.ndim == 1 else 0
    y, val_y = (v.long() if classes else v.to(torch.int8) for v in (y, val_y))
    strengths = torch.tensor(sorted(strengths, reverse=True), dtype=torch.float32, device=device)
    (n, d), width, levels = train_x.shape, classes or y.shape[1], len(strengths)
    rows = Rows(train_x, device)
    axes, variances = rows.principal_axes()
    fit = max(1, int(memory / (8 * n + 24 * d)))            # outputs at a time: two logits a row, six vectors each
    if classes:                                             # a softmax cannot be cut: fewer strengths at a time
        parts = [(s, torch.arange(width)) for s in torch.arange(levels).split(max(1, fit // width))]
    else:
        parts = [(torch.arange(levels), a) for a in torch.arange(width).split(max(1, fit // levels))]
    weight, bias = torch.empty(d, levels, width, device=device), torch.empty(levels, width, device=device)
    info = dict(rows=n, dims=d, iterations=0, unconverged=0, tolerance=tolerance)
    for some, chunk in parts:
        some, chunk = some.to(device), chunk.to(device)
        column = chunk.repeat(len(some)) if not classes else None
        strength = strengths[some] if classes else strengths.repeat_interleave(len(chunk))
        whole = Problem(rows, axes, y, column, classes, strength)
        if classes:
            share = torch.bincount(y, minlength=classes).float().div(n).clamp(min=0.5 / n)
            start, active = share.log().repeat(len(some), 1), torch.arange(len(some), device=device)
        else:
            share = (y == 1).sum(0)[column, None] / whole.count
            start = share.clamp(0.5 / n, 1 - 0.5 / n).logit()
            active = ((share > 0) & (share < 1)).flatten().nonzero()[:, 0]         # of the others the bias says it all
        w, done = F.pad(start[None], (0, 0, 0, 0, axes.shape[1], 0)), 0
        while len(active) and done < iterations:            # at each turn the converged leave, curvature is measured
            steps = min(20, iterations - done)
            problem = Problem(rows, axes, y, None if classes else column[active], classes, strength[active])
            w[:, active], gain = problem.descend(w[:, active], variances, steps, tolerance)
            active, done = active[gain >= tolerance], done + steps
        info["iterations"], info["unconverged"] = max(info["iterations"], done), info["unconverged"] + len(active)
        w = w.view(-1, len(some), len(chunk))
        inner = (axes @ w[:-1].flatten(1)).view(d, *w.shape[1:]) / rows.std.view(-1, 1, 1)
        weight[:, some[:, None], chunk] = inner
        bias[some[:, None], chunk] = w[-1] - torch.tensordot(rows.mean, inner, 1)
    loss = torch.zeros(levels, 1 if classes else width, device=device)
    for i in range(0, len(val_x), BLOCK):
        z, target = score_block(val_x, i, weight, bias), val_y[i:i + BLOCK, None]
        if classes:
            loss += F.cross_entropy(z.mT, target.expand(-1, levels), reduction="none").sum(0)[:, None]
        else:
            each = F.binary_cross_entropy_with_logits(z, (target == 1).float().expand_as(z), reduction="none")
            loss += (each * (target >= 0)).sum(0)
    best, every = loss.argmin(0).expand(width), torch.arange(width, device=device)     # ties: the strongest
    return Probe(weight[:, best, every], bias[best, every], strengths[best].cpu().numpy(), info)


def read_one(folder):
    """The attribute benchmark of one folder."""
    return read_benchmarks(parse_arguments(["--data", folder, "--task", "attributes"]))[0]


def quick_probe(vae, bench, train_images=2000, test_images=1000, precision="fp32"):
    """F1 of a probe on a few pictures of a benchmark (or of its folder), the same at each call: a look during training.
    Its penalty is fixed, so its numbers compare with each other and not with the table's."""
    if isinstance(bench, str):
        bench = read_one(bench)
    device, x, y = vae.latent_mean.device, [], []
    for part, count in ((bench.parts[0], train_images), (bench.parts[2], test_images)):
        pick = np.sort(part.start + np.random.default_rng(0).permutation(part.stop - part.start)[:count])
        y.append(bench.targets[pick])
        x.append([])
        for i in range(0, len(pick), 64):
            picture = common.from_uint8(bench.load(pick[i:i + 64], vae.resolution).to(device))
            with torch.no_grad(), common.autocast(device, precision):
                x[-1].append(vae.encode(picture)[0].flatten(1).cpu())
        x[-1] = torch.cat(x[-1]).numpy()
    probe = fit_linear_probe(x[0], y[0], x[1], y[1], [1e-2], device=device)
    return dict(zip(("probe_f1_macro", "probe_f1_micro"), f1_scores(probe.scores(x[1]), y[1])))


# ----------------------------------------------------------------------------------------------------------------------
# Measures, for B weightings (B,N) of the test pictures at once: all ones, then the counts of the bootstrap's draws

def f1_table(predicted, targets, weights):
    """bool (N,A), targets (N,A) -> F1 macro and micro (B,), per attribute (B,A). Nothing there and nothing found: 0."""
    true, known = targets == 1, targets >= 0
    hits, said, there = ((weights @ m.float()).double() for m in (predicted & true, predicted & known, true))
    each = 2 * hits / (said + there).clamp(min=1)
    return each.mean(1), 2 * hits.sum(1) / (said + there).sum(1).clamp(min=1), each


def precision_table(scores, targets, weights):
    """Average precision (B,A): mean over an attribute's positives of the precision among all that score no lower."""
    table = torch.zeros(len(weights), scores.shape[1], dtype=torch.float64)
    for a in range(scores.shape[1]):
        known = (targets[:, a] >= 0).nonzero()[:, 0]
        score, order = scores[known, a].sort(descending=True, stable=True)
        w, hit = weights[:, known[order]], targets[known[order], a] == 1
        end = torch.searchsorted(-score, -score[hit], right=True) - 1                    # of those with equal scores
        precision = (w * hit).cumsum(1)[:, end].double() / w.cumsum(1)[:, end].clamp(min=1)
        table[:, a] = (w[:, hit] * precision).sum(1) / w[:, hit].sum(1).clamp(min=1)
    return table


def recall_table(scores, targets, weights, k):
    """(B,): share of a picture's attributes among its k highest scores, mean over the pictures that have any. Of equal
    scores the first counts as higher."""
    true = targets == 1
    share = true.gather(1, scores.argsort(dim=1, descending=True, stable=True)[:, :k]).sum(1) / true.sum(1).clamp(min=1)
    weights = (weights * true.any(1)).double()
    return weights @ share.double() / weights.sum(1).clamp(min=1)


def tensors(scores, targets):
    scores, targets = torch.as_tensor(np.asarray(scores)), torch.as_tensor(np.asarray(targets)).to(torch.int8)
    return scores, targets, torch.ones(1, len(scores))


def f1_scores(scores, targets, threshold=0.0):
    """Scores (N,A), targets (N,A) of 1, 0, and -1 for unknown -> macro F1, micro F1, F1 of each attribute (A,). It is
    predicted where the score exceeds the threshold, one or (A,)."""
    scores, targets, ones = tensors(scores, targets)
    macro, micro, each = f1_table(scores > torch.as_tensor(threshold), targets, ones)
    return macro.item(), micro.item(), each[0].numpy()


def average_precision(scores, targets):
    """-> (A,); 0 for an attribute that is never there."""
    return precision_table(*tensors(scores, targets))[0].numpy()


def topk_recall(scores, targets, k):
    return recall_table(*tensors(scores, targets), k).item()


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
    weights = torch.from_numpy(np.stack([np.ones(n), *draws])).float()
    if targets.ndim == 1:
        right = torch.from_numpy(scores.argmax(1) == targets)
        values, columns = {"accuracy": weights @ right.float() / n}, {}
    else:
        tuned = best_thresholds(val_scores, val_targets)
        scores, targets = torch.from_numpy(scores), torch.from_numpy(targets)
        macro, micro, f1 = f1_table(scores > 0, targets, weights)
        macro_tuned, micro_tuned, f1_tuned = f1_table(scores > torch.from_numpy(tuned), targets, weights)
        precision = precision_table(scores, targets, weights)
        values = {"F1 macro": macro, "F1 micro": micro, "F1 macro, tuned": macro_tuned, "F1 micro, tuned": micro_tuned,
                  "mean AP": precision.mean(1)}
        values.update({f"top-{k} recall": recall_table(scores, targets, weights, k) for k in (3, 5)})
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


def log_joint(x, share, mean, covariance):
    """log(share_k N(x_n; mean_k, covariance_k)), (n,K)."""
    root = torch.linalg.cholesky(covariance)
    y = torch.linalg.solve_triangular(root, (x - mean[:, None]).mT, upper=False)                    # (K,C,n)
    norm = root.diagonal(dim1=1, dim2=2).log().sum(1) + x.shape[1] / 2 * np.log(2 * np.pi)
    return (share.log() - norm - y.square().sum(1).T / 2)


def mixture(points, seed, counts=(1, 2, 4, 8, 16, 32), steps=100):
    """Gaussian mixtures of full covariance, by EM from seeded points of four fifths -> the others' mean log-likelihood
    a dimension, less that of one Gaussian. The more, the less Gaussian the latents are."""
    points, found = torch.from_numpy(np.random.default_rng(seed).permutation(points)), {}
    train, test = points[:len(points) * 4 // 5], points[len(points) * 4 // 5:]
    eye = torch.eye(points.shape[1], dtype=torch.float64)
    for k in (c for c in counts if c * 20 <= len(train)):
        model, last = (torch.full((k,), 1 / k, dtype=torch.float64), train[:k], eye.repeat(k, 1, 1)), -np.inf
        for _ in range(steps):
            z = log_joint(train, *model)
            if z.logsumexp(1).mean() - last < 1e-5:
                break
            last, p = z.logsumexp(1).mean(), z.softmax(1)                                           # (n,K)
            weight = p.sum(0) + 1e-9
            mean = p.T @ train / weight[:, None]
            second = torch.stack([(train * q[:, None]).T @ train for q in (p / weight).T])
            model = weight / weight.sum(), mean, second - mean[:, :, None] * mean[:, None] + 1e-3 * eye
        found[k] = float(log_joint(test, *model).logsumexp(1).mean()) / points.shape[1]
    gains = {f"mixture of {k}": v - found[1] for k, v in found.items() if k > 1}
    return gains, dict(points=len(train), held_out=len(test), dims=points.shape[1], log_likelihood=found)


# ----------------------------------------------------------------------------------------------------------------------
# Correlation with FID

def read_gfid(path, vaes):
    """csv of <VAE>,<FID> -> FIDs in the order of `vaes`, named as in the command or by the last part of it."""
    table, last = {}, {v: os.path.basename(v.rstrip("/")) for v in vaes}
    for number, line in read_lines(path):
        words = [w.strip() for w in line.split(",")]
        try:
            table[words[0]] = float(words[1])
        except (ValueError, IndexError):
            if number > 1:                                  # the first may be a header
                raise UserError(f"{path}, line {number}: '{line}' is not <VAE>,<FID>") from None
    lack = [v for v in vaes if v not in table and last[v] not in table]
    if lack or len(vaes) < 3:
        raise UserError(f"--gfid {path}: a correlation needs three VAEs or more, and the FID of each"
                        + (f"; {', '.join(lack)} has none" if lack else ""))
    return [table.get(v, table.get(last[v])) for v in vaes]


def correlate(x, y, seed, count=2000):
    """-> Pearson's and Spearman's correlation, each [value, low, high]: 95% intervals over resampled VAEs."""
    x, y, found = np.array(x), np.array(y), {}
    picks = np.vstack([np.arange(len(x)), np.random.default_rng(seed).integers(0, len(x), (count, len(x)))])
    for name, of in (("Pearson", np.array), ("Spearman", rankdata)):
        values = [float(np.corrcoef(of(x[i]), of(y[i]))[0, 1]) for i in picks if np.ptp(x[i]) and np.ptp(y[i])]
        varied = np.ptp(x) > 0 and np.ptp(y) > 0
        found[name] = [values[0], *np.quantile(values, [0.025, 0.975]).tolist()] if varied else [0.0] * 3
    return found


def draw_scatter(path, panels, labels):
    """A panel for each (title, x, y): FID over a measure, a dot for each VAE; the axes bear their extremes."""
    w, h, columns = 400, 320, min(3, len(panels))
    canvas = Image.new("RGB", (w * columns, h * -(-len(panels) // columns)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (title, x, y) in enumerate(panels):
        left, top = i % columns * w + 60, i // columns * h + 50
        right, bottom = left + w - 80, top + h - 90
        pen.rectangle((left, top, right, bottom), outline="grey")
        pen.text((left, top - 42), title, "black")
        for value, at in ((min(x), (left, bottom + 6)), (max(x), (right - 40, bottom + 6)), (max(y), (left - 52, top)),
                          (min(y), (left - 52, bottom - 12))):
            pen.text(at, f"{value:.4g}", "black")
        pen.text((left - 52, (top + bottom) / 2), "FID", "black")
        for u, v, label in zip(x, y, labels):
            px = left + 12 + (right - left - 24) * (u - min(x)) / (np.ptp(x) or 1)
            py = bottom - 12 - (bottom - top - 24) * (v - min(y)) / (np.ptp(y) or 1)
            pen.ellipse((px - 4, py - 4, px + 4, py + 4), "navy")
            pen.text((min(px + 6, right - 6 * len(label)), max(py - 14, top)), label, "black")
    with common.writing(path) as file:
        canvas.save(file, "PNG")


# ----------------------------------------------------------------------------------------------------------------------

def slug(text):
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


def majority_scores(bench):
    """The baseline that sees nothing: what is most frequent in training, always -> validation and test scores."""
    y, (train, *others) = bench.targets, bench.parts
    share = np.bincount(y[train], minlength=len(bench.attributes)) / len(y[train]) if y.ndim == 1 else \
        (y[train] == 1).sum(0) / np.maximum((y[train] >= 0).sum(0), 1)
    return [np.tile((share - 0.5).astype(np.float32), (part.stop - part.start, 1)) for part in others]


def probe_one(bench, x, label, size, args, device):
    """Fit and measures on features x (N,D), or the majority baseline without; writes each attribute's results and, if
    `size`, its extreme pictures -> {measure: [value, low, high]}, about the fit."""
    train, val, test = bench.parts
    y, about = bench.targets, {}
    if x is None:
        scores = majority_scores(bench)
    else:
        probe = fit_linear_probe(x[train], y[train], x[val], y[val], args.strengths, args.iterations, device=device)
        scores = [probe.scores(x[part]) for part in (val, test)]
        chosen, counts = np.unique(probe.strength, return_counts=True)
        about = dict(probe.info, strengths={f"{s:g}": int(c) for s, c in zip(chosen, counts)})
        if probe.info["unconverged"]:
            say(f"warning: {bench.name}, {label}: {probe.info['unconverged']} fits unconverged; more --iterations?")
    values, columns = measure(scores[1], y[test], scores[0], y[val], args)
    if x is not None and columns:
        positives = dict(train_positives=(y[train] == 1).sum(0), test_positives=(y[test] == 1).sum(0))
        columns = dict(attribute=bench.attributes, strength=[f"{s:g}" for s in probe.strength], **positives, **columns)
        text = io.StringIO()
        csv.writer(text).writerows([columns, *zip(*(np.asarray(v).tolist() for v in columns.values()))])
        with common.writing(os.path.join(args.out, f"{slug(bench.name)}-{slug(label)}.csv")) as file:
            file.write(text.getvalue().encode())
    folder = os.path.join(args.out, "pictures", f"{slug(bench.name)}-{slug(label)}")
    for a, name in enumerate(bench.attributes if size and args.pictures else ()):
        order = test.start + np.argsort(-scores[1][:, a], kind="stable")
        rows = [bench.load(picks, size) for picks in (order[:args.pictures], order[::-1][:args.pictures])]
        common.save_grid(os.path.join(folder, f"{slug(name)}.png"), rows)
    return values, about


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
        if args.resolution:
            vae.set_resolution(args.resolution)
        size, dims = vae.resolution, vae.channels * vae.latent_size ** 2
        info[path] = dict(vae.config, hash=vae.info["hash"], dims=dims, channels=vae.channels, step=vae.info["step"])
        say(f"VAE       {path}, {dims} dimensions at {size} pixels, hash {vae.info['hash']}")
        for bench in benches:
            jobs[bench, path] = vae_features(bench, vae, args, device), size
            if args.baselines and probed and (bench, f"{dims} pixels") not in jobs:
                jobs[bench, f"{dims} pixels"] = pixel_features(bench, dims, size, args, device), None
                jobs[bench, "majority"] = None, None
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
    if panels:
        labels = [os.path.basename(path.rstrip("/")) for path in paths]
        draw_scatter(os.path.join(args.out, "correlation.png"), panels, labels)
    about = {b.name: dict(folder=b.folder, fingerprint=b.fingerprint, pictures=[p.stop - p.start for p in b.parts],
                          skipped=b.skipped, attributes=len(b.attributes)) for b in benches}
    common.write_json(os.path.join(args.out, "result.json"), dict(
        results=results, correlations=correlations, fids=dict(zip(paths, fids or ())), vaes=info, benchmarks=about,
        fits=fits, arguments=vars(args), provenance=common.provenance()))
    say(f"done      {args.out}/result.json")


if __name__ == "__main__":
    common.run(main)
