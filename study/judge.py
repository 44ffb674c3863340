"""Judges for study/run.py: Frechet distances of sets of pictures in the features of a classifier
that no VAE was aligned to and of the vision model that VAEs were aligned to, and properties of a
VAE's latents and reconstructions.

    DATA="--data data/cifar10"
    JUDGES="$DATA --classifier classifier.pt --vfm tf_efficientnet_lite0 --vfm-stride 16"
    python -m study.judge classifier $DATA --out classifier.pt
    python -m study.judge ship classifier.pt $DATA --out study/classifier.safetensors
    python -m study.judge samples a.npz b.npz $JUDGES          # writes a.json, b.json
    python -m study.judge vae runs/study/vae_send $JUDGES --out send.json
    python -m study.judge ifid runs/study/vae_send $DATA --classifier classifier.pt --out ifid.json
    python -m study.judge latents runs/study/vae_plain runs/study/vae_send $DATA --out latents.png

The distances are of the classifier's 128 pooled features and of the vision model's pooled tokens;
neither is FID. Without --vfm there is only the first. --data is a folder with train/ and test/ in
ImageNet's layout.
"""

import argparse
import os

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

from common.files import UserError, read_weights, reading, state_hash, write_json, writing
from common.pictures import ImageSet, TrainingBatches, from_uint8, load_batches, save_grid, to_uint8
from common.processes import processor_seconds, run_main, say, setup, without_tf32
from common.weights import load_vae
from models import VFM
import fid
from study import figures

CPU = torch.device("cpu")
# Of the classifier's training on few pictures.
MIN_STEPS = 400

# --------------------------------------------------------------------------------------------------
# The classifier


def convolution(channels, out_channels, stride=1):
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class Classifier(nn.Module):
    """A small CNN of 0.34M parameters, for pictures of about 32 pixels."""

    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(
            convolution(3, 32),
            convolution(32, 48, stride=2),
            convolution(48, 48),
            convolution(48, 96, stride=2),
            convolution(96, 128),
            nn.Dropout2d(0.1),
            convolution(128, 128),
        )
        self.head = nn.Linear(128, classes)

    def forward(self, images):
        """images: uint8 (B,3,H,W). Returns logits (B,classes) and pooled features (B,128)."""
        features = self.stem(images.float() / 127.5 - 1).mean((2, 3))
        return self.head(features), features


