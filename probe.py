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
import os

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from common.files import UserError, write_json
from common.flags import parse_flags
from common.pictures import PictureBlocks, from_uint8, load_batches
from common.processes import autocast, barrier, rank, resolve_precision, run_main, say, setup, world
from common.runs import lock, mark_done, newest_result, provenance, resumable_array
from common.weights import load_vae
from probing import correlation as correlate, tables
from probing.benchmarks import read_benchmarks
from probing.multilabel import average_precision, best_thresholds, f1_scores, topk_recall
from probing.latent_shape import latent_points, mixture, uniformity

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
BLOCK, WIDTH = 2048, 512  # rows and outputs of a product
MEMORY = 4e9  # bytes; rows that take more in fp32 are kept in bf16


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--vae",
        nargs="+",
        help="files, run folders or published VAEs (default: the newest under runs/)",
    )
    p.add_argument(
        "--data",
        nargs="+",
        help="benchmark folders (default: all under data/, else runs/demo/pictures)",
    )
    p.add_argument(
        "--task",
        action="append",
        choices=["attributes", "classes", "uniformity", "mixture"],
        help="may be given several times (default: attributes)",
    )
    p.add_argument(
        "--zero-shot", action="store_true", help="AwA2: test on the ten classes of testclasses.txt"
    )
    p.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave out annotated pictures that are not there",
    )
    p.add_argument(
        "--train-images",
        type=int,
        default=250000,
        help="at most; a seeded choice of the training split",
    )
    p.add_argument(
        "--gfid", help="csv of <VAE>,<FID> for each --vae: correlation of FID with every measure"
    )
    p.add_argument(
        "--pictures",
        type=int,
        default=8,
        help="an attribute's highest and lowest, in a PNG; 0: none",
    )
    p.add_argument("--out", default="runs/probe")
    p.add_argument("--cache", default="runs/cache", help="folder of the features")
    p.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    p.add_argument(
        "--workers", type=int, help="loader processes per process (default: its share of the cores)"
    )
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of splits that are not published, subsets and resamplings",
    )
    return parse_flags(p, argv)


# ----------------------------------------------------------------------------------------------------------------------
# Features: computed once, fp16, memory-mapped


@torch.no_grad()
def features(bench, key, size, dims, encode, args, device):
    """encode(pictures (b,3,size,size) in [-1,1]) of all pictures of a benchmark -> fp16 memory map (N,dims). The folder's name
    says of what they are, `key` being the encoder's; blocks that are there are not computed again."""
    folder, block = os.path.join(args.cache, f"features-{key}-{size}-{bench.fingerprint[:12]}"), 16
    array, done, todo = resumable_array(
        folder, "features.npy", np.float16, (len(bench.names), dims), block
    )
    todo = todo[rank() :: world()]
    loader = load_batches(
        PictureBlocks(bench.load, size, len(array), block), todo.tolist(), args.workers, device
    )
    bar = tqdm(
        loader,
        f"features of {bench.name}",
        len(todo),
        disable=rank() > 0,
        leave=False,
        mininterval=1,
    )
    for k, batch in zip(todo, bar):
        array[k * block : k * block + block] = z = (
            encode(from_uint8(batch["image"])).flatten(1).half().cpu().numpy()
        )
        if not np.isfinite(z).all():
            raise UserError(f"features of {bench.name} ({key}) leave fp16's range")
        mark_done(array, done, k)
    barrier()
    return np.load(os.path.join(folder, "features.npy"), mmap_mode="r")


# ----------------------------------------------------------------------------------------------------------------------
# The probe


def blocks(x, device):
    """Features (N,D), on disk or not -> (slice, float32 block on the device)."""
    for i in range(0, len(x), BLOCK):
        yield slice(i, i + BLOCK), torch.as_tensor(np.array(x[i : i + BLOCK])).to(device).float()


