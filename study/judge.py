"""Judges for study/run.py: a classifier that no VAE was aligned to, distances of sets of pictures in its features and in the
vision model's own, and what a VAE's latents and reconstructions are like.

    python -m study.judge classifier --data data/cifar10 --out runs/study/classifier.pt
    python -m study.judge samples runs/study/a.npz b.npz --data data/cifar10 --classifier runs/study/classifier.pt ...
    python -m study.judge vae runs/study/vae_send --data data/cifar10 --classifier runs/study/classifier.pt ...
    python -m study.judge latents runs/study/vae_plain runs/study/vae_send --data data/cifar10 --out latents.png

Frechet distances are of the classifier's 128 pooled features and of the vision model's pooled tokens: neither is FID. The result
goes to --out as JSON, that of samples beside each set. --data is a folder with train/ and test/ in ImageNet's layout.
"""

import argparse
import colorsys
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from common.files import UserError, read_weights, state_hash, write_json, writing
from common.pictures import ImageSet, TrainingBatches, from_uint8, load_batches, save_grid, to_uint8
from common.processes import run_main, say, setup
from common.weights import load_vae
from models import VFM
import fid
from study import report


class Classifier(nn.Module):
    """uint8 (B,3,H,W) -> logits (B,K), pooled features (B,128). 0.34M parameters, for pictures of about 32 pixels."""

    def __init__(self, classes):
        super().__init__()

        def conv(a, b, stride=1):
            return nn.Sequential(
                nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()
            )

        self.stem = nn.Sequential(
            conv(3, 32),
            conv(32, 48, 2),
            conv(48, 48),
            conv(48, 96, 2),
            conv(96, 128),
            nn.Dropout2d(0.1),
            conv(128, 128),
        )
        self.head = nn.Linear(128, classes)

    def forward(self, images):
        features = self.stem(images.float() / 127.5 - 1).mean((2, 3))
        return self.head(features), features


def train_classifier(args):
    """Two epochs of AdamW on train/, mirrored and shifted by up to 4 pixels; says its accuracy on test/."""
    data = ImageSet(os.path.join(args.data, "train"))
    test = fid.Pictures(os.path.join(args.data, "test"), size=args.size)
    torch.manual_seed(args.seed)
    net = Classifier(len(data.classes))
    batch_size = 128
    steps = 2 * len(data) // batch_size
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    stream = load_batches(
        TrainingBatches(data, batch_size, args.seed, args.size),
        range(steps),
        args.workers,
        torch.device("cpu"),
    )
    for step, batch in enumerate(stream):
        x = F.pad(batch["image"], (4, 4, 4, 4))
        dx, dy = torch.randint(0, 9, (2,)).tolist()
        loss = F.cross_entropy(
            net(x[:, :, dy : dy + args.size, dx : dx + args.size])[0],
            batch["label"],
            label_smoothing=0.1,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            say(f"classifier: step {step} of {steps}, loss {loss.item():.3f}")
    net.eval()
    with torch.no_grad():
        right = sum(
            (net(x)[0].argmax(1) == torch.from_numpy(test.set.labels[i.numpy()])).sum().item()
            for i, x in test.batches(torch.device("cpu"), 0)
        )
    say(f"classifier: tells {right / test.count:.1%} of the {test.count} test pictures")
    with writing(args.out) as file:
        torch.save(dict(net.state_dict(), accuracy=torch.tensor(right / test.count)), file)


def load_classifier(path):
    state = read_weights(path)[0]
    state.pop("accuracy")
    net = Classifier(len(state["head.bias"])).eval()
    net.load_state_dict(state)
    return net


class Judge:
    """Features of both networks, and the statistics of `count` real training pictures, which are kept."""

    def __init__(self, args):
        self.classifier = load_classifier(args.classifier)
        self.vfm = VFM(args.vfm, args.vfm_weights, args.size, args.grid, args.vfm_stride)
        pictures = fid.Pictures(os.path.join(args.data, "train"), args.real, args.size)
        known = "-".join(
            [
                pictures.set.fingerprint[:8],
                *(state_hash(m.state_dict())[:8] for m in (self.classifier, self.vfm)),
            ]
        )
        path = os.path.join(os.path.dirname(args.classifier), f"real-{pictures.count}-{known}.pt")
        if not os.path.exists(path):
            found = self.set_features(pictures)
            with writing(path) as file:
                torch.save(found, file)
        self.real = read_weights(path)[0]

    @torch.no_grad()
    def features(self, x):
        """uint8 (B,3,H,W) -> dict of features (B,D), logits (B,K)."""
        logits, pooled = self.classifier(x)
        return dict(classifier=pooled, target=self.vfm(from_uint8(x)).mean(1), logits=logits)

    def set_features(self, pictures):
        parts = [self.features(x) for _, x in pictures.batches(torch.device("cpu"), 0)]
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}

    def distances(self, found):
        """Features of a set -> {network: Frechet distance from the real training pictures}."""

        def moments(x):
            return x.double().mean(0), torch.cov(x.double().T)

        return {
            k: fid.frechet_distance(*moments(found[k]), *moments(self.real[k]))
            for k in ("classifier", "target")
        }


def judge_samples(args):
    """Of each set of samples, <set>.json beside it: distances, and the share that the classifier tells as their label."""
    judge = Judge(args)
    for path in args.paths:
        pictures = fid.Pictures(path)
        found = judge.set_features(pictures)
        told = found["logits"].argmax(1).numpy() == pictures.set.labels[pictures.chosen]
        write_json(
            path.removesuffix(".npz") + ".json",
            dict(
                judge.distances(found),
                told=float(told.mean()),
                pictures=pictures.count,
                settings=pictures.set.settings,
            ),
        )