def train_classifier(data, held_out, size, path, workers, seed=0):
    """Trains the classifier on an ImageSet for two epochs, or MIN_STEPS if these are more, on
    pictures mirrored and shifted by up to 4 pixels, and writes it to `path`, with its accuracy on
    the folder of held-out pictures.

    size: of the pictures, in pixels. workers: loader processes."""
    test = fid.Pictures(held_out, size=size)
    torch.manual_seed(seed)
    net = Classifier(len(data.classes))
    batch_size = 128
    steps = max(MIN_STEPS, 2 * len(data) // batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    batches = TrainingBatches(data, batch_size, seed, size)
    for step, batch in enumerate(load_batches(batches, range(steps), workers, CPU)):
        logits, _ = net(shifted(batch["image"], 4))
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            say(f"classifier: step {step} of {steps}, loss {loss.item():.3f}")
    net.eval()
    share = accuracy(net, test)
    say(f"classifier: {share:.1%} of the {test.count} held-out pictures are classified correctly")
    with writing(path) as file:
        torch.save(dict(net.state_dict(), accuracy=torch.tensor(share)), file)


def shifted(images, reach):
    """Images (B,3,H,W), all shifted by the same random offset of up to `reach` pixels; the border
    is filled with zeros."""
    height, width = images.shape[2:]
    padded = F.pad(images, (reach, reach, reach, reach))
    left, top = torch.randint(0, 2 * reach + 1, (2,)).tolist()
    return padded[:, :, top : top + height, left : left + width]


@torch.no_grad()
def accuracy(net, pictures):
    """Share of a fid.Pictures whose class the classifier gives as their label."""
    correct = 0
    for index, images in pictures.batches(CPU, 0):
        labels = torch.from_numpy(pictures.set.labels[index.numpy()])
        correct += (net(images)[0].argmax(1) == labels).sum().item()
    return correct / pictures.count


def load_classifier(path):
    """The classifier in a file of train_classifier's or of ship_classifier's. Raises UserError for
    another file.

    Its .trained is the hash of its weights as they were trained, and .reference the mean (128,) and
    covariance (128,128) of its features of the study's test pictures, or None."""
    with reading(path, "a classifier of `python -m study.judge classifier`"):
        state, metadata = read_weights(path)
        state = {name: tensor.float() for name, tensor in state.items() if name != "accuracy"}
        reference = [state.pop(name, None) for name in ("reference mean", "reference covariance")]
        net = Classifier(len(state["head.bias"])).eval()
        net.load_state_dict(state)
    net.trained = metadata.get("trained", state_hash(net.state_dict()))
    net.reference = None if reference[0] is None else reference
    return net


def ship_classifier(args):
    """Writes a classifier in the form in which the repository has the study's: its matrices in
    fp16, and with the statistics of its features of all test pictures, by which study/card.py
    recognises them in other files. The rounding moves distances by 0.02%."""
    net = load_classifier(args.paths[0])
    pictures = fid.Pictures(os.path.join(args.data, "test"), size=args.size)
    features = pooled_features(net, (images for _, images in pictures.batches(CPU, 0)))
    mean, covariance = mean_and_covariance(features)
    state = {}
    for name, tensor in net.state_dict().items():
        state[name] = tensor.half() if tensor.ndim > 1 else tensor
    state["reference mean"] = mean.float()
    state["reference covariance"] = covariance.float()
    with writing(args.out) as file:
        file.write(save(state, {"format": "pt", "trained": net.trained}))


# --------------------------------------------------------------------------------------------------
# Distances


class Judge:
    """The features of the classifier and, if args.vfm names it, of the vision model; and those of
    args.real real training pictures, which are kept in a file beside the classifier. The networks
    run on `device`, without TF32; features are on the CPU."""

    def __init__(self, args, device=CPU):
        self.classifier = load_classifier(args.classifier)
        self.vfm = None
        if args.vfm is not None:
            self.vfm = VFM(args.vfm, args.vfm_weights, args.size, args.grid, args.vfm_stride)
        pictures = fid.Pictures(os.path.join(args.data, "train"), args.real, args.size)
        # The file's name identifies the pictures and the networks.
        hashes = [pictures.set.fingerprint[:8], state_hash(self.classifier.state_dict())[:8]]
        if self.vfm is not None:
            hashes.append(state_hash(self.vfm.state_dict())[:8])
        self.device = device
        self.classifier.to(device)
        if self.vfm is not None:
            self.vfm.to(device)
        name = f"real-{pictures.count}-{'-'.join(hashes)}.pt"
        path = os.path.join(os.path.dirname(args.classifier), name)
        if not os.path.exists(path):
            features = self.features_of_set(pictures)
            with writing(path) as file:
                torch.save(features, file)
        self.real = read_weights(path)[0]

    @without_tf32()
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    @torch.no_grad()
    def features(self, images):
        """images: uint8 (B,3,H,W). Returns the features "classifier" (B,128); with a vision model
        "target" (B,D), its mean token; and the classifier's "logits" (B,classes)."""
        images = images.to(self.device)
        logits, pooled = self.classifier(images)
        found = {"classifier": pooled, "logits": logits}
        if self.vfm is not None:
            found["target"] = self.vfm(from_uint8(images)).mean(1)
        return {name: features.cpu() for name, features in found.items()}

    def features_of_set(self, pictures):
        """The features of all pictures of a fid.Pictures."""
        return concatenate([self.features(images) for _, images in pictures.batches(CPU, 0)])

    def distances(self, features):
        """{network: Frechet distance of a set's features from those of the real pictures}."""
        return {
            network: feature_distance(features[network], self.real[network])
            for network in ("classifier", "target")
            if network in self.real
        }


def feature_distance(a, b):
    """Frechet distance of two sets, from their features (n,D) and (m,D)."""
    return fid.frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b))


