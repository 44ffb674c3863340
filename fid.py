"""Measure a set of pictures against a reference: FID, sFID, Inception Score, precision and recall, as ADM's evaluator
defines them; or a VAE's reconstructions against their originals: rFID, PSNR, SSIM, LPIPS.

    FID = |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)), mu and S: mean and covariance of a network's features of a set.

    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz   # against ADM's reference batch
    python fid.py samples --ref data/cifar10/train                    # folders; what the reference gives is kept for next time
    torchrun --nproc_per_node=8 fid.py samples.npz --ref data/imagenet/train --size 256
    python fid.py --vae runs/vae --data data/imagenet/val             # reconstruction
    python fid.py A --ref B --features vit_small_patch14_dinov2.lvd142m     # FD-<model>, in any timm model's features

Pictures are 8-bit RGB; features are float32, statistics and distances float64. The result is printed and written as JSON
beside the samples (samples.fid.json), with everything that moves the numbers.
"""
import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import zipfile
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision.models import inception as tv
from tqdm import tqdm

import common
from common import say
from models import LPIPS, UserError, first_line, load_strictly, load_vae, read_weights, state_hash

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"            # the end of its name is the start of its sha256
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("generation")
    g.add_argument("samples", nargs="?", help=".npz (arr_0) or folder (default: the newest samples.npz under runs/)")
    g.add_argument("--ref", help=".npz (mu and sigma, or arr_0, or ADM's with all of them) or folder of pictures")
    g.add_argument("--pr-images", type=int, default=50000, help="pictures of each set, evenly spaced, that precision and "
                   "recall use; 0: neither is computed")
    g = p.add_argument_group("reconstruction")
    g.add_argument("--vae", help="VAE: file, run folder, published checkpoint or hf:<owner>/<repository>")
    g.add_argument("--data", help="folder of pictures to reconstruct")
    g.add_argument("--posterior", choices=["mean", "sample"], default="mean", help="which latent is decoded")
    g.add_argument("--lpips", type=int, choices=[0, 1], default=1, help="0: no LPIPS")
    g.add_argument("--lpips-weights", nargs="+", default=(), help="local files of VGG16 and the linear layers")
    g = p.add_argument_group("both")
    g.add_argument("--num", type=int, help="use so many pictures of the set (an .npz's first, a folder's evenly spaced)")
    g.add_argument("--size", type=int, help="cut folders' pictures to this side, as for training (default: their own size; "
                   "for --vae, the VAE's)")
    g.add_argument("--features", help="timm model to measure the Frechet distance with, instead of FID's Inception")
    g.add_argument("--features-size", type=int, help="side of its input (default: the model's own)")
    g.add_argument("--features-weights", help="local file of its weights (default: timm's, from the hub)")
    g.add_argument("--inception-weights", help=f"local {WEIGHTS} (default: downloaded once)")
    g.add_argument("--out", help="JSON file of the result (default: beside the samples or the VAE)")
    g = p.add_argument_group("machine")
    g.add_argument("--batch-size", type=int, default=64, help="pictures a process takes at once")
    g.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the networks; bf16 moves the numbers")
    g.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    g.add_argument("--workers", type=int, help="loader processes per process (default: its share of the cores, up to 8)")
    g.add_argument("--seed", type=int, default=0, help="of --posterior sample")
    return p.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------------
# Feature networks. forward(uint8 (B,3,H,W)) = features(resize(...)); they have a name, a hash and a note of their resize

def tf_resize(x, size):
    """Float (B,C,H,W) -> (B,C,size,size) as TensorFlow 1's resize_bilinear does it: bilinear between the pixels at
    floor(i * H/size) and the next one, no half-pixel shift, no antialiasing; the same float32 operations."""
    def neighbours(length):
        at = torch.arange(size, device=x.device, dtype=torch.float32) * torch.tensor(length / size, dtype=torch.float32)
        low = at.long()
        return low, (low + 1).clamp(max=length - 1), at - low
    low, high, weight = neighbours(x.shape[3])
    left, right = x.index_select(3, low), x.index_select(3, high)
    x = left + (right - left) * weight
    low, high, weight = neighbours(x.shape[2])
    top, bottom = x.index_select(2, low), x.index_select(2, high)
    return top + (bottom - top) * weight[:, None]