@torch.no_grad()
def judge_vae(args):
    """Over args.num test pictures: distances, PSNR and SSIM of reconstructions; of normalised latents z (N,C,h,w):
    effective ranks (exp of the entropy of the covariance's eigenvalues: of channels, and of flattened latents), correlation of
    neighbours, and the largest standard deviation of a channel over the smallest."""
    judge, vae = Judge(args), load_vae(args.paths[0])
    pictures = fid.Pictures(os.path.join(args.data, "test"), args.num, vae.resolution)
    z, parts, quality = [], [], []
    for _, x in pictures.batches(torch.device("cpu"), 0):
        z.append(vae.encode(from_uint8(x))[0])
        y = to_uint8(vae.decode(z[-1]))
        parts.append(judge.features(y))
        quality.append(torch.stack([fid.psnr(x, y), fid.ssim(x, y)]))
    z = vae.normalize(torch.cat(z)).double()
    psnr, ssim = torch.cat(quality, 1).mean(1).tolist()
    found = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}

    def effective_rank(x):  # (n,D)
        share = torch.linalg.eigvalsh(torch.cov(x.T)).clamp(min=0)
        share = share / share.sum()
        return torch.exp(-torch.xlogy(share, share).sum()).item()

    centred = z - z.mean((0, 2, 3), keepdim=True)
    variance = centred.square().mean((0, 2, 3))
    neighbours = (centred[..., 1:] * centred[..., :-1]).mean((0, 2, 3)) + (
        centred[..., 1:, :] * centred[..., :-1, :]
    ).mean((0, 2, 3))
    draw_path(vae, pictures, args.out.removesuffix(".json") + "-path.png")
    return dict(
        {f"reconstruction_{k}": v for k, v in judge.distances(found).items()},
        psnr=psnr,
        ssim=ssim,
        rank_channels=effective_rank(centred.transpose(0, 1).flatten(1).T),
        rank_flat=effective_rank(z.flatten(1)),
        neighbour_correlation=(neighbours / 2 / variance).mean().item(),
        channel_spread=(vae.latent_std.max() / vae.latent_std.min()).item(),
        pictures=pictures.count,
    )


@torch.no_grad()
def draw_path(vae, pictures, path):
    """Four rows: straight lines in nine steps between the latents of two test pictures each, decoded."""
    rows, apart = [], pictures.count // 8
    for k in range(4):
        x = pictures.set.stack(
            pictures.chosen[[2 * k * apart, (2 * k + 1) * apart]], vae.resolution
        )
        a, b = vae.encode(from_uint8(x))[0]
        share = torch.linspace(0, 1, 9).view(-1, 1, 1, 1)
        rows.append(torch.cat([x[:1], to_uint8(vae.decode(a + share * (b - a))), x[1:]]))
    save_grid(path, rows)


@torch.no_grad()
def draw_latents(args):
    """A panel for each VAE: test pictures in the plane of most variance of flattened, normalised latents, a colour a class."""
    panels = []
    for path in args.paths:
        vae = load_vae(path)
        pictures = fid.Pictures(os.path.join(args.data, "test"), args.num, vae.resolution)
        z = [vae.encode(from_uint8(x))[0] for _, x in pictures.batches(torch.device("cpu"), 0)]
        places, share = principal_plane(vae.normalize(torch.cat(z)).flatten(1).double())
        labels, names = pictures.set.labels[pictures.chosen], pictures.set.classes
        colours = [
            tuple(int(255 * c) for c in colorsys.hsv_to_rgb(k / len(names), 1, 0.8))
            for k in range(len(names))
        ]
        series = {
            name: (colours[k], [(*xy, "") for xy in places[labels == k].tolist()])
            for k, name in enumerate(names)
        }
        panels.append(
            report.chart(
                os.path.basename(os.path.normpath(path)),
                f"first axis, {share[0]:.1%} of the variance",
                f"second axis, {share[1]:.1%}",
                series,
                size=(640, 560),
            )
        )
    canvas = Image.new("RGB", (640 * len(panels), 560))
    for i, panel in enumerate(panels):
        canvas.paste(panel, (640 * i, 0))
    report.save(canvas, args.out)


def principal_plane(x):
    """Points (n,D) -> their places on the first two principal axes (n,2), and the shares of variance of these (2,)."""
    x = x - x.mean(0)
    values, axes = torch.linalg.eigh(x.T @ x)
    return x @ axes[:, [-1, -2]], values[[-1, -2]] / values.sum()


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=["classifier", "samples", "vae", "latents"])
    p.add_argument("paths", nargs="*", help="samples: .npz files; vae, latents: folders")
    p.add_argument("--data", required=True)
    p.add_argument("--classifier")
    p.add_argument("--vfm")
    p.add_argument("--vfm-weights")
    p.add_argument("--vfm-stride", type=int)
    p.add_argument("--grid", type=int, default=8, help="side of its token grid")
    p.add_argument("--size", type=int, default=32)
    p.add_argument("--num", type=int, default=2000, help="test pictures to judge VAEs with")
    p.add_argument(
        "--real",
        type=int,
        default=10000,
        help="training pictures that samples are compared with, evenly spaced",
    )
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", help="classifier: .pt; vae: .json; latents: .png")
    args = p.parse_args()
    setup("cpu")
    if args.what == "classifier":
        return train_classifier(args)
    if not args.paths:
        raise UserError(f"{args.what}: name what to judge")
    if args.what == "samples":
        return judge_samples(args)
    if args.what == "latents":
        return draw_latents(args)
    write_json(args.out, judge_vae(args))


if __name__ == "__main__":
    run_main(main)
