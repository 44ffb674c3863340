"""Measure a set of pictures against a reference: FID, sFID, Inception Score, precision and recall,
as ADM's evaluator defines them; or a VAE's reconstructions against their originals: rFID, PSNR,
SSIM, LPIPS, and iFID, the same for pictures between neighbours in its latents.

    FID = |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)), where mu and S are the mean and the covariance
    of a network's features of a set.

    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz   # against ADM's reference
    python fid.py drawn_pictures --ref data/imagenet/train            # two folders of pictures
    python fid.py --vae runs/vae --data data/imagenet/val             # reconstruction
    python fid.py --vae runs/vae --data data/imagenet/val --interpolate data/imagenet/train   # iFID
    python fid.py A --ref B --features vit_small_patch14_dinov2.lvd142m  # any timm model's features

Pictures are 8-bit RGB. Features are float32, statistics and distances float64. The statistics of a
reference are kept under runs/cache. The result is printed and written as JSON beside the samples
(samples.fid.json), with everything that moves the numbers. For several processes use torchrun.
"""

import argparse
import contextlib
import functools
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg.lapack import dpstrf
from torch import nn
from torchvision.models import inception as tv

from common.archives import holds_pictures
from common.draws import epoch_order, uniform
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
from common.flags import (
    parse_flags,
    positive,
    two_or_more,
    whole_number,
)
from common.pictures import (
    ImageSet,
    PictureBlocks,
    from_uint8,
    load_batches,
    save_grid,
    to_uint8,
)
from common.processes import (
    autocast,
    barrier,
    progress,
    rank,
    run_main,
    say,
    setup,
    sum_over_processes,
    without_tf32,
    world,
)
from common.runs import newest_result, provenance
from common.weights import load_vae
from models import LPIPS

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
# The start of the file's sha256.
WEIGHTS_HASH = "6726825d"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
# Inception's statistics as ADM's .npz files name them, and their shapes: of the pooled features,
# and of the spatial ones (_s).
STATISTICS = {
    "mu": (2048,),
    "sigma": (2048, 2048),
    "mu_s": (2023,),
    "sigma_s": (2023, 2023),
}
# Pictures in one split of the Inception Score.
SPLIT_SIZE = 5000
FORM = (
    "a set is a folder of pictures, or an .npz with arr_0, uint8 of shape (N,H,W,3), as sample.py "
    "writes it; a reference may have Inception's mu and sigma instead"
)


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    g = p.add_argument_group("samples")
    g.add_argument(
        "samples",
        nargs="?",
        help=".npz (arr_0) or folder (default: the newest samples.npz under runs/)",
    )
    g.add_argument("--ref", help=".npz (mu and sigma, arr_0, or all, as ADM's) or folder")
    g.add_argument(
        "--adm",
        action="store_true",
        help="precision and recall with ADM's float16 distances, and the Inception Score of the "
        "pictures in file order, as ADM's evaluator has them",
    )
    g.add_argument(
        "--pr-images",
        type=whole_number,
        default=50000,
        help="pictures of each set for precision and recall; 0: neither is measured",
    )
    g = p.add_argument_group("reconstructions")
    g.add_argument(
        "--vae", help="VAE: file, run folder, published checkpoint or hf:<owner>/<repository>"
    )
    g.add_argument("--data", help="pictures to encode and to decode from the mean of the posterior")
    g.add_argument(
        "--interpolate",
        metavar="TRAIN",
        help="pictures that the VAE was trained on: also measure iFID, of pictures of --data "
        "joined with their neighbours among these",
    )
    g.add_argument("--lpips", type=int, choices=[0, 1], default=1, help="0: no LPIPS")
    g.add_argument(
        "--lpips-weights",
        nargs="+",
        default=(),
        help="local files of VGG16 and the linear layers (default: downloaded once)",
    )
    g = p.add_argument_group("pictures and features")
    g.add_argument(
        "--num",
        type=two_or_more,
        help="number of pictures of the set: an .npz's first, a folder's evenly spaced "
        "(default: all)",
    )
    g.add_argument(
        "--size",
        type=positive,
        help="side to which a folder's pictures are cropped (default: the samples' or the VAE's)",
    )
    g.add_argument("--features", help="timm model that replaces Inception in the distance")
    g.add_argument("--features-weights", help="local file of its weights (default: timm's own)")
    g.add_argument("--inception-weights", help=f"local {WEIGHTS} (default: downloaded once)")
    g = p.add_argument_group("run")
    g.add_argument("--out", help="JSON file of the result (default: beside the samples or the VAE)")
    g.add_argument(
        "--batch-size",
        type=positive,
        default=16,
        help="pictures a process takes at once (16 is best on a CPU)",
    )
    g.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    g.add_argument(
        "--workers",
        type=whole_number,
        help="loader processes per process (default: its share of the cores)",
    )
    return parse_flags(p, argv)


# --------------------------------------------------------------------------------------------------
# Feature networks
#
# A feature network maps pictures, uint8 (B,3,H,W) of any size, to {"pool": (B,D), ...}, float32.
#   dims: {name: D} of the features whose mean and covariance are measured, "pool" among them.
#   about: what identifies the network and its resize; it is written into the result.


def tf_resize(x, size):
    """Resize float (B,C,H,W) to (B,C,size,size) as TensorFlow 1's resize_bilinear does.

    It interpolates between the pixels at floor(i * H/size) and the next one, with no half-pixel
    shift and no antialiasing. The float32 operations are the same, so the results are too.
    """
    for axis, shape in ((3, (1, size)), (2, (size, 1))):
        length = x.shape[axis]
        scale = torch.tensor(length / size, dtype=torch.float32)
        position = torch.arange(size, device=x.device) * scale
        low = position.long()
        high = (low + 1).clamp(max=length - 1)
        weight = (position - low).view(shape)
        a = x.index_select(axis, low)
        b = x.index_select(axis, high)
        x = a + (b - a) * weight
    return x


class MaxPoolE(tv.InceptionE):
    """The last block, Mixed_7c: its pooling branch has a max pool where Mixed_7b averages."""

    def _forward(self, x):
        a = self.branch3x3_1(x)
        b = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [
            self.branch1x1(x),
            self.branch3x3_2a(a),
            self.branch3x3_2b(a),
            self.branch3x3dbl_3a(b),
            self.branch3x3dbl_3b(b),
            self.branch_pool(F.max_pool2d(x, 3, 1, 1)),
        ]


