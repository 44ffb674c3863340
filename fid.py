"""Measure a set of pictures against a reference: FID, sFID, Inception Score, precision and recall, as ADM's evaluator
defines them; or a VAE's reconstructions against their originals: rFID, PSNR, SSIM, LPIPS.

    FID = |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)), mu and S: mean and covariance of a network's features of a set.

    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz   # against ADM's reference batch
    python fid.py runs/sit/samples --ref data/imagenet/train          # folders; the reference's part is kept for later
    python fid.py --vae runs/vae --data data/imagenet/val             # reconstruction
    python fid.py A --ref B --features vit_small_patch14_dinov2.lvd142m     # FD-<model>, in any timm model's features

Pictures are 8-bit RGB; features are float32, statistics and distances float64. The result is printed and written as
JSON beside the samples (samples.fid.json), with everything that moves the numbers. Several processes: torchrun.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg.lapack import dpstrf
from torchvision.models import inception as tv
from tqdm import tqdm

from common.files import (
    UserError,
    first_line,
    load_strictly,
    open_npz,
    read_weights,
    reading,
    state_hash,
    write_json,
    writing,
)
from common.flags import parse_flags, positive, whole_number
from common.pictures import ImageSet, PictureBlocks, from_uint8, load_batches, to_uint8
from common.processes import (
    barrier,
    mean_over_processes,
    rank,
    run_main,
    say,
    setup,
    sum_over_processes,
    world,
)
from common.runs import newest_result, provenance
from common.weights import load_vae
from models import LPIPS

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_HASH = WEIGHTS[-12:-4]  # the start of its sha256
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
STATISTICS = dict(
    mu=(2048,), sigma=(2048, 2048), mu_s=(2023,), sigma_s=(2023, 2023)
)  # shapes, of Inception
FORM = (
    "a set is a folder of pictures, or an .npz with arr_0, uint8 of shape (N,H,W,3), as sample.py writes it; a "
    "reference may have Inception's mu and sigma instead"
)


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "samples",
        nargs="?",
        help=".npz (arr_0) or folder (default: the newest samples.npz under runs/)",
    )
    p.add_argument(
        "--ref",
        help=".npz (mu and sigma, or arr_0, or ADM's with all of them) or folder of pictures",
    )
    p.add_argument(
        "--pr-images",
        type=whole_number,
        default=50000,
        help="of each set, for precision and recall; 0: neither",
    )
    p.add_argument(
        "--vae", help="VAE: file, run folder, published checkpoint or hf:<owner>/<repository>"
    )
    p.add_argument(
        "--data", help="for --vae: pictures to encode and decode; the posterior's mean is decoded"
    )
    p.add_argument("--lpips", type=int, choices=[0, 1], default=1, help="for --vae; 0: no LPIPS")
    p.add_argument(
        "--lpips-weights", nargs="+", default=(), help="local files of VGG16 and the linear layers"
    )
    p.add_argument(
        "--num",
        type=lambda text: whole_number(text, least=2),
        help="use so many pictures of the set: an .npz's first, a folder's evenly spaced",
    )
    p.add_argument(
        "--size",
        type=positive,
        help="cut folders' pictures to this side (default: the samples' or the VAE's)",
    )
    p.add_argument(
        "--features",
        help="timm model to measure the Frechet distance with, instead of FID's Inception",
    )
    p.add_argument(
        "--features-weights", help="local file of its weights (default: timm's, from the hub)"
    )
    p.add_argument("--inception-weights", help=f"local {WEIGHTS} (default: downloaded once)")
    p.add_argument("--out", help="JSON file of the result (default: beside the samples or the VAE)")
    p.add_argument(
        "--batch-size",
        type=positive,
        default=16,
        help="pictures a process takes at once (16 is best on a CPU)",
    )
    p.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    p.add_argument(
        "--workers",
        type=whole_number,
        help="loader processes per process (default: its share of the cores)",
    )
    return parse_flags(p, argv)


# ----------------------------------------------------------------------------------------------------------------------
# Feature networks: uint8 (B,3,H,W) -> dict of features. `about` is what identifies a network and its resize


def tf_resize(x, size):
    """Float (B,C,H,W) -> (B,C,size,size) as TensorFlow 1's resize_bilinear does it: bilinear between the pixels at
    floor(i * H/size) and the next one, no half-pixel shift, no antialiasing; the same float32 operations."""
    for axis, shape in ((3, (1, size)), (2, (size, 1))):
        at = torch.arange(size, device=x.device) * torch.tensor(
            x.shape[axis] / size, dtype=torch.float32
        )
        low = at.long()
        a, b = (
            x.index_select(axis, low),
            x.index_select(axis, (low + 1).clamp(max=x.shape[axis] - 1)),
        )
        x = a + (b - a) * (at - low).view(shape)
    return x


class MaxPoolE(tv.InceptionE):
    """The last block, Mixed_7c, with a max pool where the others have an average."""

    def _forward(self, x):
        a, b = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [
            self.branch1x1(x),
            self.branch3x3_2a(a),
            self.branch3x3_2b(a),
            self.branch3x3dbl_3a(b),
            self.branch3x3dbl_3b(b),
            self.branch_pool(F.max_pool2d(x, 3, 1, 1)),
        ]


def published_weights():
    """-> path of the published file in torch.hub's folder, where it is downloaded to once."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", WEIGHTS)
    try:
        if rank() == 0 and not os.path.isfile(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, path, WEIGHTS_HASH)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download Inception's weights ({first_line(error)}); fetch {WEIGHTS_URL} elsewhere and "
            f"put it at {path}, or name it with --inception-weights"
        ) from None
    barrier()
    return path