def whiten(x, device):
    """Features (N,D) -> mean (D,), axes (D,r), variances (r,), and rows (N,r) = (x - mean) @ axes: the principal components of
    the standardised features, each divided by the root of its variance."""
    tf32, torch.backends.cuda.matmul.allow_tf32 = (
        torch.backends.cuda.matmul.allow_tf32,
        False,
    )  # small variances would drown
    n, d = x.shape
    sums = (
        sum(
            torch.stack([b.double().sum(0), b.double().square().sum(0)])
            for _, b in blocks(x, device)
        )
        / n
    )
    mean, std = sums[0].float(), (sums[1] - sums[0].square()).clamp(min=0).sqrt().float()
    std[std < 1e-6] = 1  # a feature that is always the same says nothing
    standard = ((b - mean) / std for _, b in blocks(x, device))
    if n < d:  # what the rows span holds the optimum
        z = torch.cat(list(standard))
        variances, vectors = torch.linalg.eigh((z @ z.T).double() / n)
        variances = variances.clamp(min=1e-9 * variances[-1].clamp(min=1))
        axes = z.T @ (vectors / (n * variances).sqrt()).float()
    else:
        covariance = torch.zeros(d, d, device=device)
        for b in standard:
            covariance.addmm_(b.T, b, alpha=1 / n)
        variances, axes = torch.linalg.eigh(covariance)
        variances = variances.clamp(
            min=1e-7 * variances[-1].clamp(min=1)
        )  # rounded ones scale the rows, not the optimum
    axes = axes / variances.sqrt().float() / std[:, None]
    kind = torch.float32 if 4 * n * axes.shape[1] <= MEMORY else torch.bfloat16
    rows = torch.empty(n, axes.shape[1], dtype=kind, device=device)
    for part, b in blocks(x, device):
        rows[part] = (b - mean) @ axes
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return mean, axes, variances.float(), rows


class Probe:
    """scores(x (N,D)) -> logits (N,A); `strength` (A,) that was chosen; `info` on the fit."""

    def __init__(self, weight, bias, strength, info):
        self.weight, self.bias, self.strength, self.info = weight, bias, strength, info

    def scores(self, x):
        return torch.cat(
            [(b @ self.weight + self.bias).cpu() for _, b in blocks(x, self.weight.device)]
        ).numpy()


def descend(w, rows, penalty, y, softmax, tolerance, steps=20):
    """Steps of the fit of G outputs, an output being one attribute (A = 1) or all classes of a softmax. Weights w (r+1,G,A),
    biases last, of white rows (N,r); penalty (r+1,G,1); targets y (N,G,A) of 1, 0, and -1 for unknown -> w, which outputs have
    converged (G,), number of steps. Returns when over half of them have, so that others can take their places.

    Non-linear conjugate gradients (Polak-Ribiere) after scaling by 1 / (mean curvature + penalty), which is about the inverse
    Hessian since the rows are white. Each output has its own step length t, found by Newton's method on the line: that needs
    no product with the rows, as logits are linear in t."""
    parts = [slice(i, i + BLOCK) for i in range(0, len(rows), BLOCK)]
    count = (y >= 0).sum(0).clamp(min=1)
    kind = rows.dtype if resolve_precision("auto", rows.device) == "bf16" else torch.float32

    def product(a, b):
        return (a.to(kind) @ b.to(kind)).float()

    def logits(w):  # (r+1,G,A) -> (N,G,A)
        z = torch.empty(y.shape, device=w.device)
        for part in parts:
            z[part] = product(rows[part], w[:-1].flatten(1)).view_as(z[part]) + w[-1]
        return z

    def errors(z, y):
        """Logits, targets (n,G,A) -> probabilities, their errors, and weights: 1 / number of known targets, 0 for unknown."""
        p, weight = z.softmax(-1) if softmax else z.sigmoid(), (y >= 0) / count
        return p, (p - y) * weight, weight

    def dot(u, v):  # -> (G,1)
        return (u * v).sum((0, 2))[:, None]

    z = logits(w)
    for step in range(steps + 1):
        g, curvature = penalty * w, 0
        for part in parts:
            p, error, weight = errors(z[part], y[part])
            g[:-1] += product(rows[part].T, error.flatten(1)).view_as(g[:-1])
            g[-1] += error.sum(0)
            curvature = curvature + (p * (1 - p) * weight).sum(0)
        if step == 0:
            scale = 1 / (curvature.clamp(min=1e-7) + penalty)
        downhill = -scale * g
        gain = -dot(g, downhill)  # about twice the loss that is left to gain
        done = gain < tolerance
        if 2 * done.sum() > len(done) or step == steps:
            return w, done[:, 0], step
        d = downhill
        if step:
            d = downhill + (dot(before - g, downhill) / last).clamp(min=0) * d_before
            d = torch.where(dot(d, g) < 0, d, downhill)
        d = torch.where(done, 0, d)
        before, last, d_before, dz, t = g, gain, d, logits(d), torch.zeros_like(gain)
        for k in range(2):
            slope, bend = dot(penalty * (w + t * d), d), dot(penalty * d, d)
            for part in parts:
                p, error, weight = errors(z[part] + t * dz[part], y[part])
                mean = (p * dz[part]).sum(-1, keepdim=True) if softmax else p * dz[part]
                slope += dot(error, dz[part])
                bend += dot(p * weight * dz[part], dz[part] - mean)
            new = t - slope / bend.clamp(min=1e-30)
            t = (
                new.clamp(t / 4, 4 * t) if k else new
            )  # where the loss bends, Newton's method may go far astray
        w, z = w + t * d, z.addcmul_(t, dz)