def published_weights():
    """Path of the published weights in torch.hub's folder, after downloading them if need be."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", WEIGHTS)
    try:
        if rank() == 0 and not os.path.isfile(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, path, WEIGHTS_HASH)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download Inception's weights ({first_line(error)}); fetch {WEIGHTS_URL} "
            f"elsewhere and put it at {path}, or name it with --inception-weights"
        ) from None
    barrier()
    return path


def exclude_padding(branch, inputs):
    """Correct the average pool before a convolution: a forward pre-hook, inputs[0] (B,C,h,w).

    torchvision's 3x3 pool counts the padding as pixels of value 0; TensorFlow's averages over the
    pixels inside the image only. Dividing by their share of the window turns one into the other.
    """
    x = inputs[0]
    ones = torch.ones_like(x[:1, :1])
    return x / F.avg_pool2d(ones, 3, 1, 1)


class Inception(tv.Inception3):
    """The 2015 TensorFlow Inception that defines FID, from its published PyTorch conversion.

    weights: a local file, which may be another than the published one; without it the published
    file is downloaded. Raises UserError if the file cannot be read or does not fit.
    """

    def __init__(self, weights=None):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        self.Mixed_7c = MaxPoolE(2048)

        path = weights or published_weights()
        with reading(path, "Inception's weights"), open(path, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        published = digest.startswith(WEIGHTS_HASH)
        if not published and not weights:
            raise UserError(
                f"{path} is not the published file: its sha256 begins with {digest[:8]}, not "
                f"{WEIGHTS_HASH}; remove it to have it downloaded again, or name it with "
                "--inception-weights to use it as it is"
            )
        if not published:
            say(
                f"warning: {path} is not the published file: "
                "numbers made with it are comparable with each other only"
            )
        load_strictly(self, read_weights(path)[0], path)
        self.dims = {"pool": 2048, "spatial": 2023}
        self.about = {
            "name": "Inception",
            "weights": digest,
            "published": published,
            "resize": "TensorFlow 1 bilinear to 299x299",
        }

        # Folding the batch norms into the convolutions and using the channels_last memory format
        # make it twice as fast on a CPU.
        self.eval().requires_grad_(False)
        for name, module in list(self.named_modules()):
            if isinstance(module, tv.BasicConv2d):
                module.conv = nn.utils.fusion.fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()
            if name.endswith("branch_pool") and "Mixed_7c" not in name:
                module.register_forward_pre_hook(exclude_padding)
        self.to(memory_format=torch.channels_last)

    # TF32 would round both factors of each product to 10 bits.
    @torch.no_grad()
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def forward(self, images):
        """uint8 (B,3,H,W) -> pool (B,2048), spatial (B,2023), and logits (B,1008) without bias."""
        x = (tf_resize(images.float(), 299) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_1a_3x3(x)
        x = self.Conv2d_2a_3x3(x)
        x = self.Conv2d_2b_3x3(x)  # (B,64,147,147)
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_3b_1x1(x)
        x = self.Conv2d_4a_3x3(x)  # (B,192,71,71)
        x = F.max_pool2d(x, 3, 2)
        x = self.Mixed_5b(x)
        x = self.Mixed_5c(x)
        x = self.Mixed_5d(x)  # (B,288,35,35)
        x = self.Mixed_6a(x)
        x = self.Mixed_6b(x)
        x = self.Mixed_6c(x)
        x = self.Mixed_6d(x)  # (B,768,17,17), the first channels from its 1x1 branch
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # 17*17*7 = 2023
        x = self.Mixed_6e(x)
        x = self.Mixed_7a(x)
        x = self.Mixed_7b(x)
        x = self.Mixed_7c(x)  # (B,2048,8,8)
        pool = x.mean((2, 3))
        logits = pool.double() @ self.fc.weight.double().T
        return {"pool": pool, "spatial": spatial, "logits": logits}


class TimmFeatures(nn.Module):
    """The pooled features of any timm model: class token or average, as the model has it.

    weights: a local file in timm's key names; without it timm downloads its own. Raises UserError
    if timm cannot build the model with these weights.
    """

    def __init__(self, name, weights=None):
        super().__init__()
        # Imported here: timm is slow to import, and most runs do without it.
        import timm

        source = {}
        if weights:
            overlay = {"file": str(weights), "custom_load": False}
            source = {"pretrained_cfg_overlay": overlay}
        try:
            self.model = timm.create_model(name, pretrained=True, num_classes=0, **source).eval()
        except Exception as error:
            raise UserError(
                f"--features {name}: timm cannot build it with its weights ({first_line(error)}); "
                "choose another, or give a file in timm's key names with --features-weights"
            ) from None
        config = timm.data.resolve_model_data_config(self.model)
        self.side = config["input_size"][-1]
        self.mean = config["mean"]
        self.std = config["std"]
        self.dims = {"pool": self.model.num_features}
        self.about = {
            "name": name,
            "weights": state_hash(self.model.state_dict()),
            "published": True,
            "resize": f"antialiased bicubic to {self.side}x{self.side}",
        }

    @torch.no_grad()
    def forward(self, images):
        """uint8 (B,3,H,W) -> pool (B,D)."""
        size = (self.side, self.side)
        x = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
        x = x.clamp(0, 255) / 255
        mean = x.new_tensor(self.mean).view(3, 1, 1)
        std = x.new_tensor(self.std).view(3, 1, 1)
        return {"pool": self.model((x - mean) / std)}


# --------------------------------------------------------------------------------------------------
# Measures of features


def pivoted_cholesky(sigma):
    """Covariance, float64 array (D,D) -> L (D,R) with L L^T = sigma, where R is its rank.

    Pivoting ends the factorisation at the rank, so a singular covariance can be factored too.
    """
    lower, pivots, numerical_rank, _ = dpstrf(sigma, lower=1)
    return np.tril(lower)[np.argsort(pivots), :numerical_rank]


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians: means (D,), covariances (D,D), in float64.

    With S = L L^T for both covariances, tr (S1 S2)^(1/2) is the sum of the singular values of
    L1^T L2: they are the square roots of the eigenvalues of S1 S2. No eigenvalue is computed and
    then rooted, which would turn a rounding error of 1e-16 into one of 1e-8. So covariances that
    are singular, or equal, do no harm.
    """
    mu1 = np.asarray(mu1, dtype=np.float64)
    mu2 = np.asarray(mu2, dtype=np.float64)
    sigma1 = np.asarray(sigma1, dtype=np.float64)
    sigma2 = np.asarray(sigma2, dtype=np.float64)
    product = pivoted_cholesky(sigma1).T @ pivoted_cholesky(sigma2)
    trace_of_root = torch.linalg.svdvals(torch.from_numpy(product)).sum().item()
    return float(
        np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    )