class Inception(tv.Inception3):
    """The 2015 TensorFlow Inception that defines FID, under the names of its published PyTorch conversion. Batch norms
    are folded into the convolutions and memory is channels_last, which is twice as fast on a CPU."""

    dims = dict(pool=2048, spatial=2023)

    def __init__(self, weights=None):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        self.Mixed_7c = MaxPoolE(2048)
        path = weights or published_weights()
        with reading(path, "Inception's weights"), open(path, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        published = digest.startswith(WEIGHTS_HASH)
        if not published and not weights:
            raise UserError(
                f"{path} is not the published file: its sha256 begins with {digest[:8]}, not {WEIGHTS_HASH}; remove "
                "it to have it downloaded again, or name it with --inception-weights to use it as it is"
            )
        if not published:
            say(
                f"warning: {path} is not the published file: numbers made with it are comparable with each other only"
            )
        load_strictly(self, read_weights(path)[0], path)
        self.about = dict(
            name="Inception",
            weights=digest,
            published=published,
            resize="TensorFlow 1 bilinear to 299x299",
        )
        self.eval().requires_grad_(False)
        for name, m in list(self.named_modules()):
            if isinstance(m, tv.BasicConv2d):
                m.conv, m.bn = (
                    torch.nn.utils.fusion.fuse_conv_bn_eval(m.conv, m.bn),
                    torch.nn.Identity(),
                )
            if (
                name.endswith("branch_pool") and "Mixed_7c" not in name
            ):  # its average counted padding as pixels
                m.register_forward_pre_hook(
                    lambda _, x: x[0] / F.avg_pool2d(torch.ones_like(x[0][:1, :1]), 3, 1, 1)
                )
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # its products have 10 bits
    def forward(self, images):
        """uint8 (B,3,H,W) -> pool (B,2048), spatial (B,2023) = 17x17x7, and logits (B,1008) without bias."""
        x = ((tf_resize(images.float(), 299) - 128) / 128).contiguous(
            memory_format=torch.channels_last
        )
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B,64,147,147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (B,192,71,71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (B,288,35,35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B,768,17,17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # of its 1x1 branch
        pool = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x)))).mean(
            (2, 3)
        )  # over 8x8
        return dict(pool=pool, spatial=spatial, logits=pool.double() @ self.fc.weight.double().T)


class TimmFeatures(torch.nn.Module):
    """The pooled features (class token or average, as the model has it) of any timm model."""

    def __init__(self, name, weights=None):
        super().__init__()
        import timm  # slow to import, and most runs do without

        source = (
            dict(pretrained_cfg_overlay=dict(file=str(weights), custom_load=False))
            if weights
            else {}
        )
        try:
            self.model = timm.create_model(name, pretrained=True, num_classes=0, **source).eval()
        except Exception as error:
            raise UserError(
                f"--features {name}: timm cannot build it with its weights ({first_line(error)}); choose "
                "another, or give a file in timm's key names with --features-weights"
            ) from None
        self.data = timm.data.resolve_model_data_config(self.model)
        self.side, self.dims = self.data["input_size"][-1], dict(pool=self.model.num_features)
        self.about = dict(
            name=name,
            weights=state_hash(self.model.state_dict()),
            published=True,
            resize=f"antialiased bicubic to {self.side}x{self.side}",
        )

    @torch.no_grad()
    def forward(self, images):
        x = (
            F.interpolate(
                images.float(), (self.side, self.side), mode="bicubic", antialias=True
            ).clamp(0, 255)
            / 255
        )
        mean, std = (x.new_tensor(self.data[key]).view(3, 1, 1) for key in ("mean", "std"))
        return dict(pool=self.model((x - mean) / std))