def without_padding(module, inputs):
    """Hook behind a 3x3 average pool whose padding counted as pixels: the mean of the true pixels instead."""
    def share(n):
        return F.avg_pool1d(torch.ones(1, 1, n, device=inputs[0].device), 3, 1, 1)[0, 0]
    return inputs[0] / (share(inputs[0].shape[2])[:, None] * share(inputs[0].shape[3]))


@contextlib.contextmanager
def no_tf32():
    """TF32 products have 10 bits; common.setup allows them for training, measuring does without."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class MaxPoolE(tv.InceptionE):
    """The last block, Mixed_7c, with a max pool where the others have an average."""

    def _forward(self, x):
        a, b = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [self.branch1x1(x), self.branch3x3_2a(a), self.branch3x3_2b(a), self.branch3x3dbl_3a(b), self.branch3x3dbl_3b(b),
                self.branch_pool(F.max_pool2d(x, 3, 1, 1))]


class Inception(tv.Inception3):
    """The 2015 TensorFlow Inception that defines FID: torchvision's blocks, with 1008 logits, MaxPoolE, and average pools
    that leave the padding out; its names are those of the published PyTorch conversion. Batch norms are folded into the
    convolutions and memory is channels_last, the fastest on a CPU."""
    name, resize_note, dims = "Inception", "TensorFlow 1 bilinear to 299x299", dict(pool=2048, spatial=2023)

    def __init__(self, weights=None, precision="fp32"):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        self.precision, self.Mixed_7c = precision, MaxPoolE(2048)
        state, self.hash = inception_state(weights)
        counters = {k: v for k, v in self.state_dict().items() if k.endswith("num_batches_tracked")}     # unused, optional
        load_strictly(self, counters | state, weights or WEIGHTS)
        self.published = self.hash.startswith(WEIGHTS[-12:-4])
        self.eval().requires_grad_(False)
        for name, module in list(self.named_modules()):
            if isinstance(module, tv.BasicConv2d):
                module.conv, module.bn = torch.nn.utils.fusion.fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
            if name.endswith("branch_pool") and "Mixed_7c" not in name:
                module.register_forward_pre_hook(without_padding)
        self.to(memory_format=torch.channels_last)

    def resize(self, images):
        return (tf_resize(images.float(), 299) - 128) / 128

    @torch.no_grad()
    def features(self, x):
        """Float (B,3,299,299) -> pool (B,2048), spatial (B,2023): 17x17x7 with channels last, logits without bias (B,1008)."""
        with no_tf32(), common.autocast(x.device, self.precision):
            x = self.Conv2d_1a_3x3(x.contiguous(memory_format=torch.channels_last))                 # (B,32,149,149)
            x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(x)), 3, 2)                       # (B,64,73,73)
            x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)                       # (B,192,35,35)
            x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))                       # (B,768,17,17)
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1).float()                               # of its 1x1 branch
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))                       # (B,2048,8,8)
        with no_tf32():
            pool = x.float().mean((2, 3))
            return dict(pool=pool, spatial=spatial, logits=F.linear(pool, self.fc.weight))

    def forward(self, images):
        return self.features(self.resize(images))


def inception_state(weights):
    """-> state dict of the file, or of the published one, downloaded once, and the sha256 of the file."""
    if weights is None:
        weights = os.path.join(torch.hub.get_dir(), "checkpoints", WEIGHTS)
        try:
            if common.rank() == 0:
                torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True)
            common.barrier()
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot download Inception's weights ({first_line(error)}); fetch {WEIGHTS_URL} elsewhere and put "
                            f"it at {weights}, or name it with --inception-weights") from None
    return read_weights(weights)[0], file_hash(weights)


class TimmFeatures(nn.Module):
    """The pooled features (class token or average, as the model has it) of any timm model."""
    published = True

    def __init__(self, name, weights=None, size=None, precision="fp32"):
        super().__init__()
        import timm
        if weights and not os.path.isfile(weights):
            raise UserError(f"--features-weights {weights}: no such file")
        source = dict(pretrained_cfg_overlay=dict(file=str(weights), custom_load=False)) if weights else {}
        try:
            self.model = timm.create_model(name, pretrained=True, num_classes=0, **source, **(dict(img_size=size) if size else {}))
        except Exception as error:
            raise UserError(f"--features {name}: timm cannot build it with its weights ({first_line(error)}); choose another "
                            "model, or give a file in timm's key names with --features-weights") from None
        data = timm.data.resolve_model_data_config(self.model)
        self.name, self.precision, self.side = name, precision, size or data["input_size"][-1]
        self.dims = dict(pool=self.model.num_features)
        self.resize_note = f"antialiased bicubic to {self.side}x{self.side}"
        self.hash = state_hash(self.model.state_dict())
        self.register_buffer("mean", torch.tensor(data["mean"]).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(data["std"]).view(3, 1, 1) * 255)
        self.eval().requires_grad_(False)

    def resize(self, images):
        x = F.interpolate(images.float(), (self.side, self.side), mode="bicubic", antialias=True)
        return (x.clamp(0, 255) - self.mean) / self.std

    @torch.no_grad()
    def features(self, x):
        with no_tf32(), common.autocast(x.device, self.precision):
            return dict(pool=self.model(x).float())

    def forward(self, images):
        return self.features(self.resize(images))


# ----------------------------------------------------------------------------------------------------------------------
# Measures

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians, in float64. tr (S1 S2)^(1/2) is the sum of the singular values of
    S1^(1/2) S2^(1/2): no root of a product's eigenvalues is taken, which would turn their rounding, 1e-16, into 1e-8;
    hence singular covariances and equal ones do no harm."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2))
    (values1, vectors1), (values2, vectors2) = (torch.linalg.eigh((s + s.T) / 2) for s in (sigma1, sigma2))
    product = (vectors1 * values1.clamp(min=0).sqrt()).T @ (vectors2 * values2.clamp(min=0).sqrt())
    trace = torch.linalg.svdvals(product).sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item()


def score_terms(probs):
    """Probabilities (B,C) -> (B,C+2), whose sum over a split is all that its score needs."""
    p = probs.double()
    return torch.cat([p, torch.xlogy(p, p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], 1)


def score_from_sums(sums):
    """Sums of score_terms (splits,C+2) -> mean over the splits of exp(mean KL(p(y|x) || p(y)))."""
    mean = sums[:, :-1] / sums[:, -1:]
    return (mean[:, -1] - torch.xlogy(mean[:, :-1], mean[:, :-1]).sum(1)).exp().mean().item()


def inception_score(probs, split_size=5000):
    """Class probabilities (N,C) -> Inception Score, averaged over splits of 5000 in the order given (the last may be
    smaller), as ADM does."""
    return score_from_sums(torch.stack([score_terms(part).sum(0) for part in torch.as_tensor(probs).split(split_size)]))


def precision_recall(ref, samples, k=3, block=4096):
    """Features (N,D), (M,D) -> precision: share of samples inside the ball of some reference picture, which reaches to
    its k-th neighbour; recall: the roles exchanged. Float64, where the features are; memory: a few block^2 numbers."""
    ref, samples = torch.as_tensor(ref), torch.as_tensor(samples)
    if min(len(ref), len(samples)) <= k:
        raise UserError(f"precision and recall need more than {k} pictures in each set, not {min(len(ref), len(samples))}")

    def distances(a, b):
        a, b = a.double(), b.double()
        return torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(a.square().sum(1, keepdim=True)).clamp_(min=0)

    def radii(rows, x):                                     # to the k-th neighbour; a picture itself is its nearest
        near = [distances(rows, b).topk(min(k + 1, len(b)), largest=False).values for b in x.split(block)]
        return torch.cat(near, 1).kthvalue(k + 1).values

    def covered(points, centres):
        inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
        for c in centres.split(block):
            reach = radii(c, centres)
            inside |= torch.cat([(distances(p, c) <= reach).any(1) for p in points.split(block)])
        return inside.double().mean().item()
    return covered(samples, ref), covered(ref, samples)


def psnr(a, b, data_range=255):
    """Images (B,3,H,W) -> dB (B,); at most 148 at data range 255, where a mean squared error of 1e-10 is put for none."""
    return 10 * torch.log10(data_range ** 2 / (a.double() - b.double()).square().mean((1, 2, 3)).clamp(min=1e-10))


def ssim(a, b, data_range=255):
    """Images (B,C,H,W) -> structural similarity (B,): Gaussian window 11x11 of sigma 1.5 that stays inside the picture,
    K 0.01 and 0.03, each channel by itself."""
    if min(a.shape[2:]) < 11:
        raise UserError(f"SSIM needs pictures of at least 11x11 pixels, not {a.shape[3]}x{a.shape[2]}")
    g = torch.exp(-(torch.arange(11, device=a.device, dtype=torch.float64) - 5).square() / (2 * 1.5 ** 2))
    g = (g / g.sum())[None, None]

    def blur(x):
        x = x.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(x, g[..., None]), g[:, :, None])
    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    value = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))
    return value.mean((1, 2, 3)).view(len(a), -1).mean(1)


# ----------------------------------------------------------------------------------------------------------------------
# Sets of pictures

FORM = "a set is a folder of pictures, or an .npz with arr_0, uint8 of shape (N,H,W,3), as sample.py writes it"


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_arrays(path):
    """-> names of the arrays in an .npz, and a dict of those that are no pictures."""
    try:
        with np.load(path, allow_pickle=False) as file:
            small = {k: file[k] for k in file.files if k in ("mu", "sigma", "mu_s", "sigma_s", "labels", "settings")}
            return file.files, small
    except Exception as error:
        raise UserError(f"{path} cannot be read as .npz ({first_line(error)}); write it again: {FORM}") from None


def load_picture(path, size):
    """File -> uint8 (H,W,3), at its own size or cut to (size,size,3)."""
    if size:
        return common.load_image(path, size)
    try:
        with Image.open(path) as image:
            return np.asarray(common.to_rgb(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the picture {os.fsdecode(path)}: {error}") from None


class Pictures(torch.utils.data.Dataset):
    """A folder (at any depth) or an .npz as batches: item k is dict(index (b,), image: list of uint8 (3,H,W)), or the
    UserError that `common.batches` raises. Of a folder `num` evenly spaced pictures are used, of an .npz the first."""

    def __init__(self, path, num=None, size=None, batch_size=64):
        self.path, self.size, self.batch_size, self.rows = path, size, batch_size, None
        self.folder = common.ImageSet(path) if os.path.isdir(path) else None
        if not self.folder and not os.path.isfile(path):
            raise UserError(f"{path}: no such file or folder; {FORM}")
        self.available = len(self.folder) if self.folder else self.open_npz()
        self.count = num or self.available
        if not 2 <= self.count <= self.available:
            raise UserError(f"{path} has {self.available} pictures, but {f'--num {num}' if num else 'at least 2'} are needed")

    def open_npz(self):
        """Opens arr_0 and reads its header; pixels are read as they are needed -> number of pictures."""
        try:
            self.rows = zipfile.ZipFile(self.path).open("arr_0.npy")
            version = np.lib.format.read_magic(self.rows)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read_header(self.rows)
        except KeyError:
            raise UserError(f"{self.path} has no arr_0; {FORM}") from None
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.path} cannot be read as .npz ({first_line(error)}); write it again: {FORM}") from None
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise UserError(f"{self.path}: arr_0 is {dtype} of shape {shape}{', column by column' * fortran}; {FORM}")
        self.start, self.shape = self.rows.tell(), shape[1:]
        return shape[0]

    def __getstate__(self):                                 # an open file does not travel to a loader process
        return dict(self.__dict__, rows=None)

    def __len__(self):
        return -(-self.count // self.batch_size)

    def __getitem__(self, k):
        index = np.arange(k * self.batch_size, min((k + 1) * self.batch_size, self.count))
        try:
            read = self.read_files if self.folder else self.read_rows
            return dict(index=torch.from_numpy(index), image=[torch.from_numpy(x).permute(2, 0, 1) for x in read(index)])
        except UserError as error:
            return error

    def read_files(self, index):
        for name in self.folder.names[index * self.available // self.count]:
            yield load_picture(os.path.join(self.folder.root_bytes, name), self.size)

    def read_rows(self, index):
        if self.rows is None:
            self.open_npz()
        size = int(np.prod(self.shape))
        try:
            self.rows.seek(self.start + int(index[0]) * size)
            data = self.rows.read(len(index) * size)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.path} is damaged near picture {index[0]} ({first_line(error)}); write it again") from None
        if len(data) < len(index) * size:
            raise UserError(f"{self.path} ends within picture {index[0] + len(data) // size} of {self.available}; write it again")
        return np.frombuffer(bytearray(data), np.uint8).reshape(len(index), *self.shape)

    def batches(self, device, workers):
        """This process's share -> (index (b,), images: list of uint8 (3,H,W)) on the device."""
        mine = range(common.rank(), len(self), common.world())
        for batch in common.batches(self, mine, workers if self.folder else 0, device):
            yield batch["index"], [x.to(device, non_blocking=True) for x in batch["image"]]

    def fingerprint(self):
        return self.folder.fingerprint if self.folder else file_hash(self.path)

    def changed(self):
        """When the newest file of a folder was changed: the fingerprint holds names and sizes only."""
        paths = (os.path.join(self.folder.root_bytes, n) for n in self.folder.names) if self.folder else ()
        return max((os.stat(path).st_mtime_ns for path in paths), default=0)