def score_terms(probabilities):
    """Class probabilities p (B,C) -> p and sum_c p log p, float64 (B,C+1).

    Their sum over the pictures of a split is all that the split's score needs.
    """
    p = probabilities.double()
    return torch.cat([p, torch.xlogy(p, p).sum(1, keepdim=True)], 1)


def inception_score(sums):
    """Sums of score_terms over each split, (splits,C+1) -> Inception Score.

    The score is the mean over the splits of exp(mean KL(p(y|x) || p(y))), as in ADM's evaluator.
    `collect` says which pictures are in a split.
    """
    # The probabilities of a picture sum to 1, so those of a split sum to its number of pictures.
    count = sums[:, :-1].sum(1, keepdim=True)
    mean = sums / count
    marginal = mean[:, :-1]
    divergence = mean[:, -1] - torch.xlogy(marginal, marginal).sum(1)
    return divergence.exp().mean().item()


def squared_distances(a, b):
    """Rows (N,D), (M,D) -> squared Euclidean distances (N,M), by |a|^2 + |b|^2 - 2 ab.

    This is faster and takes less memory than torch.cdist.
    """
    a_squared = torch.linalg.vector_norm(a, dim=1).square()
    b_squared = torch.linalg.vector_norm(b, dim=1).square()
    return torch.addmm(b_squared, a, b.T, alpha=-2).add_(a_squared[:, None])


def half_distances(a, b):
    """As squared_distances, with the rounding of ADM's evaluator: rows (N,D), (M,D) -> (N,M).

    It casts the features to float16, and rounds every square, norm, product, difference and sum to
    float16. Here norms and products are accumulated in float32 before they are rounded. If anything
    leaves float16's range, the whole block is computed in float32.
    """
    rows = a.half()
    columns = b.half()
    row_norms = rows.square().float().sum(1).half()
    column_norms = columns.square().float().sum(1).half()
    products = (rows.float() @ columns.float().T).half()
    distances = row_norms[:, None] - 2 * products + column_norms
    if not distances.isfinite().all():
        distances = squared_distances(a.float(), b.float())
    return distances.float().clamp(min=0)


def neighbour_distances(x, k, block, distances):
    """Rows (N,D) -> squared distance (N,) of each from its k-th neighbour among the others."""
    found = []
    for part in x.split(block):
        # The nearest of all is the row itself.
        nearest = distances(part, x).topk(k + 1, largest=False).values
        found.append(nearest[:, k])
    return torch.cat(found)


def precision_recall(ref, samples, k=3, block=512, adm=False):
    """Features of the reference (N,D) and of the samples (M,D) -> precision, recall.

    Precision is the share of the samples that lie in the ball of some reference picture, which
    reaches to that picture's k-th neighbour in the reference. Recall exchanges the roles
    (Kynkaanniemi et al. 2019). Distances are float64, or float16 as in ADM's evaluator with `adm`;
    `block` pictures are compared at a time.
    """
    ref = torch.as_tensor(ref).double()
    samples = torch.as_tensor(samples).double()
    distances = half_distances if adm else squared_distances
    ref_radii = neighbour_distances(ref, k, block, distances)
    sample_radii = neighbour_distances(samples, k, block, distances)
    precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    recalled = []
    for part, radii in zip(ref.split(block), ref_radii.split(block), strict=True):
        near = distances(part, samples)  # (block,M)
        precise |= (near <= radii[:, None]).any(0)
        recalled.append((near <= sample_radii).any(1))
    precision = precise.double().mean().item()
    recall = torch.cat(recalled).double().mean().item()
    return precision, recall


# --------------------------------------------------------------------------------------------------
# Measures of reconstructions


def psnr(a, b, data_range=255):
    """Images (B,3,H,W) -> peak signal-to-noise ratio (B,) in dB.

    Equal images get 148 dB at data range 255, as if their mean squared error were 1e-10.
    """
    error = (a.double() - b.double()).square().mean((1, 2, 3)).clamp(min=1e-10)
    return 10 * torch.log10(data_range**2 / error)


def gaussian_blur(x):
    """Images (B,C,H,W) -> (B,C,H-10,W-10): means under an 11x11 Gaussian window of sigma 1.5.

    On a CPU this is three times as fast as a float64 convolution.
    """
    offsets = torch.arange(11, dtype=torch.float64) - 5
    window = torch.softmax(-offsets.square() / (2 * 1.5**2), 0).tolist()
    height = x.shape[2] - 10
    width = x.shape[3] - 10
    x = sum(weight * x[:, :, i : i + height] for i, weight in enumerate(window))
    return sum(weight * x[..., i : i + width] for i, weight in enumerate(window))


def ssim(a, b, data_range=255):
    """Images (B,C,H,W) of at least 11x11 pixels -> structural similarity (B,), in [-1,1].

    Wang et al. 2004 with an 11x11 Gaussian window of sigma 1.5, K1 0.01 and K2 0.03, each channel
    alone. Only windows inside the picture count, as in scikit-image; torchmetrics' mean includes
    windows over a mirrored border.
    """
    a = a.double()
    b = b.double()
    mean_a = gaussian_blur(a)
    mean_b = gaussian_blur(b)
    variance_a = gaussian_blur(a * a) - mean_a**2
    variance_b = gaussian_blur(b * b) - mean_b**2
    covariance = gaussian_blur(a * b) - mean_a * mean_b
    c1 = (0.01 * data_range) ** 2
    c2 = (0.03 * data_range) ** 2
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    denominator = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return (numerator / denominator).mean((1, 2, 3))


# --------------------------------------------------------------------------------------------------
# Sets of pictures