@torch.no_grad()
def fit_linear_probe(
    train_x,
    train_y,
    val_x,
    val_y,
    strengths=STRENGTHS,
    iterations=300,
    tolerance=1e-8,
    device="cpu",
):
    """Features (N,D), targets (N,A) of 1, 0, and -1 for unknown, or classes (N,) -> Probe. All strengths are fitted, and for
    each attribute the one of least validation loss is taken."""
    device = torch.device(device)
    y, val_y = (torch.as_tensor(np.asarray(v)).to(device) for v in (train_y, val_y))
    softmax = y.ndim == 1
    if softmax:
        classes = int(max(y.max(), val_y.max())) + 1
        y, val_y = (F.one_hot(v.long(), classes).to(torch.int8) for v in (y, val_y))
    strengths = torch.tensor(sorted(strengths, reverse=True), dtype=torch.float32, device=device)
    (n, d), a, s = train_x.shape, y.shape[1], len(strengths)
    mean, axes, variances, rows = whiten(train_x, device)
    if rows.dtype == torch.bfloat16:
        tolerance = max(tolerance, 1e-6)  # smaller gains drown in the products' rounding

    # outputs with step lengths of their own: each attribute at each strength, (S A,1), or all classes at each, (S,A)
    every = torch.arange(a, device=device)
    columns = every.repeat(s, 1) if softmax else every.repeat(s)[:, None]
    penalty = (
        strengths.repeat_interleave(len(columns) // s)
        / F.pad(variances, (0, 1), value=torch.inf)[:, None]
    )
    share = ((y == 1).sum(0) / (y >= 0).sum(0).clamp(min=1))[columns]
    w = torch.zeros(len(penalty), *columns.shape, device=device)
    w[-1] = share.clamp(min=0.5 / n).log() if softmax else share.clamp(0.5 / n, 1 - 0.5 / n).logit()
    converged = ((share == 0) | (share == 1)).all(1)  # of these the bias says it all
    todo, taken = (~converged).nonzero()[:, 0], torch.zeros(len(columns), device=device)
    width = max(1, WIDTH // columns.shape[1])
    while len(todo):
        now = todo[:width]
        w[:, now], done, steps = descend(
            w[:, now], rows, penalty[:, now, None], y[:, columns[now]], softmax, tolerance
        )
        converged[now], taken[now] = done, taken[now] + steps
        todo = torch.cat([now[~done & (taken[now] < iterations)], todo[width:]])

    weight = (axes @ w[:-1].flatten(1)).view(d, s, a)
    bias = w[-1].view(s, a) - torch.tensordot(mean, weight, 1)
    loss = torch.zeros(s, a, device=device)
    for part, x in blocks(val_x, device):
        z, target = (x @ weight.flatten(1)).view(-1, s, a) + bias, val_y[part, None]
        losses = -z.log_softmax(-1) if softmax else F.softplus(z) - z * (target == 1)
        loss += (losses * (target == 1 if softmax else target >= 0)).sum(0)
    best = (loss.sum(1, keepdim=True).expand(s, a) if softmax else loss).argmin(
        0
    )  # ties: the strongest
    info = dict(
        rows=n,
        dims=d,
        iterations=int(taken.max()),
        unconverged=int((~converged).sum()),
        tolerance=tolerance,
    )
    return Probe(weight[:, best, every], bias[best, every], strengths[best].cpu().numpy(), info)


def training_probe(folder, size, precision="fp32", train_images=2000, test_images=1000):
    """-> function(vae) -> F1 of a probe on a few pictures of a benchmark's folder, always the same and kept in memory: a
    look during training. Its penalty is fixed, so its numbers compare with each other and not with the table's."""
    words = ["--data", folder, "--task", "attributes", "--train-images", str(train_images)]
    bench = read_benchmarks(parse_arguments(words))[0]
    n, test = bench.parts[0].stop, np.arange(bench.parts[2].start, bench.parts[2].stop)
    picks = np.append(np.arange(n), np.random.default_rng(0).permutation(test)[:test_images])
    pictures, y = bench.load(picks, size), bench.targets[picks]

    @torch.no_grad()
    def measured(vae):
        device = vae.latent_mean.device
        with autocast(device, precision):
            z = [
                vae.encode(from_uint8(x.to(device)))[0].flatten(1).float().cpu()
                for x in pictures.split(64)
            ]
        z = torch.cat(z).numpy()
        probe = fit_linear_probe(z[:n], y[:n], z[n:], y[n:], [1e-2], device=device)
        return dict(
            zip(("probe_f1_macro", "probe_f1_micro"), f1_scores(probe.scores(z[n:]), y[n:]))
        )

    return measured


# ----------------------------------------------------------------------------------------------------------------------
# Measures


def measure(scores, targets, val_scores, val_targets, seed, draws=300):
    """-> {measure: [value, low, high]} with 95% bootstrap intervals over test pictures, {column: (A,)} of each attribute."""
    n, rng = len(scores), np.random.default_rng(seed)
    weights = np.ones(
        (1 + draws, n), np.float32
    )  # the pictures themselves, then how often each is in a draw
    for row in weights[1:]:
        row[:] = np.bincount(rng.integers(0, n, n), minlength=n)
    if targets.ndim == 1:
        values, columns = {"accuracy": weights @ (scores.argmax(1) == targets) / n}, {}
    else:
        tuned = best_thresholds(val_scores, val_targets)
        macro, micro, f1 = f1_scores(scores, targets, 0, weights)
        macro_tuned, micro_tuned, f1_tuned = f1_scores(scores, targets, tuned, weights)
        precision = average_precision(scores, targets, weights)
        values = {
            "F1 macro": macro,
            "F1 micro": micro,
            "F1 macro, tuned": macro_tuned,
            "F1 micro, tuned": micro_tuned,
            "mean AP": precision.mean(1),
        }
        values.update({f"top-{k} recall": topk_recall(scores, targets, k, weights) for k in (3, 5)})
        columns = dict(
            f1=f1[0], f1_tuned=f1_tuned[0], tuned_threshold=tuned, average_precision=precision[0]
        )
    return {
        k: [float(v[0]), *np.quantile(v[1:], [0.025, 0.975]).tolist()] for k, v in values.items()
    }, columns


def probe_one(bench, x, label, size, args, device):
    """Fit and measures on features x (N,D); writes each attribute's results and, if `size`, its extreme pictures
    -> {measure: [value, low, high]}, about the fit."""
    (train, val, test), y = bench.parts, bench.targets
    probe = fit_linear_probe(x[train], y[train], x[val], y[val], device=device)
    if probe.info["unconverged"]:
        say(f"warning: {bench.name}, {label}: {probe.info['unconverged']} fits have not converged")
    scores = probe.scores(x[test])
    values, columns = measure(scores, y[test], probe.scores(x[val]), y[val], args.seed)
    tables.write_results(bench, label, probe.strength, scores, columns, size, args)
    chosen, counts = np.unique(probe.strength, return_counts=True)
    return values, dict(probe.info, strengths={f"{s:g}": int(c) for s, c in zip(chosen, counts)})


def main():
    args = parse_arguments()
    args.task = args.task or ["attributes"]
    device = setup(args.device)
    paths = args.vae or [
        os.path.dirname(newest_result("vae.safetensors", "VAE", "python train_vae.py"))
    ]
    fids = correlate.read_gfid(args.gfid, paths) if args.gfid else None
    benches = read_benchmarks(args)
    lock(args.out)  # refused now rather than after hours
    probed = "attributes" in args.task or "classes" in args.task
    jobs, info = {}, {}  # jobs: (benchmark, column of the table) -> features, side
    for path in paths:
        vae = load_vae(path, device)
        size, dims, version = vae.resolution, vae.channels * vae.latent_size**2, vae.info["hash"]
        side = max(
            1, min(size, int((dims / 3) ** 0.5))
        )  # of the largest square of at most as many numbers
        info[path] = dict(
            vae.config, hash=version, dims=dims, channels=vae.channels, step=vae.info["step"]
        )
        say(f"VAE       {path}, {dims} dimensions at {size} pixels, hash {version}")
        for bench in benches:
            latents = features(
                bench,
                version[:12],
                size,
                dims,
                lambda x: vae.normalize(vae.encode(x)[0]),
                args,
                device,
            )
            jobs[bench, path] = latents, size
            if probed:
                jobs[bench, f"{dims} pixels"] = (
                    features(bench, "pixels", side, 3 * side**2, lambda x: x, args, device),
                    None,
                )
                jobs[bench, "majority"] = (
                    np.zeros((len(bench.names), 1), np.float32),
                    None,
                )  # only biases can learn
    first = rank() == 0
    if dist.is_initialized():
        dist.destroy_process_group()  # the rest is for one process, and nobody waits for it
    if not first:
        return

    results, fits = {}, {}
    for (bench, label), (x, size) in jobs.items():
        row, about = probe_one(bench, x, label, size, args, device) if probed else ({}, {})
        for task, function in dict(uniformity=uniformity, mixture=mixture).items():
            if task in args.task and label in info:
                values, about[task] = function(
                    latent_points(x, info[label]["channels"], args.seed), args.seed
                )
                row.update(values)
        for name, value in row.items():
            results.setdefault(bench.name, {}).setdefault(name, {})[label] = value
        fits[f"{bench.name}, {label}"] = about
    say(
        "\n".join(
            tables.lines_of_table(
                results, list(dict.fromkeys([*paths, *(label for _, label in jobs)]))
            )
        )
    )
    correlations = correlate.report(results, fids, args.out, args.seed) if fids else {}
    write_json(
        os.path.join(args.out, "result.json"),
        dict(
            results=results,
            correlations=correlations,
            fids=fids,
            vaes=info,
            benchmarks={b.name: b.about for b in benches},
            fits=fits,
            arguments=vars(args),
            provenance=provenance(),
        ),
    )
    say(f"done      {args.out}/result.json")


if __name__ == "__main__":
    run_main(main)