def concatenate(parts):
    """A list of dicts of tensors as one dict of tensors."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def mean_and_covariance(x):
    """Features (n,D): mean (D,) and covariance (D,D), float64."""
    x = x.double()
    return x.mean(0), torch.cov(x.T)


def judge_samples(args, device):
    """Writes <set>.json beside each set of samples: its distances and, as "told", the share of its
    pictures that the classifier assigns to their label."""
    judge = Judge(args, device)
    for path in args.paths:
        pictures = fid.Pictures(path)
        features = judge.features_of_set(pictures)
        labels = pictures.set.labels[pictures.chosen]
        correct = features["logits"].argmax(1).numpy() == labels
        result = dict(
            judge.distances(features),
            told=float(correct.mean()),
            pictures=pictures.count,
            settings=pictures.set.settings,
        )
        write_json(path.removesuffix(".npz") + ".json", result)


# --------------------------------------------------------------------------------------------------
# A VAE's latents and reconstructions


def judge_vae(args):
    """Measures a VAE on args.num test pictures: a dict for its JSON file. Beside that file it draws
    pictures along straight lines between latents."""
    judge = Judge(args)
    vae = load_vae(args.paths[0])
    pictures = fid.Pictures(os.path.join(args.data, "test"), args.num, vae.resolution)
    latents, measured = measure_reconstructions(vae, judge, pictures)
    draw_path(vae, pictures, args.out.removesuffix(".json") + "-path.png")
    return {**measured, **measure_latents(vae, latents), "pictures": pictures.count}


@torch.no_grad()
def measure_reconstructions(vae, judge, pictures):
    """Encodes and decodes a fid.Pictures -> the means of the posteriors (n,C,h,w), and a dict:

    psnr (dB), ssim: of the reconstructions. reconstruction_<network>: their distances from the
    judge's real pictures. processor_seconds: of encoding, and of decoding with PSNR and SSIM.
    """
    latents = []
    features = []
    quality = []
    spent = {"encoding": 0.0, "decoding": 0.0}
    for _, images in pictures.batches(CPU, 0):
        begin = processor_seconds()
        z, _ = vae.encode(from_uint8(images))
        encoded = processor_seconds()
        reconstructions = to_uint8(vae.decode(z))
        psnr = fid.psnr(images, reconstructions)
        ssim = fid.ssim(images, reconstructions)
        spent["encoding"] += encoded - begin
        spent["decoding"] += processor_seconds() - encoded
        latents.append(z)
        features.append(judge.features(reconstructions))
        quality.append(torch.stack([psnr, ssim]))
    psnr, ssim = torch.cat(quality, 1).mean(1).tolist()
    distances = judge.distances(concatenate(features))
    measured = {f"reconstruction_{network}": value for network, value in distances.items()}
    spent = {step: round(seconds, 2) for step, seconds in spent.items()}
    return torch.cat(latents), {**measured, "psnr": psnr, "ssim": ssim, "processor_seconds": spent}


def measure_latents(vae, latents):
    """Statistics of a VAE's latents (n,C,h,w), not yet normalised.

    rank_channels, rank_flat: effective ranks of the channels and of flattened latents;
    neighbour_correlation: of adjacent positions; channel_spread: the largest standard deviation of
    a channel over the smallest, before normalisation.
    """
    z = vae.normalize(latents).double()  # (n,C,h,w)
    centred = z - z.mean((0, 2, 3), keepdim=True)
    return {
        "rank_channels": effective_rank(centred.transpose(0, 1).flatten(1).T),
        "rank_flat": effective_rank(z.flatten(1)),
        "neighbour_correlation": neighbour_correlation(centred),
        "channel_spread": (vae.latent_std.max() / vae.latent_std.min()).item(),
    }


def judge_ifid(args):
    """Measures iFID of a VAE, between args.num test pictures and the training pictures: a dict for
    its JSON file. Beside that file it draws originals, reconstructions, interpolations and
    neighbours."""
    vae = load_vae(args.paths[0])
    held_out = fid.Pictures(os.path.join(args.data, "test"), args.num, vae.resolution)
    training = fid.Pictures(os.path.join(args.data, "train"), args.neighbours, vae.resolution)
    path = args.out.removesuffix(".json") + ".png"
    return measure_ifid(vae, load_classifier(args.classifier), held_out, training, path)


def measure_ifid(vae, classifier, held_out, training, path=None):
    """iFID as in fid.py, in the features of a Classifier -> {"ifid": float, "rfid": the same
    distance of the reconstructions, "interpolation": all that moves it, "processor_seconds":
    float}.

    held_out, training: fid.Pictures of the VAE's resolution. The reference is the held-out
    originals. path: of a PNG to write. With as many held-out pictures as features have dimensions,
    or a few times as many, the distance is biased upwards, so only distances of the same held-out
    pictures can be compared.
    """
    begin = processor_seconds()
    found = fid.find_cached_latents(vae, training)
    latents = fid.TrainingLatents(vae, training, CPU, 0, "fp32", *found)
    between = fid.Interpolations(vae, held_out, latents)
    joined = pooled_features(classifier, (images for _, images in between.batches()))
    originals = pooled_features(classifier, (images for _, images in held_out.batches(CPU, 0)))
    ifid = feature_distance(joined, originals)
    spent = processor_seconds() - begin
    decoded = (between.decode(rows) for rows in between.rows.split(held_out.batch_size))
    rfid = feature_distance(pooled_features(classifier, decoded), originals)
    if path is not None:
        between.save_picture(path)
    return {
        "ifid": ifid,
        "rfid": rfid,
        "interpolation": between.record,
        "processor_seconds": round(spent, 2),
    }


@torch.no_grad()
def pooled_features(classifier, batches):
    """Batches of pictures uint8 (b,3,H,W) -> a Classifier's pooled features (n,128)."""
    return torch.cat([classifier(images)[1] for images in batches])