class ArraySet:
    """The pictures of an .npz under ImageSet's names. They are read when they are asked for.

    names: range over the pictures, empty if there is no arr_0. labels: (N,) or None. classes: their
    names, a list, or None.
    statistics: those of Inception's features that the file holds, {name: float64 tensor}.
    settings: what sample.py recorded, or None. fingerprint: hash of the arrays' names, sizes and
    checksums; open_npz has compared the checksums with the data. smallest, largest: the shorter
    side.
    Raises UserError if the file is damaged or not of the form of a set.
    """

    def __init__(self, path):
        self.path = path
        with reading(path, f".npz ({FORM})"):
            # The file stays open for the pictures.
            self.file = open_npz(path)
            self.statistics = self.read_statistics()
            self.settings = None
            if "settings" in self.file:
                self.settings = json.loads(str(self.file["settings"]))
            self.shape = (0, 0, 0, 3)
            if "arr_0" in self.file:
                self.open_pictures()
            self.labels = self.read_labels()
            self.classes = None
            if "classes" in self.file:
                self.classes = [str(name) for name in self.file["classes"].flat]
            members = self.file.zip.infolist()
        self.names = range(self.shape[0])
        self.smallest = self.largest = min(self.shape[1:3])
        arrays = sorted((member.filename, member.file_size, member.CRC) for member in members)
        self.fingerprint = hashlib.sha256(json.dumps(arrays).encode()).hexdigest()

    def read_statistics(self):
        if "mu" not in self.file or "sigma" not in self.file:
            return {}
        return {
            name: torch.from_numpy(self.file[name].astype(np.float64))
            for name in STATISTICS
            if name in self.file
        }

    def open_pictures(self):
        """Read the header of arr_0 -> .shape (N,H,W,3); .pixels, the open file; .start in it."""
        self.pixels = self.file.zip.open("arr_0.npy")
        np.lib.format.read_magic(self.pixels)
        self.shape, fortran, dtype = np.lib.format.read_array_header_1_0(self.pixels)
        self.start = self.pixels.tell()
        is_pictures = len(self.shape) == 4 and self.shape[3] == 3 and 0 not in self.shape[1:3]
        if dtype != np.uint8 or fortran or not is_pictures:
            order = " (Fortran order)" if fortran else ""
            raise UserError(f"{self.path}: arr_0 is {dtype} of shape {self.shape}{order}; {FORM}")

    def read_labels(self):
        """Labels as ADM writes them (arr_1) or as sample.py does (labels), or None."""
        labels = None
        for name in ("arr_1", "labels"):
            if name in self.file:
                labels = self.file[name]
                if labels.shape != self.shape[:1]:
                    raise UserError(
                        f"{self.path}: {name} has shape {labels.shape}, but arr_0 holds "
                        f"{self.shape[0]} pictures; give one label each, or leave labels out"
                    )
        return labels

    def stack(self, index, size):
        """Consecutive indices (b,) -> uint8 (b,3,H,W). size is ignored; ImageSet crops to it."""
        picture_bytes = math.prod(self.shape[1:])
        self.pixels.seek(self.start + int(index[0]) * picture_bytes)
        data = self.pixels.read(len(index) * picture_bytes)
        images = np.frombuffer(data, np.uint8).reshape(-1, *self.shape[1:])
        return torch.from_numpy(images.copy()).permute(0, 3, 1, 2)


def refuse_run_folder(path):
    """Raise UserError for a folder of a training run: its pictures are grids, not samples."""
    inside = os.path.abspath(path)
    for folder in (inside, os.path.dirname(inside)):
        if os.path.isfile(os.path.join(folder, "metrics.jsonl")):
            raise UserError(
                f"{path} is of a training run, whose pictures are grids to look at; draw a set "
                "with `python sample.py --num-images 50000`"
            )


def folder_settings(path, available):
    """What sample.py recorded in a folder of `available` pictures, or None.

    Raises UserError if the set was interrupted.
    """
    file = os.path.join(path, "settings.json")
    if not os.path.isfile(file):
        return None
    with reading(file, "the settings of a set of ours"), open(file) as opened:
        settings = json.load(opened)
        num = int(settings["num"])
    if available != num:
        raise UserError(
            f"{path} has {available} of the {num} pictures that {file} tells of; rerun the "
            "sample.py command to complete it, or remove that file"
        )
    return settings


class Pictures:
    """A set in batches: pictures of a folder, cropped to `size`, or of an .npz, as they are.

    num: how many, evenly spaced of a folder, the first of an .npz (default: all). size: needed for
    a folder whose pictures are not of one size. arrays: the ArraySet of the .npz, if it is open
    already.

    set: the ImageSet or ArraySet. chosen: int (count,), indices into it. record: what identifies
    the set, for the result. Raises UserError if there are not enough pictures, or their size is not
    clear.
    """

    def __init__(self, path, num=None, size=None, batch_size=16, arrays=None):
        self.path = path
        self.batch_size = batch_size
        self.folder = holds_pictures(path)
        if self.folder:
            refuse_run_folder(path)
            self.set = ImageSet(path)
            self.size = size or self.only_size()
            settings = folder_settings(path, len(self.set.names))
        else:
            self.set = arrays if arrays is not None else ArraySet(path)
            self.size = self.set.smallest
            settings = self.set.settings

        available = len(self.set.names)
        self.count = num or available
        if not 2 <= self.count <= available:
            needed = num or "at least 2"
            raise UserError(f"{path} has {available} pictures, but {needed} are needed; {FORM}")
        self.chosen = np.arange(self.count)
        if self.folder:
            self.chosen = self.chosen * available // self.count

        self.record = {
            "path": path,
            "pictures": self.count,
            "size": self.size,
            # Of the pictures before they are cropped.
            "shorter sides": [self.set.smallest, self.set.largest],
            "hash": self.set.fingerprint,
            "settings": settings,
        }
        if self.set.labels is not None:
            _, counts = np.unique(self.set.labels[self.chosen], return_counts=True)
            self.record["labels"] = {
                "classes": len(counts),
                "fewest": int(counts.min()),
                "most": int(counts.max()),
            }
            if self.set.classes is not None:
                self.record["labels"]["names"] = self.set.classes

    def only_size(self):
        """The shorter side of all pictures. Raises UserError if they are of several sizes."""
        if self.set.smallest < self.set.largest:
            raise UserError(
                f"{self.path} holds pictures of several sizes, with shorter sides from "
                f"{self.set.smallest} to {self.set.largest} pixels; say with --size to which one "
                "they are to be brought, or remove those that do not belong there"
            )
        return self.set.smallest

    def stack(self, index, size):
        return self.set.stack(self.chosen[index], size)

    def batches(self, device, workers):
        """Yield this process's share: positions in the set (b,), images uint8 (b,3,H,W)."""
        blocks = PictureBlocks(self.stack, self.size, self.count, self.batch_size)
        mine = range(rank(), math.ceil(self.count / self.batch_size), world())
        loader = load_batches(blocks, mine, workers if self.folder else 0, device)
        bar = progress(loader, self.path, len(mine), unit="batch")
        for block, batch in zip(mine, bar, strict=True):
            images = batch["image"]
            yield block * self.batch_size + torch.arange(len(images), device=device), images


# --------------------------------------------------------------------------------------------------
# Statistics of a set
#
# They are a dict of tensors, equal on every process:
#   mu (D,), sigma (D,D): mean and covariance of "pool", float64.
#   mu_s, sigma_s: those of "spatial", where the network has it.
#   splits (S,1009): sums of score_terms over each split, float64; zeros where it has no logits.
#   features (K,D): "pool" of K evenly spaced pictures, float32, for precision and recall.