def describe_samples(pictures):
    """What is known of a set, for the record: hash, the settings sample.py put into it, how often each label occurs."""
    record = dict(path=pictures.path, hash=pictures.fingerprint())
    if not pictures.folder:
        given = read_arrays(pictures.path)[1]
        if "settings" in given:
            record["settings"] = json.loads(str(given["settings"]))
        if "labels" in given:
            counts = np.unique(given["labels"][:pictures.count], return_counts=True)[1]
            record["labels"] = f"{len(counts)} classes of {counts.min()} to {counts.max()} pictures"
    return record


# ----------------------------------------------------------------------------------------------------------------------
# From pictures to numbers

def collect(net, batches, count, keep=0):
    """Streams (index, images) of all processes, `count` pictures in all, through the network -> dict: for each of
    net.dims mu and sigma; sums of the Inception Score's splits; features (keep,D) of evenly spaced pictures. Memory does
    not grow with count. images: uint8 (B,3,H,W), or a list of pictures of different sizes."""
    device = next(net.parameters()).device
    keep = min(keep, count)
    sums = {k: torch.zeros(d + 1, d + 1, dtype=torch.float64, device=device) for k, d in net.dims.items()}
    sums["splits"] = torch.zeros(-(-count // 5000), 1010, dtype=torch.float64, device=device)
    sums["features"] = torch.zeros(keep, net.dims["pool"], device=device)
    bar = tqdm(total=count, unit="picture", disable=common.rank() > 0, leave=False, mininterval=1)
    for index, images in batches:
        if torch.is_tensor(images) or len({x.shape for x in images}) == 1:
            x = net.resize(images if torch.is_tensor(images) else torch.stack(images))
        else:
            x = torch.cat([net.resize(x[None]) for x in images])
        out = net.features(x)
        for key in net.dims:
            x = F.pad(out[key].double(), (0, 1), value=1.0)                 # one matrix: sums of x x^T, of x, and of 1
            sums[key].addmm_(x.T, x)
        if "logits" in out:
            sums["splits"].index_add_(0, index // 5000, score_terms(out["logits"].double().softmax(1)))
        row = index * keep // count
        new = (index + 1) * keep // count > row
        sums["features"][row[new]] = out["pool"][new]
        bar.update(min(len(index) * common.world(), count - bar.n))
    bar.close()
    if common.world() > 1:
        for value in sums.values():
            torch.distributed.all_reduce(value)
    result = dict(count=torch.tensor(count), splits=sums["splits"], features=sums["features"])
    for key in net.dims:
        n, mu = sums[key][-1, -1], sums[key][-1, :-1] / sums[key][-1, -1]
        result[f"{key}_mu"], result[f"{key}_sigma"] = mu, (sums[key][:-1, :-1] - n * mu[:, None] * mu) / (n - 1)
    return result


def read_reference(net, path, keep, num=None, size=None, batch_size=64, workers=None):
    """What `collect` gives for a reference, or as much as an .npz holds of it -> dict (complete on the first process
    only), description. What was computed is kept under runs/cache for the next time."""
    held, device = {}, next(net.parameters()).device
    if not os.path.isdir(path):
        names, given = read_arrays(path)
        for key, dim in net.dims.items() if net.name == "Inception" else ():
            mu, sigma = (given.get(n + "_s" * (key == "spatial")) for n in ("mu", "sigma"))
            if mu is None or sigma is None:
                continue
            if mu.shape != (dim,) or sigma.shape != (dim, dim) or not np.isfinite(sigma).all():
                raise UserError(f"{path}: mu and sigma of shape {mu.shape} and {sigma.shape} are not finite statistics of "
                                f"{dim} Inception features; make the reference anew")
            held[f"{key}_mu"], held[f"{key}_sigma"] = torch.from_numpy(mu), torch.from_numpy(sigma)
        if not held and "arr_0" not in names:
            raise UserError(f"{path} is no reference: it has neither mu and sigma of Inception nor arr_0, only {names}; {FORM}")
        if held and (not keep or "arr_0" not in names):
            return held, dict(path=path, pictures=None, hash=file_hash(path), statistics="of the file")
    pictures = Pictures(path, num, size, batch_size)
    note = dict(path=path, pictures=pictures.count, hash=pictures.fingerprint(), size=size, statistics="of the file" if held
                else "computed")
    about = json.dumps([note["hash"], pictures.changed(), net.name, net.hash, net.resize_note, net.precision, num, size, keep])
    cache = os.path.join("runs", "cache", f"fid-{hashlib.sha256(about.encode()).hexdigest()[:16]}.npz")
    found, result = torch.zeros(1, device=device), {}
    if common.rank() == 0:
        with contextlib.suppress(Exception), np.load(cache, allow_pickle=False) as file:    # absent or damaged: made again
            result = {k: torch.from_numpy(file[k]) for k in file.files}
            found += 1
    if common.world() > 1:
        torch.distributed.all_reduce(found)
    if not found.item():
        result = collect(net, pictures.batches(device, workers), pictures.count, keep)
        if common.rank() == 0:
            with contextlib.suppress(OSError), common.writing(cache) as file:
                np.savez(file, **{k: v.cpu().numpy() for k, v in result.items()})
    say(f"reference {path}: {pictures.count} pictures" + (f", from {cache}" if found.item() else ""))
    return dict(result, **held), note


def compare(net, got, ref):
    """Two results of `collect` -> dict of measures, on the first process."""
    if common.rank():
        return {}
    main = "fid" if net.name == "Inception" else f"fd-{net.name}"
    values = {}
    for name, key in ((main, "pool"), ("sfid", "spatial")):
        if f"{key}_mu" in got and f"{key}_mu" in ref:
            values[name] = frechet_distance(*(x[f"{key}_{part}"].cpu() for x in (got, ref) for part in ("mu", "sigma")))
    if net.name == "Inception":
        values["inception_score"] = score_from_sums(got["splits"])
    if min(len(got["features"]), len(ref.get("features", ()))) > 3:
        values["precision"], values["recall"] = precision_recall(ref["features"].to(got["features"].device), got["features"])
    return values


def training_measure(ref, device, weights=None, size=None, workers=None):
    """For measuring while training: returns f(batches, count) -> dict(fid, sfid, inception_score), empty on all but the
    first process. batches: this process's share of `count` pictures as (index (B,) int64, uint8 (B,3,H,W))."""
    net = Inception(weights).to(device)
    reference, _ = read_reference(net, ref, 0, size=size, workers=workers)
    return lambda batches, count: compare(net, collect(net, batches, count), reference)


@torch.no_grad()
def reconstructions(vae, lpips, pictures, sums, args, device):
    """-> (index, reconstructed uint8 (B,3,H,W)) and, added up in `sums`, PSNR, SSIM, LPIPS and the count. All measures
    are those of 8-bit pictures."""
    for index, images in pictures.batches(device, args.workers):
        x = torch.stack(images)
        with no_tf32(), common.autocast(device, args.precision):
            z, logvar = vae.encode(common.from_uint8(x))
            if args.posterior == "sample":
                z = vae.sample(z, logvar, common.normal(args.seed, "posterior", index, z.shape[1:]))
            y = common.to_uint8(vae.decode(z))
            distance = lpips(common.from_uint8(x), common.from_uint8(y)).double() if lpips else torch.zeros(len(x))
        sums += torch.stack([v.to(sums).sum() for v in (psnr(x, y), ssim(x, y), distance, torch.ones(len(x)))])
        yield index, y


def show(values, net):
    """The table of measures, as two rows. What makes a number incomparable is part of its name."""
    names = dict(fid="FID", sfid="sFID", rfid="rFID", inception_score="IS", psnr="PSNR", ssim="SSIM", lpips="LPIPS")
    mark = ("" if net.published else f"[weights {net.hash[:8]}]") + ("" if net.precision == "fp32" else f"[{net.precision}]")
    cells = [(names.get(k, k.replace("fd-", "FD-")) + mark * (k not in ("psnr", "ssim", "lpips")), f"{v:.4f}")
             for k, v in values.items()]
    widths = [max(map(len, cell)) for cell in cells]
    say("\n".join("  ".join(text.rjust(w) for text, w in zip(row, widths)) for row in zip(*cells)))


def main():
    args = parse_arguments()
    device = common.setup(args.device)
    if args.vae and (args.samples or args.ref) or bool(args.vae) != bool(args.data) or not args.vae and not args.ref:
        raise UserError("give samples and --ref (generation), or --vae and --data (reconstruction)")
    if args.features:
        net = TimmFeatures(args.features, args.features_weights, args.features_size, args.precision).to(device)
    else:
        net = Inception(args.inception_weights, args.precision).to(device)
        if not net.published:
            say(f"warning: {args.inception_weights} is not {WEIGHTS}: these numbers are comparable with each other only")
    if args.vae:
        vae = load_vae(args.vae, device)
        vae.set_resolution(args.size or vae.resolution)
        lpips = LPIPS(args.lpips_weights).to(device) if args.lpips else None
        pictures = Pictures(args.data, args.num, vae.resolution, args.batch_size)
        source = dict(vae=vae.info["path"], vae_hash=vae.info["hash"], vae_step=vae.info.get("step"), posterior=args.posterior,
                      seed=args.seed)
        args.ref, base, args.pr_images = args.data, os.path.join(os.path.dirname(vae.info["path"]), "reconstruction"), 0
    else:
        path = args.samples or common.newest("samples.npz", "set of samples", "python sample.py --num-images 50000")
        pictures = Pictures(path, args.num, args.size, args.batch_size)
        source, base = describe_samples(pictures), os.path.splitext(path.rstrip("/"))[0]
    if pictures.count <= net.dims["pool"]:
        say(f"warning: {pictures.count} pictures are few for {net.dims['pool']} features: the covariance is singular and the "
            "distance biased upwards; published FIDs take 50,000")
    reference, about = read_reference(net, args.ref, args.pr_images, args.vae and args.num, vae.resolution if args.vae else
                                      args.size, args.batch_size, args.workers)
    if args.vae:
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        got = collect(net, reconstructions(vae, lpips, pictures, sums, args, device), pictures.count)
        common.gather_mean(sums)
        values = {k: v for k, v in compare(net, got, reference).items() if k not in ("sfid", "inception_score")}
        values = {k.replace("fid", "rfid"): v for k, v in values.items()}
        values.update(zip(["psnr", "ssim", "lpips"][:2 + args.lpips], (sums[:3] / sums[3]).tolist()))
    else:
        got = collect(net, pictures.batches(device, args.workers), pictures.count, args.pr_images)
        values = compare(net, got, reference)
    if common.rank() == 0:
        show(values, net)
        out = args.out or f"{base}.{f'fd-{net.name}' if args.features else 'fid'}.json"
        common.write_json(out, dict(
            values, samples=source, pictures=pictures.count, reference=about, network=dict(
                name=net.name, weights=net.hash, published=net.published, resize=net.resize_note, precision=net.precision),
            size=args.size, precision_recall_pictures=args.pr_images, batch_size=args.batch_size, versions={
                k: importlib.metadata.version(k) for k in ("torch", "torchvision", "timm", "numpy", "pillow")},
            provenance=common.provenance()))
        say(f"written   {out}")
    common.barrier()


if __name__ == "__main__":
    common.run(main)