# ----------------------------------------------------------------------------------------------------------------------
# Measures


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians, in float64. tr (S1 S2)^(1/2) is the sum of the singular values of
    L1^T L2, where S = L L^T: the roots of the eigenvalues of S1 S2, but no rounded eigenvalue has its root taken, which
    would turn 1e-16 into 1e-8; so singular covariances and equal ones do no harm."""

    def factor(sigma):  # pivoted Cholesky, which ends at the rank of sigma
        lower, pivots, rank, _ = dpstrf(sigma, lower=1)
        return np.tril(lower)[np.argsort(pivots), :rank]

    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    roots = torch.linalg.svdvals(torch.from_numpy(factor(sigma1).T @ factor(sigma2)))
    return float(
        np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum().item()
    )


def score_terms(probs):
    """Probabilities (B,C) -> (B,C+1), p and sum p log p, whose sum over a split is all that its score needs."""
    p = probs.double()
    return torch.cat([p, torch.xlogy(p, p).sum(1, keepdim=True)], 1)


def inception_score(probs, split_size=5000, sums=None):
    """Class probabilities (N,C), or the sums of score_terms over each split (splits,C+1) -> Inception Score: mean over
    the splits, in the order given, of exp(mean KL(p(y|x) || p(y))), as ADM does."""
    if sums is None:
        sums = torch.stack(
            [score_terms(part).sum(0) for part in torch.as_tensor(probs).split(split_size)]
        )
    mean = sums / sums[:, :-1].sum(1, keepdim=True)  # each p sums to 1, hence all to their number
    return (mean[:, -1] - torch.xlogy(mean[:, :-1], mean[:, :-1]).sum(1)).exp().mean().item()


def precision_recall(ref, samples, k=3, block=512):
    """Features (N,D), (M,D) -> precision: share of samples inside the ball of some reference picture, which reaches to
    its k-th neighbour; recall: the roles exchanged. Squared distances in float64, `block` rows at a time."""

    def distances(rows, x):  # |a|^2 + |b|^2 - 2 ab, faster and smaller than torch.cdist
        a, b = (torch.linalg.vector_norm(v, dim=1).square() for v in (rows, x))
        return torch.addmm(b, rows, x.T, alpha=-2).add_(a[:, None])

    def radii(x):  # k + 1, as a picture itself is its nearest
        return torch.cat(
            [distances(rows, x).topk(k + 1, largest=False).values[:, k] for rows in x.split(block)]
        )

    ref, samples = torch.as_tensor(ref).double(), torch.as_tensor(samples).double()
    sample_radii, precise, recalled = radii(samples), False, []
    for rows, reach in zip(ref.split(block), radii(ref).split(block)):
        d = distances(rows, samples)
        precise |= (d <= reach[:, None]).any(0)
        recalled.append((d <= sample_radii).any(1))
    return precise.double().mean().item(), torch.cat(recalled).double().mean().item()


def psnr(a, b, data_range=255):
    """Images (B,3,H,W) -> dB (B,); equal ones get 148 at data range 255, as if their mean squared error were 1e-10."""
    return 10 * torch.log10(
        data_range**2 / (a.double() - b.double()).square().mean((1, 2, 3)).clamp(min=1e-10)
    )


def ssim(a, b, data_range=255):
    """Images (B,C,H,W), at least 11x11 -> structural similarity (B,): Gaussian window 11x11 of sigma 1.5, inside the
    picture (as scikit-image; torchmetrics' mean includes a mirrored border), K 0.01 and 0.03, each channel alone."""
    g = torch.softmax(
        -(torch.arange(11, dtype=torch.float64) - 5).square() / (2 * 1.5**2), 0
    ).tolist()

    def blur(x):  # a float64 convolution is three times slower on a CPU
        x = sum(w * x[:, :, i : x.shape[2] - 10 + i] for i, w in enumerate(g))
        return sum(w * x[..., i : x.shape[3] - 10 + i] for i, w in enumerate(g))

    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = (
        blur(a * a) - mean_a**2,
        blur(b * b) - mean_b**2,
        blur(a * b) - mean_a * mean_b,
    )
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    value = (
        (2 * mean_a * mean_b + c1)
        * (2 * cov + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return value.mean((1, 2, 3))


# ----------------------------------------------------------------------------------------------------------------------
# From sets of pictures to numbers


class ArraySet:
    """An .npz under ImageSet's names, with `statistics` of Inception and `settings` of sample.py where it has them. Pictures
    are read when asked for. fingerprint: of the arrays' names, sizes and checksums, which open_npz compares with the data."""

    def __init__(self, path):
        self.shape, self.labels, self.settings = (0, 0, 0, 3), None, None
        with reading(path, f".npz ({FORM})"):
            file = self.file = open_npz(path)  # stays open for the pictures
            names = set(STATISTICS) & set(file) if "mu" in file and "sigma" in file else ()
            self.statistics = {k: torch.from_numpy(file[k].astype(np.float64)) for k in names}
            if "settings" in file:
                self.settings = json.loads(str(file["settings"]))
            if "arr_0" in file:
                self.rows = file.zip.open("arr_0.npy")
                np.lib.format.read_magic(self.rows)
                self.shape, fortran, dtype = np.lib.format.read_array_header_1_0(self.rows)
                self.start = self.rows.tell()
                if (
                    dtype != np.uint8
                    or fortran
                    or len(self.shape) != 4
                    or self.shape[3] != 3
                    or 0 in self.shape[1:3]
                ):
                    raise UserError(
                        f"{path}: arr_0 is {dtype} of shape {self.shape}{' (Fortran order)' * fortran}; {FORM}"
                    )
            for name in {"labels", "arr_1"} & set(file):  # sample.py's, ADM's
                self.labels = file[name]
                if self.labels.shape != self.shape[:1]:
                    raise UserError(
                        f"{path}: {name} has shape {self.labels.shape}, but arr_0 holds {self.shape[0]} pictures; "
                        "give one label each, or leave labels out"
                    )
            arrays = [
                (member.filename, member.file_size, member.CRC) for member in file.zip.infolist()
            ]
        self.names, self.smallest = range(self.shape[0]), min(self.shape[1:3])
        self.fingerprint = hashlib.sha256(json.dumps(sorted(arrays)).encode()).hexdigest()

    def stack(self, index, size):
        """Indices in a row -> uint8 (b,3,H,W); size is for folders."""
        length = math.prod(self.shape[1:])
        self.rows.seek(self.start + int(index[0]) * length)
        images = np.frombuffer(self.rows.read(len(index) * length), np.uint8).reshape(
            -1, *self.shape[1:]
        )
        return torch.from_numpy(images.copy()).permute(0, 3, 1, 2)


class Pictures:
    """A set in batches: `num` evenly spaced pictures of a folder, cut to `size`, or the first `num` of an .npz, as they are;
    `arrays` is its ArraySet, where there is one already."""

    def __init__(self, path, num=None, size=None, batch_size=16, arrays=None):
        self.path, self.batch_size, self.folder = path, batch_size, os.path.isdir(path)
        self.set = ImageSet(path) if self.folder else arrays or ArraySet(path)
        available = len(self.set.names)
        self.count, self.size = (
            num or available,
            size if size and self.folder else self.set.smallest,
        )
        if not 2 <= self.count <= available:
            raise UserError(
                f"{path} has {available} pictures, but {num or 'at least 2'} are needed; {FORM}"
            )
        self.chosen = (
            np.arange(self.count) * (available if self.folder else self.count) // self.count
        )
        self.record = dict(
            path=path,
            pictures=self.count,
            size=self.size,
            hash=self.set.fingerprint,
            settings=getattr(self.set, "settings", None),
        )
        if self.set.labels is not None:
            counts = np.unique(self.set.labels[self.chosen], return_counts=True)[1].tolist()
            self.record["labels"] = dict(classes=len(counts), fewest=min(counts), most=max(counts))

    def stack(self, index, size):
        return self.set.stack(self.chosen[index], size)

    def batches(self, device, workers):
        """This process's share -> (index (b,), images uint8 (b,3,H,W)) on the device."""
        blocks = PictureBlocks(self.stack, self.size, self.count, self.batch_size)
        mine = range(rank(), -(-self.count // self.batch_size), world())
        loader = load_batches(blocks, mine, workers if self.folder else 0, device)
        for k, batch in zip(
            mine, tqdm(loader, self.path, len(mine), unit="batch", leave=False, disable=rank() > 0)
        ):
            yield (
                k * self.batch_size + torch.arange(len(batch["image"]), device=device),
                batch["image"],
            )


def collect(net, batches, count, keep=0):
    """Streams (index, uint8 (B,3,H,W)) of all processes, `count` pictures, through the network -> dict: mu, sigma of
    pool; mu_s, sigma_s of spatial; sums of the Inception Score's splits; pool features of `keep` evenly spaced ones."""
    device, keep = next(net.parameters()).device, min(keep, count)
    sums = {
        k: torch.zeros(d + 1, d + 1, dtype=torch.float64, device=device)
        for k, d in net.dims.items()
    }
    sums["splits"] = torch.zeros(-(-count // 5000), 1009, dtype=torch.float64, device=device)
    sums["features"] = torch.zeros(keep, net.dims["pool"], device=device)
    for index, images in batches:
        out = net(images)
        for key in net.dims:
            x = F.pad(out[key].double(), (0, 1), value=1.0)  # one matrix sums x x^T, x, and 1
            sums[key].addmm_(x.T, x)
        if "logits" in out:
            sums["splits"].index_add_(0, index // 5000, score_terms(out["logits"].softmax(1)))
        row, following = index * keep // count, (index + 1) * keep // count
        sums["features"][row[following > row]] = out["pool"][following > row]
    for value in sums.values():
        sum_over_processes(value)
    for key, s in (("pool", ""), ("spatial", "_s"))[: len(net.dims)]:
        x = sums.pop(key)
        mu, n = x[-1, :-1] / x[-1, -1], x[-1, -1]
        sums[f"mu{s}"], sums[f"sigma{s}"] = mu, (x[:-1, :-1] - n * mu[:, None] * mu) / (n - 1)
    return sums


def read_statistics(cache, device):
    """What `collect` gave and was kept, or nothing where there is none or it is damaged."""
    try:
        return {k: v.to(device, copy=True) for k, v in read_weights(cache)[0].items()}
    except UserError as error:
        if os.path.exists(cache):
            say(f"warning: {error}; it is computed again")
        return {}


def read_reference(net, path, size, keep=0, num=None, batch_size=16, workers=None):
    """What `collect` gives for a reference, or as much as an .npz holds of it -> dict, record. What was computed is
    kept under runs/cache for the next time."""
    device, arrays = next(net.parameters()).device, None if os.path.isdir(path) else ArraySet(path)
    held = arrays.statistics if arrays and isinstance(net, Inception) else {}
    wrong = [
        k
        for k, shape in STATISTICS.items()
        if k in held and (held[k].shape != shape or not held[k].isfinite().all())
    ]
    if wrong:
        raise UserError(
            f"{path}: {', '.join(wrong)} are no finite statistics of Inception's features"
        )
    if held and not (keep and arrays.names):
        return held, dict(path=path, hash=arrays.fingerprint, statistics="of the file")
    pictures = Pictures(path, num, size, batch_size, arrays)
    files = map(pictures.set.path, pictures.chosen) if pictures.folder else ()
    times = [os.stat(file).st_mtime_ns for file in files]  # the hash would miss a file written over
    known = json.dumps([pictures.record, times, keep, net.about])
    cache = os.path.join(
        "runs", "cache", f"fid-{hashlib.sha256(known.encode()).hexdigest()[:16]}.pt"
    )
    result = read_statistics(cache, device)
    say(
        f"reference {path}: {pictures.count} pictures, {pictures.size} px"
        + f", from {cache}" * bool(result)
    )
    if not result:
        result = collect(net, pictures.batches(device, workers), pictures.count, keep)
        if rank() == 0:
            with contextlib.suppress(OSError), writing(cache) as file:
                torch.save(result, file)
    if held:  # their arr_0 is but a part of the pictures they are of
        result = dict(held, features=result["features"])
    return result, dict(pictures.record, statistics="of the file" if held else "computed")


def compare(net, got, ref):
    """Two results of `collect` -> dict of measures, on the first process."""
    if rank():
        return {}
    main = "fid" if isinstance(net, Inception) else f"fd-{net.about['name']}"
    values = {
        main: frechet_distance(*(x[key].cpu() for x in (got, ref) for key in ("mu", "sigma")))
    }
    if all({"mu_s", "sigma_s"} <= set(x) for x in (got, ref)):
        values["sfid"] = frechet_distance(
            *(x[key].cpu() for x in (got, ref) for key in ("mu_s", "sigma_s"))
        )
    if main == "fid":
        values["inception_score"] = inception_score(None, sums=got["splits"])
    a, b = ref.get("features", ()), got["features"]
    if min(len(a), len(b)) > 3:
        values["precision"], values["recall"] = precision_recall(a.to(b.device), b)
    return values


def training_measure(ref, device, weights=None, size=None, workers=None):
    """For measuring while training: -> f(batches, count) -> dict(fid, sfid, inception_score), empty on all but the
    first process. batches: this process's share of `count` pictures as (index (B,) int64, uint8 (B,3,H,W))."""
    net = Inception(weights).to(device)
    reference, _ = read_reference(net, ref, size, workers=workers)
    return lambda batches, count: compare(net, collect(net, batches, count), reference)


@torch.no_grad()
def reconstructions(vae, lpips, batches, sums):
    """-> (index, reconstructed uint8 (B,3,H,W)); adds PSNR, SSIM, LPIPS (8-bit) and the count to `sums`."""
    for index, x in batches:
        y = to_uint8(vae.decode(vae.encode(from_uint8(x))[0]))
        distance = lpips(from_uint8(x), from_uint8(y)) if lpips is not None else torch.zeros(len(x))
        sums += torch.stack(
            [v.to(sums).sum() for v in (psnr(x, y), ssim(x, y), distance, torch.ones(len(x)))]
        )
        yield index, y


def main():
    args = parse_arguments()
    device = setup(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
        False  # setup allows it
    )
    if (
        bool(args.vae) != bool(args.data)
        or bool(args.vae) == bool(args.ref)
        or args.vae
        and args.samples
    ):
        raise UserError("give samples and --ref (generation), or --vae and --data (reconstruction)")
    if args.vae:
        vae = load_vae(args.vae, device)
        vae.set_resolution(args.size or vae.resolution)
        lpips = LPIPS(args.lpips_weights).to(device) if args.lpips else None
        path, args.ref, args.size, args.pr_images = args.data, args.data, vae.resolution, 0
        base = os.path.join(os.path.dirname(vae.info["path"]), "reconstruction")
    else:
        path = args.samples or newest_result(
            "samples.npz", "set of samples", "python sample.py --num-images 50000"
        )
        base = os.path.abspath(path).removesuffix(".npz")
    pictures = Pictures(path, args.num, args.size, args.batch_size)
    if args.features:
        net = TimmFeatures(args.features, args.features_weights)
    else:
        net = Inception(args.inception_weights)
    if pictures.count <= net.dims["pool"]:
        say(
            f"warning: {pictures.count} pictures for {net.dims['pool']} features: the distance is biased upwards"
        )
    reference, about = read_reference(
        net.to(device),
        args.ref,
        args.size or pictures.size,
        args.pr_images,
        args.num if args.vae else None,
        args.batch_size,
        args.workers,
    )
    batches, sums = (
        pictures.batches(device, args.workers),
        torch.zeros(4, dtype=torch.float64, device=device),
    )
    if args.vae:
        batches = reconstructions(vae, lpips, batches, sums)
    values = compare(net, collect(net, batches, pictures.count, args.pr_images), reference)
    if args.vae:
        values = {f"r{k}": v for k, v in values.items() if k not in ("sfid", "inception_score")}
        values |= dict(
            zip(
                ["psnr", "ssim", "lpips"][: 2 + args.lpips],
                (mean_over_processes(sums) / sums[3]).tolist(),
            )
        )
    if rank() == 0:
        mark = (
            "" if net.about["published"] else f" [weights {net.about['weights'][:8]}]"
        )  # part of a number's name
        for k, v in values.items():
            say(f"{k + mark * (k not in ('psnr', 'ssim', 'lpips')):36} {v:12.4f}")
        out = args.out or f"{base}.{next(iter(values)).replace('/', '-')}.json"
        versions = {
            k: importlib.metadata.version(k)
            for k in ("torch", "torchvision", "timm", "numpy", "pillow")
        }
        record = dict(
            values,
            samples=pictures.record,
            reference=about,
            network=net.about,
            vae=args.vae and vae.info,
            arguments=vars(args),
            provenance=provenance(),
            versions=versions,
        )
        try:
            write_json(out, record)
        except OSError as error:
            raise UserError(
                f"the numbers above cannot be kept in {out} ({first_line(error)}); name another file with "
                "--out"
            ) from None
        say(f"written   {out}")


if __name__ == "__main__":
    run_main(main)