def mean_and_covariance(moments):
    """Sum over N pictures of (x,1)(x,1)^T, (D+1,D+1) -> mean (D,), covariance (D,D) with N-1."""
    count = moments[-1, -1]
    mu = moments[-1, :-1] / count
    sigma = (moments[:-1, :-1] - count * mu[:, None] * mu) / (count - 1)
    return mu, sigma


def collect(net, batches, count, keep=0, in_order=False):
    """Statistics of a set, from this process's share of its pictures.

    batches: positions in the set (b,) and images uint8 (b,3,H,W). count: pictures of the whole set.
    keep: number of pictures whose features are kept. in_order: the splits of the Inception Score
    follow the order of the set, as in ADM's evaluator. A set that is sorted by class would then
    have few classes in each split, and a low score. So without it they follow a fixed shuffle.
    """
    device = next(net.parameters()).device
    place = torch.arange(count, device=device)
    if not in_order:
        place = torch.from_numpy(epoch_order(0, 0, count)).to(device)
    keep = min(keep, count)
    moments = {
        name: torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=device)
        for name, dim in net.dims.items()
    }
    splits = torch.zeros(
        math.ceil(count / SPLIT_SIZE), 1008 + 1, dtype=torch.float64, device=device
    )
    features = torch.zeros(keep, net.dims["pool"], device=device)

    for index, images in batches:
        outputs = net(images)
        for name, total in moments.items():
            x = F.pad(outputs[name].double(), (0, 1), value=1.0)  # (b,D+1)
            total.addmm_(x.T, x)
        if "logits" in outputs:
            terms = score_terms(outputs["logits"].softmax(1))
            splits.index_add_(0, place[index] // SPLIT_SIZE, terms)
        # Among the pictures before position i, i * keep // count are kept. Where this number grows
        # from a picture to the next one, the picture is kept.
        kept_before = index * keep // count
        is_kept = (index + 1) * keep // count > kept_before
        features[kept_before[is_kept]] = outputs["pool"][is_kept]

    for total in (*moments.values(), splits, features):
        sum_over_processes(total)
    result = {"splits": splits, "features": features}
    result["mu"], result["sigma"] = mean_and_covariance(moments["pool"])
    if "spatial" in moments:
        result["mu_s"], result["sigma_s"] = mean_and_covariance(moments["spatial"])
    return result


def read_statistics(path, device):
    """Statistics from a file of the cache, or {} if there is none or it is damaged."""
    try:
        state, _ = read_weights(path)
    except UserError as error:
        if os.path.exists(path):
            say(f"warning: {error}; its statistics are computed again")
        return {}
    return {name: value.to(device, copy=True) for name, value in state.items()}


def cached_statistics(net, pictures, keep, workers):
    """collect(...) of a whole set, or what an earlier run kept of it under runs/cache."""
    # What the pictures are counts, not where they are.
    record = {name: value for name, value in pictures.record.items() if name != "path"}
    key = json.dumps([record, keep, net.about])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    cache = os.path.join("runs", "cache", f"fid-{digest}.pt")

    device = next(net.parameters()).device
    note = f"reference {pictures.path}: {pictures.count} pictures, {pictures.size} px"
    result = read_statistics(cache, device)
    if result:
        say(f"{note}, from {cache}")
        return result
    say(note)
    result = collect(net, pictures.batches(device, workers), pictures.count, keep)
    if rank() == 0:
        # Without the file the next run computes them again.
        with contextlib.suppress(OSError), writing(cache) as file:
            torch.save(result, file)
    return result


def say_other_sizes(path, images, size):
    """Print a note if the pictures of an ImageSet are enlarged or reduced to `size`, and a warning
    if those of an ArraySet have another size."""
    if isinstance(images, ArraySet):
        if len(images.names) > 0 and images.smallest != size:
            say(
                f"warning: {path} has pictures of {images.smallest} pixels and is compared with "
                f"pictures of {size}: the distance also measures the difference in size"
            )
    elif images.smallest < size:
        say(
            f"note: some pictures of {path} are enlarged to {size} pixels (the smallest has "
            f"{images.smallest})"
        )
    elif images.largest > size:
        say(f"note: pictures of {path} are reduced to {size} pixels")


def check_inception_statistics(path, statistics):
    """Raise UserError unless they are finite and of the shapes in STATISTICS."""
    wrong = []
    for name, shape in STATISTICS.items():
        value = statistics.get(name)
        if value is not None and (value.shape != shape or not value.isfinite().all()):
            wrong.append(f"{name} {tuple(value.shape)}")
    if wrong:
        raise UserError(
            f"{path}: {', '.join(wrong)} are not finite statistics of Inception's features, "
            f"whose shapes are {STATISTICS}; name ADM's file, or one with pictures alone"
        )


def read_reference(net, path, size, keep=0, num=None, batch_size=16, workers=None):
    """Statistics of a reference, and a record of where they come from.

    path: what ImageSet takes, or an .npz with statistics of Inception's features, pictures, or
        both.
    size, num, batch_size: as for Pictures. keep: as for collect.
    Raises UserError if neither statistics nor enough pictures are there.
    """
    arrays = None
    given = {}
    if not holds_pictures(path):
        arrays = ArraySet(path)
        if size is not None:
            say_other_sizes(path, arrays, size)
        # The statistics in a file are Inception's, and of no use to another network.
        if isinstance(net, Inception):
            given = arrays.statistics
            check_inception_statistics(path, given)

    # The file's statistics are enough: it has no pictures, or no features are to be kept.
    if given and (keep == 0 or len(arrays.names) == 0):
        return given, {"path": path, "hash": arrays.fingerprint, "statistics": "of the file"}

    # There are only pictures: their statistics are computed.
    pictures = Pictures(path, num, size, batch_size, arrays)
    if pictures.folder:
        say_other_sizes(path, pictures.set, pictures.size)
    computed = cached_statistics(net, pictures, keep, workers)
    if not given:
        return computed, {**pictures.record, "statistics": "computed"}

    # There are both, as in ADM's files. Their statistics describe the whole reference and their
    # arr_0 is only a part of it, so its pictures serve for precision and recall alone.
    reference = {**given, "features": computed["features"]}
    return reference, {**pictures.record, "statistics": "of the file"}


# --------------------------------------------------------------------------------------------------
# Interpolations
#
# iFID (Xu et al., arXiv 2603.05630) is the Frechet distance between held-out pictures and what a
# VAE decodes between their latents and those of training pictures. It follows a diffusion model's
# FID where rFID does not. A latent is the mean of the posterior, normalised and flattened.

# Of so many training pictures, the nearest by cosine, one is drawn for each held-out picture.
NEIGHBOURS = 10
# The draw for held-out picture i depends on (this seed, i) alone.
NEIGHBOUR_SEED = 0
# Training pictures that are compared with all held-out ones at a time. The blocks do not depend on
# the number of processes, so neither do the last bits of a cosine.
LATENT_BLOCK = 256


class TrainingLatents:
    """The latents of training pictures, as rows (n,D): encoded, or from the cache of stage 2.

    pictures: Pictures. They have float16's rounding, which stage 2's cache has, so the two sources
    give the same numbers. precision: "bf16" or "fp32", of the encoder. source, cached: what
    find_cached_latents returned.
    """

    def __init__(
        self,
        vae,
        pictures,
        device,
        workers=None,
        precision="fp32",
        source="encoded",
        cached=None,
    ):
        self.vae = vae
        self.pictures = pictures
        self.device = device
        self.workers = workers
        self.precision = precision
        self.source = source
        self.cached = cached

    def rows(self, positions):
        """This process's share of the rows at any positions in the set, int64 (M,), by blocks.

        Yield the places in `positions` (b,) and the rows (b,D).
        """
        count = len(positions)
        mine = range(rank(), math.ceil(count / LATENT_BLOCK), world())
        places = [
            torch.arange(k * LATENT_BLOCK, min((k + 1) * LATENT_BLOCK, count), device=self.device)
            for k in mine
        ]
        positions = np.asarray(positions)
        if self.cached is not None:
            for place in progress(places, "latents", unit="block"):
                chosen = self.pictures.chosen[positions[place.cpu().numpy()]]
                # Side 0 is the picture itself, not its mirror image; entry 0 is the mean.
                means = torch.from_numpy(self.cached[chosen, 0, 0]).to(self.device)
                yield place, latent_rows(self.vae, means)
            return
        load = functools.partial(load_at, self.pictures, positions)
        blocks = PictureBlocks(load, self.pictures.size, count, LATENT_BLOCK)
        workers = self.workers if self.pictures.folder else 0
        loader = load_batches(blocks, mine, workers, self.device)
        bar = progress(loader, "latents", len(mine), unit="block")
        for place, batch in zip(places, bar, strict=True):
            means = encode_means(self.vae, batch["image"], self.precision).half()
            if not means.isfinite().all():
                raise UserError(f"latents of {self.pictures.path} leave the range of fp16")
            yield place, latent_rows(self.vae, means)


def load_at(pictures, positions, places, size):
    """Pictures at the positions[places] of a set -> uint8 (b,3,size,size)."""
    wanted = positions[np.asarray(places)]
    if pictures.folder:
        return pictures.stack(wanted, size)
    # An .npz reads consecutive pictures only.
    return torch.cat([pictures.stack(i, size) for i in wanted[:, None]])


def find_cached_latents(vae, pictures):
    """The complete cache of stage 2 of these pictures' latents by this VAE -> (its folder, memory
    map (N,S,2,C,h,w) of S sides, mean and std), or ("encoded", None) if there is none."""
    name = f"latents-{vae.info['hash'][:8]}-{pictures.set.fingerprint[:8]}-"
    folder = os.path.join(os.path.dirname(vae.info["path"]), name)
    shape = (len(pictures.set.names), 2, vae.channels, vae.latent_size, vae.latent_size)
    # Those in fp32 come before those in bf16.
    for found in sorted(glob.glob(f"{glob.escape(folder)}*"), reverse=True):
        # What is damaged or incomplete is not used.
        with contextlib.suppress(OSError, ValueError):
            latents = np.load(os.path.join(found, "latents.npy"), mmap_mode="r")
            done = np.load(os.path.join(found, "done.npy"))
            if latents.shape[:1] + latents.shape[2:] == shape and (done == 1).all():
                return found, latents
    return "encoded", None


@torch.no_grad()
def encode_means(vae, images, precision):
    """uint8 (b,3,H,W) -> means of the posteriors, float32 (b,C,h,w)."""
    means = []
    for part in images.split(16):
        with autocast(images.device, precision):
            means.append(vae.encode(from_uint8(part))[0].float())
    return torch.cat(means)


def latent_rows(vae, means):
    """Means of posteriors (b,C,h,w) -> normalised and flattened, float32 (b,D)."""
    return vae.normalize(means.float()).flatten(1)


def nearest_latents(queries, blocks, k=NEIGHBOURS):
    """The k rows nearest to each query by cosine, over all processes.

    queries: (M,D), the same on every process. blocks: this process's share of the rows, as their
    positions (b,), rising, and the rows (b,D).
    -> positions (M,k), the nearest first; mean squared differences (M,k). Where there are fewer
    than k rows, the last differences are infinite.
    """
    count, dim = queries.shape
    norms = torch.linalg.vector_norm(queries, dim=1, keepdim=True)  # (M,1)
    units = queries / norms.clamp(min=1e-12)
    best = Nearest(
        queries.new_full((count, k), -torch.inf),
        torch.zeros(count, k, dtype=torch.int64, device=queries.device),
        queries.new_full((count, k), torch.inf),
    )
    for positions, rows in blocks:
        row_norms = torch.linalg.vector_norm(rows, dim=1)  # (b,)
        with without_tf32():
            cosines = units @ (rows / row_norms.clamp(min=1e-12)[:, None]).T  # (M,b)
        cosines, columns = cosines.topk(min(k, len(rows)), dim=1)
        found_norms = row_norms[columns]
        products = cosines * norms * found_norms
        differences = (norms.square() + found_norms.square() - 2 * products).clamp(min=0) / dim
        best = nearest_of([best, Nearest(cosines, positions[columns], differences)], k)
    best = nearest_of([share_of(best, process) for process in range(world())], k)
    return best.positions, best.differences


class Nearest(NamedTuple):
    """Rows near to M queries, k of each."""

    cosines: torch.Tensor  # (M,k)
    positions: torch.Tensor  # int64 (M,k)
    differences: torch.Tensor  # mean squared, (M,k)


def nearest_of(parts, k):
    """Several Nearest -> the k nearest of all; equal ones are ordered by position."""
    merged = Nearest(*(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)))
    order = merged.positions.argsort(1)
    cosines = merged.cosines.gather(1, order)
    order = order.gather(1, cosines.argsort(dim=1, descending=True, stable=True))
    return Nearest(*(tensor.gather(1, order[:, :k]) for tensor in merged))