def effective_rank(x):
    """Points (n,D): exp of the entropy of their covariance's eigenvalues (Roy and Vetterli
    2007)."""
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T)).clamp(min=0)
    shares = eigenvalues / eigenvalues.sum()
    return torch.exp(-torch.xlogy(shares, shares).sum()).item()


def neighbour_correlation(centred):
    """Latents (n,C,h,w) whose channels have mean 0: correlation of values that are adjacent in a
    row or a column, mean over the two and over channels."""
    variance = centred.square().mean((0, 2, 3))
    in_rows = (centred[..., 1:] * centred[..., :-1]).mean((0, 2, 3))
    in_columns = (centred[..., 1:, :] * centred[..., :-1, :]).mean((0, 2, 3))
    return ((in_rows + in_columns) / 2 / variance).mean().item()


@torch.no_grad()
def draw_path(vae, pictures, path):
    """Draws four straight lines, each between the latents of two test pictures, decoded in nine
    steps and with the two pictures at its ends."""
    lines = []
    apart = pictures.count // 8
    for k in range(4):
        pair = pictures.chosen[[2 * k * apart, (2 * k + 1) * apart]]
        images = pictures.set.stack(pair, vae.resolution)
        a, b = vae.encode(from_uint8(images))[0]
        share = torch.linspace(0, 1, 9).view(-1, 1, 1, 1)
        decoded = to_uint8(vae.decode(a + share * (b - a)))
        lines.append(torch.cat([images[:1], decoded, images[1:]]))
    save_grid(path, lines)


@torch.no_grad()
def draw_latents(args):
    """Draws a panel for each VAE: the flattened, normalised latents of test pictures in the plane
    of their first two principal components, one colour per class."""
    panels = []
    for path in args.paths:
        vae = load_vae(path)
        pictures = fid.Pictures(os.path.join(args.data, "test"), args.num, vae.resolution)
        z = [vae.encode(from_uint8(images))[0] for _, images in pictures.batches(CPU, 0)]
        places, shares = principal_plane(vae.normalize(torch.cat(z)).flatten(1).double())
        name = os.path.basename(os.path.normpath(path))
        labels = pictures.set.labels[pictures.chosen]
        panels.append((name, places.numpy(), labels, shares.tolist()))
    figures.draw_latents(args.out, panels, pictures.set.classes)


def principal_plane(x):
    """Points (n,D): their places on the first two principal axes (n,2), and the shares of the
    variance of these axes (2,)."""
    x = x - x.mean(0)
    variances, axes = torch.linalg.eigh(x.T @ x)
    return x @ axes[:, [-1, -2]], variances[[-1, -2]] / variances.sum()


# --------------------------------------------------------------------------------------------------


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("subject", choices=["classifier", "ship", "samples", "vae", "ifid", "latents"])
    p.add_argument(
        "paths", nargs="*", help="samples: .npz files; vae, ifid, latents: folders; ship: .pt"
    )
    p.add_argument("--data", required=True)
    p.add_argument("--classifier")
    p.add_argument("--vfm", help="timm model that VAEs were aligned to")
    p.add_argument("--vfm-weights")
    p.add_argument("--vfm-stride", type=int)
    p.add_argument("--grid", type=int, default=8, help="side of the vision model's token grid")
    p.add_argument("--size", type=int, default=32, help="side of the pictures, pixels")
    p.add_argument("--num", type=int, default=2000, help="test pictures to judge VAEs with")
    p.add_argument(
        "--real",
        type=int,
        default=10000,
        help="training pictures that samples are compared with, evenly spaced",
    )
    p.add_argument(
        "--neighbours",
        type=int,
        help="ifid: training pictures among which neighbours are looked for, evenly spaced "
        "(default: all)",
    )
    p.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="samples: where networks run"
    )
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--out", help="classifier: .pt; ship: .safetensors; vae, ifid: .json; latents: .png"
    )
    return p.parse_args(argv)


def main():
    args = parse_arguments()
    device = setup(args.device if args.subject == "samples" else "cpu")
    if args.subject != "classifier" and not args.paths:
        raise UserError(f"python -m study.judge {args.subject}: name the files or folders to judge")
    if args.subject == "classifier":
        data = ImageSet(os.path.join(args.data, "train"))
        held_out = os.path.join(args.data, "test")
        train_classifier(data, held_out, args.size, args.out, args.workers, args.seed)
    elif args.subject == "ship":
        ship_classifier(args)
    elif args.subject == "samples":
        judge_samples(args, device)
    elif args.subject == "latents":
        draw_latents(args)
    elif args.subject == "ifid":
        write_json(args.out, judge_ifid(args))
    else:
        write_json(args.out, judge_vae(args))


if __name__ == "__main__":
    run_main(main)