def share_of(best, process):
    """The Nearest of one of the processes, on all of them."""
    mine = process == rank()
    return Nearest(*(sum_over_processes(t.clone() if mine else torch.zeros_like(t)) for t in best))


def draw_neighbours(positions, differences):
    """One of each row's k positions (M,k), with probability softmax(-differences) -> (M,)."""
    probabilities = torch.softmax(-differences.double(), 1)
    ids = torch.arange(len(positions), device=positions.device)
    draws = uniform(NEIGHBOUR_SEED, "neighbour", ids).double()
    # The last draw falls into the last column in spite of rounding.
    column = (probabilities.cumsum(1)[:, :-1] < draws[:, None]).sum(1)
    return positions.gather(1, column[:, None])[:, 0]


def slerp_half(a, b):
    """Rows (n,D) of any length -> the middle of the arc between them (n,D); where the angle
    vanishes, the middle of the line."""
    a = a.double()
    b = b.double()
    angle = F.cosine_similarity(a, b, dim=1).clamp(-1, 1).acos()
    weight = torch.where(angle.sin() > 1e-6, (angle / 2).sin() / angle.sin(), 0.5)
    return (weight[:, None] * (a + b)).float()


class Interpolations:
    """Held-out pictures, each joined with a neighbour among the training pictures.

    held_out: Pictures. training: TrainingLatents. All processes together look for the neighbours
    when this is made.
    """

    def __init__(self, vae, held_out, training):
        self.vae = vae
        self.held_out = held_out
        self.training = training
        dim = vae.channels * vae.latent_size**2
        self.rows = torch.zeros(held_out.count, dim, device=training.device)
        for index, images in held_out.batches(training.device, training.workers):
            self.rows[index] = self.encode(images)
        sum_over_processes(self.rows)
        count = training.pictures.count
        positions, differences = nearest_latents(self.rows, training.rows(np.arange(count)))
        # Positions in the training set, int64 (M,).
        self.neighbours = draw_neighbours(positions, differences).cpu().numpy()
        self.record = {
            "neighbours": min(NEIGHBOURS, count),
            "nearest by": "cosine of normalised posterior means",
            "weights": "softmax(-mean squared difference)",
            "interpolation": "slerp at 0.5",
            "seed": NEIGHBOUR_SEED,
            "held out": held_out.count,
            "training": training.pictures.record,
            "latents": training.source,
            "precision": training.precision,
        }

    def encode(self, images):
        """Pictures uint8 (b,3,H,W) -> normalised latents (b,D)."""
        return latent_rows(self.vae, encode_means(self.vae, images, self.training.precision))

    @torch.no_grad()
    def decode(self, rows):
        """Normalised latents (b,D) -> pictures uint8 (b,3,H,W)."""
        shape = (self.vae.channels, self.vae.latent_size, self.vae.latent_size)
        with autocast(rows.device, self.training.precision):
            return to_uint8(self.vae.decode(self.vae.denormalize(rows.unflatten(1, shape))))

    def batches(self):
        """Yield this process's share of the interpolations: positions in the held-out set (b,) and
        pictures uint8 (b,3,H,W)."""
        size = self.held_out.batch_size
        for block, neighbours in self.training.rows(self.neighbours):
            middle = slerp_half(self.rows[block], neighbours)
            for index, rows in zip(block.split(size), middle.split(size), strict=True):
                yield index, self.decode(rows)

    def save_picture(self, path, columns=8):
        """Write a PNG of originals, reconstructions, interpolations and neighbours: four rows. The
        pictures are evenly spaced, since folders are sorted by class."""
        device = self.training.device
        training = self.training.pictures
        count = self.held_out.count
        columns = min(columns, count)
        # An .npz reads consecutive pictures only.
        shown = np.arange(columns)[:, None] * count // columns
        originals = torch.cat([self.held_out.stack(i, self.held_out.size) for i in shown])
        chosen = self.neighbours[shown]
        neighbours = torch.cat([training.stack(i, training.size) for i in chosen]).to(device)
        rows = self.rows[shown[:, 0]]
        middle = slerp_half(rows, self.encode(neighbours))
        reconstructed = self.decode(rows)
        originals = originals.to(device)
        save_grid(path, [originals, reconstructed, self.decode(middle), neighbours])


# --------------------------------------------------------------------------------------------------
# From statistics to results


def set_distance(a, b, suffix=""):
    """Frechet distance of two sets, of the statistics mu<suffix> and sigma<suffix>."""
    mu = f"mu{suffix}"
    sigma = f"sigma{suffix}"
    return frechet_distance(a[mu].cpu(), a[sigma].cpu(), b[mu].cpu(), b[sigma].cpu())


def compare(net, got, ref, adm=False):
    """Statistics of a set and of its reference -> {measure: float}; {} on all but rank 0.

    The first is "fid", or "fd-<model>" in another network's features. The others are measured
    where the statistics for them are there. adm: as for precision_recall.
    """
    if rank() != 0:
        return {}
    values = {}
    if isinstance(net, Inception):
        values["fid"] = set_distance(got, ref)
        spatial = {"mu_s", "sigma_s"}
        if spatial <= got.keys() and spatial <= ref.keys():
            values["sfid"] = set_distance(got, ref, "_s")
        values["inception_score"] = inception_score(got["splits"])
    else:
        values[f"fd-{net.about['name']}"] = set_distance(got, ref)
    features = got["features"]
    ref_features = ref.get("features", ())
    # Each picture needs three neighbours.
    if min(len(features), len(ref_features)) > 3:
        precision, recall = precision_recall(ref_features.to(features.device), features, adm=adm)
        values["precision"] = precision
        values["recall"] = recall
    return values


def training_measure(ref, device, weights=None, size=None, workers=None):
    """For measuring while training: -> measure(batches, count) -> {fid, sfid, inception_score}.

    batches: this process's share of `count` pictures, as positions in the set int64 (b,) and images
    uint8 (b,3,H,W). The result is empty on all but rank 0. ref, size: as for read_reference;
    weights: as for Inception.
    """
    net = Inception(weights).to(device)
    reference, _ = read_reference(net, ref, size, workers=workers)

    def measure(batches, count):
        return compare(net, collect(net, batches, count), reference)

    return measure


def feature_network(args, count, device):
    """The network of --features, or Inception, for sets of `count` pictures."""
    if args.features:
        net = TimmFeatures(args.features, args.features_weights)
    else:
        net = Inception(args.inception_weights)
    dim = net.dims["pool"]
    if count <= dim:
        say(f"warning: {count} pictures for {dim} features: the distance is biased upwards")
    return net.to(device)


def measure_samples(args, device):
    """Measure `samples` against --ref -> {measure: float}, {what was compared}, default for --out.

    The measures are empty on all but rank 0, and the default lacks its ending.
    """
    path = args.samples
    if not path:
        command = "python sample.py --num-images 50000"
        path = newest_result("samples.npz", "set of samples", command)
    pictures = Pictures(path, args.num, args.size, args.batch_size)
    say_other_sizes(path, pictures.set, pictures.size)
    net = feature_network(args, pictures.count, device)
    reference, reference_record = read_reference(
        net,
        args.ref,
        args.size or pictures.size,
        keep=args.pr_images,
        batch_size=args.batch_size,
        workers=args.workers,
    )

    batches = pictures.batches(device, args.workers)
    statistics = collect(net, batches, pictures.count, args.pr_images, in_order=args.adm)
    values = compare(net, statistics, reference, args.adm)
    compared = {
        "samples": pictures.record,
        "reference": reference_record,
        "network": net.about,
        "vae": None,
    }
    return values, compared, os.path.abspath(path).removesuffix(".npz")


@torch.no_grad()
def reconstructions(vae, lpips, batches, totals):
    """Yield positions (b,) and reconstructions, uint8 (b,3,H,W), of batches of the same form.

    The mean of the posterior is decoded. The measures in `totals` ("psnr", "ssim" and, with an
    LPIPS network, "lpips"), float64 scalars, grow by the sum over each batch's 8-bit pictures.
    """
    for index, originals in batches:
        mean, _ = vae.encode(from_uint8(originals))
        decoded = to_uint8(vae.decode(mean))
        totals["psnr"] += psnr(originals, decoded).sum()
        totals["ssim"] += ssim(originals, decoded).sum()
        if lpips is not None:
            distance = lpips(from_uint8(originals), from_uint8(decoded))
            totals["lpips"] += distance.double().sum()
        yield index, decoded


def measure_reconstructions(args, device):
    """Measure --vae on --data -> as measure_samples; "rfid" stands for the "fid" of compare."""
    vae = load_vae(args.vae, device)
    vae.set_resolution(args.size or vae.resolution)
    names = ["psnr", "ssim"]
    lpips = None
    if args.lpips:
        names.append("lpips")
        lpips = LPIPS(args.lpips_weights).to(device)
    # The originals are the reference. These arguments are recorded in the result.
    args.ref = args.data
    args.size = vae.resolution
    args.pr_images = 0
    pictures = Pictures(args.data, args.num, args.size, args.batch_size)
    net = feature_network(args, pictures.count, device)
    reference, reference_record = read_reference(
        net,
        args.ref,
        args.size,
        num=args.num,
        batch_size=args.batch_size,
        workers=args.workers,
    )

    totals = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
    originals = pictures.batches(device, args.workers)
    decoded = reconstructions(vae, lpips, originals, totals)
    statistics = collect(net, decoded, pictures.count)
    values = {}
    for name, value in compare(net, statistics, reference).items():
        if name not in ("sfid", "inception_score"):
            values[f"r{name}"] = value
    for name, total in totals.items():
        values[name] = (sum_over_processes(total) / pictures.count).item()
    compared = {
        "samples": pictures.record,
        "reference": reference_record,
        "network": net.about,
        "vae": vae.info,
    }
    base = os.path.join(os.path.dirname(vae.info["path"]), "reconstruction")
    if args.interpolate:
        path = f"{(args.out or base).removesuffix('.json')}.interpolation.png"
        distances, record = measure_interpolations(args, vae, net, pictures, reference, path)
        # iFID stands beside rFID, before PSNR and its kin.
        first = dict(list(values.items())[:1])
        values = {**first, **distances, **values}
        compared["interpolation"] = record
    return values, compared, base


def measure_interpolations(args, vae, net, held_out, reference, path):
    """Measure iFID of --vae between the pictures `held_out`, whose statistics are `reference`, and
    --interpolate -> {"ifid": float}, empty on all but rank 0, and a record of all that moves it.

    path: of the PNG to write.
    """
    begin = time.time()
    training = Pictures(args.interpolate, None, args.size, args.batch_size)
    say_other_sizes(args.interpolate, training.set, args.size)
    found = find_cached_latents(vae, training)
    latents = TrainingLatents(vae, training, vae.latent_mean.device, args.workers, "fp32", *found)
    say(f"training  {training.path}: {training.count} pictures, latents: {latents.source}")
    between = Interpolations(vae, held_out, latents)
    statistics = collect(net, between.batches(), held_out.count)
    distances = {}
    for name, value in compare(net, statistics, reference).items():
        if name not in ("sfid", "inception_score"):
            distances[f"i{name}"] = value
    if rank() == 0:
        between.save_picture(path)
        say(f"picture   {path}: originals, reconstructions, interpolations, neighbours")
    return distances, {**between.record, "seconds": round(time.time() - begin, 1)}


def report(values, compared, arguments, out):
    """Print the measures and write them into the JSON file `out`, with all that moves them."""
    network = compared["network"]
    for name, value in values.items():
        label = name
        if not network["published"] and name not in ("psnr", "ssim", "lpips"):
            label = f"{name} [weights {network['weights'][:8]}]"
        say(f"{label:36} {value:12.4f}")
    packages = ("torch", "torchvision", "timm", "numpy", "pillow")
    result = {
        **values,
        **compared,
        "arguments": arguments,
        "provenance": provenance(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    try:
        write_json(out, result)
    except OSError as error:
        raise UserError(
            f"the numbers above cannot be written to {out} ({first_line(error)}); "
            "name another file with --out"
        ) from None
    say(f"written   {out}")


def main():
    args = parse_arguments()
    device = setup(args.device)
    # setup allows TF32 for training; measures are taken in full float32.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False

    if args.interpolate and not args.vae:
        raise UserError(
            "--interpolate measures a VAE: name it with --vae, and pictures with --data"
        )
    if args.vae and args.data and not (args.ref or args.samples):
        values, compared, base = measure_reconstructions(args, device)
    elif args.ref and not (args.vae or args.data):
        values, compared, base = measure_samples(args, device)
    else:
        raise UserError("give samples and --ref (generation), or --vae and --data (reconstruction)")

    if rank() == 0:
        first_measure = next(iter(values)).replace("/", "-")
        out = args.out or f"{base}.{first_measure}.json"
        report(values, compared, vars(args), out)


if __name__ == "__main__":
    run_main(main)
