"""How much of what can be said about a picture a linear map finds in a VAE's latents, and the shape
of the latent space.

    z = posterior mean, flattened, standardised
    P(attribute a) = sigmoid(w_a z + b_a), P(class) = softmax(W z + b)
    minimised: mean logistic loss + strength/2 |w|^2

The strength of each attribute is the one with the lowest loss on the validation split.

    python probe.py                       # the newest VAE, on every benchmark under data/
    python probe.py --vae runs/vae sdvae --data data/celeba data/awa2  # a table: measures x VAEs
    python probe.py --task classes --data data/imagenet        # linear-probe accuracy
    python probe.py --task uniformity --task mixture           # Gini of the density, mixtures' fit
    python probe.py --task disentanglement --task editing      # DCI, SAP, MIG; edited pictures
    python probe.py --vae runs/a runs/b runs/c --gfid fid.csv  # correlation of measures with FID

Benchmarks: CelebA, DeepFashion, AwA2 as distributed, any folder in CelebA's form, and for classes
any image folder. It writes to --out (runs/probe): result.json, a .csv of each attribute's results,
pictures/, edits/, correlation.png. Features (fp16) stay in --cache.
"""

import argparse
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from common.files import UserError, write_json
from common.flags import parse_flags
from common.pictures import PictureBlocks, from_uint8, load_batches, to_uint8
from common.processes import (
    autocast,
    processor_seconds,
    progress,
    rank,
    resolve_precision,
    run_main,
    say,
    setup,
    without_tf32,
    world,
)
from common.runs import (
    filling,
    lock,
    mark_done,
    newest_result,
    provenance,
)
from common.weights import load_vae
from probing import correlation, tables
from probing.benchmarks import NEED_ATTRIBUTES, read_benchmarks
from probing.disentanglement import disentanglement
from probing.editing import edit_attributes
from probing.latent_shape import latent_points, mixture, uniformity
from probing.multilabel import average_precision, best_thresholds, f1_scores, topk_recall

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Of a matrix product in the fit: pictures, and outputs of the probe.
PICTURES_AT_ONCE = 2048
OUTPUTS_AT_ONCE = 512
# Whitened features that would take more bytes in fp32 are kept in bf16.
FP32_BYTES = 4e9
# Of the blocks in which features are computed, cached and marked as done.
PICTURES_A_BLOCK = 16


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
        choices=[
            "attributes",
            "classes",
            "uniformity",
            "mixture",
            "disentanglement",
            "editing",
        ],
        help="may be given several times (default: attributes)",
    )
    p.add_argument(
        "--zero-shot", action="store_true", help="AwA2: test on the ten classes of testclasses.txt"
    )
    p.add_argument(
        "--skip-missing", action="store_true", help="leave out annotated pictures that are absent"
    )
    p.add_argument(
        "--train-images",
        type=int,
        default=250000,
        help="pictures of the training split that are used at most, a seeded choice",
    )
    p.add_argument(
        "--test-images",
        type=int,
        default=250000,
        help="the same of the test split, and of the validation split",
    )
    p.add_argument(
        "--gfid", help=".csv of <VAE>,<FID> for each --vae: correlation of FID with every measure"
    )
    p.add_argument(
        "--pictures",
        type=int,
        default=8,
        help="draw so many pictures with an attribute's highest, and lowest, scores; 0: none",
    )
    p.add_argument(
        "--edit-direction",
        choices=["pattern", "weight"],
        default="pattern",
        help="edit latents along their covariance with the probe's score, or along its weights",
    )
    p.add_argument(
        "--orthogonal", action="store_true", help="edits leave the scores of other attributes alone"
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
        help="of splits that are not published, choices of pictures, and bootstrap draws",
    )
    return parse_flags(p, argv)


# --------------------------------------------------------------------------------------------------
# Features, computed once and kept on the disk


@torch.no_grad()
def cached_features(benchmark, encoder, size, dims, encode, args, device):
    """The features of all N pictures of a benchmark, as an fp16 memory map (N,dims).

    encode: pictures (b,3,size,size) in [-1,1] -> features, (b,dims) once flattened. encoder: a name
    for it. Features are cached in a folder that is named by the encoder, the size and the
    benchmark's pictures; blocks of pictures that are there already are not computed again. Where
    another run is computing the same features, this waits for it. Raises UserError for features
    that fp16 cannot hold."""
    name = f"features-{encoder}-{size}-{benchmark.fingerprint[:12]}"
    folder = os.path.join(args.cache, name)
    shape = (len(benchmark.names), dims)
    with filling(folder, "features.npy", np.float16, shape, PICTURES_A_BLOCK) as unfinished:
        if unfinished:
            compute_features(*unfinished, benchmark, encoder, size, encode, args, device)
    return np.load(os.path.join(folder, "features.npy"), mmap_mode="r")


def compute_features(array, done, todo, benchmark, encoder, size, encode, args, device):
    """Fills the blocks `todo` of cached_features' array; all processes share the work."""
    todo = todo[rank() :: world()]
    pictures = PictureBlocks(benchmark.load, size, len(array), PICTURES_A_BLOCK)
    batches = load_batches(pictures, todo.tolist(), args.workers, device)
    bar = progress(batches, f"features of {benchmark.name}", len(todo), unit="block")
    for block, batch in zip(todo, bar, strict=True):
        features = encode(from_uint8(batch["image"])).flatten(1).half().cpu().numpy()
        if not np.isfinite(features).all():
            raise UserError(
                f"features of {benchmark.name} ({encoder}) are too large for fp16, or not finite"
            )
        start = block * PICTURES_A_BLOCK
        array[start : start + len(features)] = features
        mark_done(array, done, block)


# --------------------------------------------------------------------------------------------------
# Whitening


def row_blocks(rows):
    """Yields slices that cover N rows in blocks of at most PICTURES_AT_ONCE."""
    for start in range(0, len(rows), PICTURES_AT_ONCE):
        yield slice(start, start + PICTURES_AT_ONCE)


def feature_blocks(features, device):
    """Features (N,D), in memory or memory-mapped -> yields (slice, its rows in float32 on the
    device)."""
    for part in row_blocks(features):
        yield part, torch.as_tensor(np.array(features[part])).to(device).float()


def mean_and_deviation(features, device):
    """Features (N,D) -> their mean and standard deviation, each (D,)."""
    sums = 0
    for _, block in feature_blocks(features, device):
        block = block.double()
        sums = sums + torch.stack([block.sum(0), block.square().sum(0)])
    mean, mean_square = sums / len(features)
    std = (mean_square - mean.square()).clamp(min=0).sqrt()
    return mean.float(), std.float()


def components_by_rows(standard, n):
    """Principal components of n standardised features of more dimensions than n. What the rows do
    not span has no variance, and no part in the optimum.

    standard: blocks (b,D) of the features
    -> components (D,n) of length 1, variances float64 (n,)"""
    rows = torch.cat(list(standard))  # (n,D)
    variances, vectors = torch.linalg.eigh((rows @ rows.T).double() / n)
    variances = variances.clamp(min=1e-9 * variances[-1].clamp(min=1))
    return rows.T @ (vectors / (n * variances).sqrt()).float(), variances


def components_by_covariance(standard, n, d, device):
    """Principal components of n standardised features of d dimensions, d <= n.

    standard: blocks (b,d) of the features -> components (d,d) of length 1, variances (d,)"""
    covariance = torch.zeros(d, d, device=device)
    for block in standard:
        covariance.addmm_(block.T, block, alpha=1 / n)
    variances, components = torch.linalg.eigh(covariance)
    # A variance that is only rounding becomes a small one. The optimum does not depend on it: it
    # scales the whitened feature, and the penalty with it.
    return components, variances.clamp(min=1e-7 * variances[-1].clamp(min=1))


def whiten(features, device):
    """Whitens features (N,D): the principal components of the standardised features, each divided
    by the root of its variance, so that every one has variance 1. r, their number, is the lesser of
    N and D.

    -> mean (D,) and axes (D,r), with whitened = (features - mean) @ axes; variances (r,), from
    before the division; and the whitened features (N,r), in fp32, or in bf16 if they are many"""
    n, d = features.shape
    mean, std = mean_and_deviation(features, device)
    # A feature that is always the same becomes 0.
    std[std < 1e-6] = 1
    standard = ((block - mean) / std for _, block in feature_blocks(features, device))
    if n < d:
        components, variances = components_by_rows(standard, n)
    else:
        components, variances = components_by_covariance(standard, n, d, device)
    axes = components / variances.sqrt().float() / std[:, None]
    r = axes.shape[1]
    dtype = torch.float32 if 4 * n * r <= FP32_BYTES else torch.bfloat16
    whitened = torch.empty(n, r, dtype=dtype, device=device)
    for part, block in feature_blocks(features, device):
        whitened[part] = (block - mean) @ axes
    return mean, axes, variances.float(), whitened


# --------------------------------------------------------------------------------------------------
# The solver
#
# Logistic regressions with the same features are fitted together, because a product with many
# columns takes little longer than one with a single column. There are G of them. Each has A
# outputs: one attribute (A = 1), or all the classes of a softmax. What follows has an axis G, and
# nothing mixes its entries: each regression has its own step lengths and its own convergence.
#
# A regression's weights are (r+1,G,A), the last of them the bias. Dividing the features by the
# roots of their variances multiplies the weights by them, so the penalty on a weight is the
# strength divided by the feature's variance. The bias has none.
#
# torch.optim.LBFGS, with all of them as one problem, reaches the same F1 (within 0.0001). On
# attributes of CIFAR-10 its fit took 1.5 to 7 times as long, and near 300 steps it left fits with
# few pictures unfinished: it has one step length for all, and the slowest decides when it ends.


def dot(u, v):
    """Scalar product of each regression, u and v (_,G,A) -> (G,1)."""
    return (u * v).sum((0, 2))[:, None]


class Regressions:
    """The loss of G penalised logistic regressions: its gradient, and where it is lowest on a line.

    features (N,r): whitened. targets (N,G,A): 1, 0, and -1 for unknown, which has no loss. penalty
    (r+1,G,1). is_softmax: whether the A outputs are classes."""

    def __init__(self, features, targets, penalty, is_softmax):
        self.features = features
        self.targets = targets
        self.penalty = penalty
        self.is_softmax = is_softmax
        # Number of known targets, (G,A): the loss is a mean over these.
        self.known = (targets >= 0).sum(0).clamp(min=1)
        # Products are in bf16 only if the features are, and the hardware is fast at it.
        self.dtype = torch.float32
        if resolve_precision("auto", features.device) == "bf16":
            self.dtype = features.dtype

    def product(self, a, b):
        """Matrices a (_,m) and b (m,_) -> their product, in float32."""
        return (a.to(self.dtype) @ b.to(self.dtype)).float()

    def logits(self, weights):
        """Weights (r+1,G,A) -> logits (N,G,A)."""
        logits = torch.empty(self.targets.shape, device=weights.device)
        matrix = weights[:-1].flatten(1)  # (r,G*A)
        for part in row_blocks(logits):
            product = self.product(self.features[part], matrix)
            logits[part] = product.view_as(logits[part]) + weights[-1]
        return logits

    def errors(self, logits, part):
        """Logits (n,G,A) of the pictures in a slice -> three tensors (n,G,A): probabilities; the
        loss's derivatives by the logits; and the weight of each target in the loss, which is
        1 / (number of known targets), or 0 if it is unknown."""
        targets = self.targets[part]
        probabilities = logits.softmax(-1) if self.is_softmax else logits.sigmoid()
        weight = (targets >= 0) / self.known
        return probabilities, (probabilities - targets) * weight, weight

    def gradient(self, weights, logits):
        """Weights (r+1,G,A) and their logits (N,G,A) -> the loss's gradient (r+1,G,A), and its
        mean second derivatives by the logits (G,A)."""
        gradient = self.penalty * weights
        curvature = torch.zeros_like(weights[-1])
        for part in row_blocks(logits):
            probabilities, error, weight = self.errors(logits[part], part)
            product = self.product(self.features[part].T, error.flatten(1))
            gradient[:-1] += product.view_as(gradient[:-1])
            gradient[-1] += error.sum(0)
            curvature += (probabilities * (1 - probabilities) * weight).sum(0)
        return gradient, curvature

    def step_lengths(self, weights, logits, direction, logits_direction):
        """The step lengths t (G,1) for which the loss at weights + t * direction is about lowest,
        by two steps of Newton's method from t = 0. Logits change by t * logits_direction, so that
        no products with the features are needed."""
        penalty_curvature = dot(self.penalty * direction, direction)
        length = torch.zeros_like(penalty_curvature)
        for iteration in range(2):
            # First and second derivative of the loss by t, both (G,1).
            slope = dot(self.penalty * (weights + length * direction), direction)
            curvature = penalty_curvature.clone()
            for part in row_blocks(logits):
                change = logits_direction[part]
                probabilities, error, weight = self.errors(logits[part] + length * change, part)
                slope += dot(error, change)
                # The variance of the change under the predicted probabilities.
                mean = probabilities * change
                if self.is_softmax:
                    mean = mean.sum(-1, keepdim=True)
                curvature += dot(probabilities * weight * change, change - mean)
            newton = length - slope / curvature.clamp(min=1e-30)
            # Far from the optimum, a step of Newton's method may lead anywhere.
            length = newton if iteration == 0 else newton.clamp(length / 4, 4 * length)
        return length


def conjugate_gradients(regressions, weights, tolerance, steps=20):
    """Non-linear conjugate gradients (Polak and Ribière), preconditioned, for each regression.

    The preconditioner is the diagonal 1 / (mean curvature + penalty). As the features are white, it
    is close to the inverse of the loss's Hessian, and the first direction close to Newton's step.

    weights (r+1,G,A): the start
    -> weights (r+1,G,A); which regressions have converged, (G,); the number of steps

    A regression has converged if the gain is below the tolerance: the gradient's square, measured
    with the preconditioner, which is about twice what its loss can still fall. The function returns
    after `steps` steps, and earlier once over half of the regressions have converged, so that
    others can take their places."""
    logits = regressions.logits(weights)
    # Before the first step there is no direction to be conjugate to.
    previous_gradient = torch.zeros_like(weights)
    previous_direction = torch.zeros_like(weights)
    previous_gain = 1.0
    for step in range(steps + 1):
        gradient, curvature = regressions.gradient(weights, logits)
        if step == 0:
            preconditioner = 1 / (curvature.clamp(min=1e-7) + regressions.penalty)
        descent = -preconditioner * gradient
        gain = -dot(gradient, descent)
        converged = gain < tolerance
        if 2 * converged.sum() > len(converged) or step == steps:
            break

        # Polak and Ribière's share of the previous direction. Where it is negative, or where the
        # sum would lead uphill, the search starts again from the gradient.
        momentum = dot(previous_gradient - gradient, descent) / previous_gain
        direction = descent + momentum.clamp(min=0) * previous_direction
        direction = torch.where(dot(direction, gradient) < 0, direction, descent)
        # Regressions that have converged stay where they are.
        direction = torch.where(converged, 0, direction)

        logits_direction = regressions.logits(direction)
        length = regressions.step_lengths(weights, logits, direction, logits_direction)
        weights = weights + length * direction
        # Logits are linear in the weights.
        logits.addcmul_(length, logits_direction)
        previous_gradient = gradient
        previous_direction = direction
        previous_gain = gain
    return weights, converged[:, 0], step


# --------------------------------------------------------------------------------------------------
# The probe


class Probe:
    """A fitted linear probe with A outputs.

    weight (D,A) and bias (A,): of features as they come, not standardised. strength (A,), an array:
    of the penalty that was chosen. info: what result.json records about the fit."""

    def __init__(self, weight, bias, strength, info):
        self.weight = weight
        self.bias = bias
        self.strength = strength
        self.info = info

    def scores(self, features):
        """Features (N,D) -> logits, an array (N,A)."""
        scores = []
        for _, block in feature_blocks(features, self.weight.device):
            scores.append((block @ self.weight + self.bias).cpu())
        return torch.cat(scores).numpy()


@torch.no_grad()
# TF32's rounding hides the directions of small variance.
@without_tf32()
def fit_linear_probe(
    train_x,
    train_y,
    val_x,
    val_y,
    strengths=STRENGTHS,
    iterations=5000,
    tolerance=1e-8,
    device="cpu",
):
    """Fits a linear probe with every strength of the penalty, and keeps for each attribute the one
    with the lowest validation loss. The classes of a softmax have one strength in common.

    train_x, val_x: features (N,D), in memory or memory-mapped. train_y, val_y: attributes (N,A) of
    1, 0, and -1 for unknown; or classes (N,), from 0. iterations: at most about so many for each
    attribute and strength. tolerance: see conjugate_gradients.
    -> Probe; its info["unconverged"] counts the fits for which the iterations did not suffice"""
    device = torch.device(device)
    train_y = torch.as_tensor(np.asarray(train_y)).to(device)
    val_y = torch.as_tensor(np.asarray(val_y)).to(device)
    is_softmax = train_y.ndim == 1
    if is_softmax:
        classes = int(max(train_y.max(), val_y.max())) + 1
        train_y = F.one_hot(train_y.long(), classes).to(torch.int8)
        val_y = F.one_hot(val_y.long(), classes).to(torch.int8)
    # From the strongest to the weakest: where validation losses are equal, the first is chosen.
    strengths = torch.tensor(sorted(strengths, reverse=True), dtype=torch.float32, device=device)

    mean, axes, variances, whitened = whiten(train_x, device)
    if whitened.dtype == torch.bfloat16:
        # Smaller gains are lost in the rounding of the products.
        tolerance = max(tolerance, 1e-6)
    weights, converged, steps = fit_all_strengths(
        whitened, variances, train_y, strengths, is_softmax, iterations, tolerance
    )
    # From weights of whitened features to weights of the features as they come.
    d, s, a = len(axes), *weights.shape[1:]
    biases = weights[-1]  # (S,A)
    weights = (axes @ weights[:-1].flatten(1)).view(d, s, a)
    biases = biases - torch.tensordot(mean, weights, 1)

    losses = validation_losses(weights, biases, val_x, val_y, is_softmax)  # (S,A)
    if is_softmax:
        losses = losses.sum(1, keepdim=True).expand(s, a)
    best = losses.argmin(0)  # (A,)
    every = torch.arange(a, device=device)
    info = {
        "rows": len(train_x),
        "dims": d,
        "iterations": int(steps.max()),
        "unconverged": int((~converged).sum()),
        "tolerance": tolerance,
    }
    return Probe(weights[:, best, every], biases[best, every], strengths[best].cpu().numpy(), info)


def fit_all_strengths(whitened, variances, targets, strengths, is_softmax, iterations, tolerance):
    """Fits the regressions of all attributes, or that of all classes, with each of S strengths.

    whitened (N,r), variances (r,): of `whiten`. targets int8 (N,A): 1, 0, and -1 for unknown.
    strengths (S,)
    -> weights (r+1,S,A) of whitened features, the last of them the biases; which of the G
    regressions have converged, (G,); the number of steps of each, (G,). G is S for classes, S*A for
    attributes."""
    n, a = targets.shape
    s = len(strengths)
    # The columns of the targets that each regression predicts, (G,1) or for classes (G,A).
    columns = torch.arange(a, device=targets.device)
    columns = columns.repeat(s, 1) if is_softmax else columns.repeat(s)[:, None]
    strength = strengths.repeat_interleave(len(columns) // s)  # (G,)
    # The bias has no penalty: its variance counts as infinite.
    penalty = strength / F.pad(variances, (0, 1), value=torch.inf)[:, None]  # (r+1,G)

    # The fit starts from biases that predict how often each attribute occurs. For an attribute that
    # always occurs, or never, it also ends there.
    frequency = (targets == 1).sum(0) / (targets >= 0).sum(0).clamp(min=1)
    frequency = frequency[columns]
    weights = torch.zeros(len(penalty), *columns.shape, device=targets.device)
    if is_softmax:
        weights[-1] = frequency.clamp(min=0.5 / n).log()
    else:
        weights[-1] = frequency.clamp(0.5 / n, 1 - 0.5 / n).logit()
    converged = ((frequency == 0) | (frequency == 1)).all(1)

    # A regression that has not converged stays at the front of the queue, and the places of those
    # that have go to the next.
    steps = torch.zeros(len(columns), device=targets.device)
    group_size = max(1, OUTPUTS_AT_ONCE // columns.shape[1])
    queue = (~converged).nonzero()[:, 0]
    while len(queue) > 0:
        group, queue = queue[:group_size], queue[group_size:]
        group_targets = targets[:, columns[group]]
        regressions = Regressions(whitened, group_targets, penalty[:, group, None], is_softmax)
        weights[:, group], converged[group], steps_taken = conjugate_gradients(
            regressions, weights[:, group], tolerance
        )
        steps[group] += steps_taken
        unfinished = ~converged[group] & (steps[group] < iterations)
        queue = torch.cat([group[unfinished], queue])
    return weights.view(len(penalty), s, a), converged, steps


def validation_losses(weights, biases, features, targets, is_softmax):
    """The logistic loss of each output, or each class's part of the softmax's loss, summed over the
    pictures, (S,A).

    weights (D,S,A), biases (S,A). features (N,D). targets (N,A): 1, 0, and -1 for unknown."""
    losses = torch.zeros_like(biases)
    for part, block in feature_blocks(features, biases.device):
        target = targets[part, None]  # (n,1,A)
        logits = (block @ weights.flatten(1)).view(-1, *biases.shape) + biases  # (n,S,A)
        if is_softmax:
            losses -= (logits.log_softmax(-1) * (target == 1)).sum(0)
        else:
            loss = F.softplus(logits) - logits * (target == 1)
            losses += (loss * (target >= 0)).sum(0)
    return losses


def training_probe(folder, size, precision="fp32", train_images=2000, test_images=1000):
    """A function from a VAE to {"probe_f1_macro": float, "probe_f1_micro": float}, for measurements
    during training: the F1 of a small probe on the benchmark in a folder.

    The pictures, of size x size, are always the same and stay in memory. The penalty is fixed, so
    the numbers can be compared with each other, but not with those of the command."""
    words = ["--data", folder, "--task", "attributes", "--train-images", str(train_images)]
    benchmark = read_benchmarks(parse_arguments(words))[0]
    training, _, test = benchmark.parts
    n = training.stop
    shuffled_test = np.random.default_rng(0).permutation(np.arange(test.start, test.stop))
    picks = np.append(np.arange(n), shuffled_test[:test_images])
    pictures = benchmark.load(picks, size)  # uint8 (n+m,3,size,size)
    targets = benchmark.targets[picks]  # (n+m,A)

    @torch.no_grad()
    def measure_vae(vae):
        device = vae.latent_mean.device
        latents = []
        with autocast(device, precision):
            for batch in pictures.split(64):
                mean = vae.encode(from_uint8(batch.to(device)))[0]
                latents.append(mean.flatten(1).float().cpu())
        latents = torch.cat(latents).numpy()
        train_data = (latents[:n], targets[:n])
        test_data = (latents[n:], targets[n:])
        # A single strength leaves nothing to choose, so any pictures will do for validation.
        probe = fit_linear_probe(*train_data, *test_data, strengths=[1e-2], device=device)
        macro, micro, _ = f1_scores(probe.scores(latents[n:]), targets[n:])
        return {"probe_f1_macro": macro, "probe_f1_micro": micro}

    return measure_vae


# --------------------------------------------------------------------------------------------------
# Measures


def bootstrap_weights(n, draws, seed):
    """How often each of n pictures counts, float32 (1+draws,n): first once each, then as often as
    it occurs in each of the seeded bootstrap draws."""
    rng = np.random.default_rng(seed)
    weights = np.ones((1 + draws, n), np.float32)
    for i in range(1, 1 + draws):
        weights[i] = np.bincount(rng.integers(0, n, n), minlength=n)
    return weights


def value_and_interval(values):
    """A measure of all pictures, then of bootstrap draws, (1+draws,) -> [value, low, high], with a
    95% interval."""
    return [float(values[0]), *np.quantile(values[1:], [0.025, 0.975]).tolist()]


def measure(scores, targets, val_scores, val_targets, seed, draws=300):
    """All measures of scores (N,A) on the test pictures against attributes (N,A) of 1, 0, and -1
    for unknown, or against classes (N,). Thresholds are tuned on the validation pictures.

    -> {measure: [value, low, high]}, with 95% intervals over bootstrap draws of the test pictures;
    and {column: (A,)}, the measures of each attribute, which is empty for classes"""
    weights = bootstrap_weights(len(scores), draws, seed)
    if targets.ndim == 1:
        values = {"accuracy": weights @ (scores.argmax(1) == targets) / len(scores)}
        columns = {}
    else:
        thresholds = best_thresholds(val_scores, val_targets)
        macro, micro, f1 = f1_scores(scores, targets, 0, weights)
        macro_tuned, micro_tuned, f1_tuned = f1_scores(scores, targets, thresholds, weights)
        precision = average_precision(scores, targets, weights)
        values = {
            "F1 macro": macro,
            "F1 micro": micro,
            "F1 macro, tuned": macro_tuned,
            "F1 micro, tuned": micro_tuned,
            "mean AP": precision.mean(1),
            "top-3 recall": topk_recall(scores, targets, 3, weights),
            "top-5 recall": topk_recall(scores, targets, 5, weights),
        }
        columns = {
            "f1": f1[0],
            "f1_tuned": f1_tuned[0],
            "tuned_threshold": thresholds,
            "average_precision": precision[0],
        }
    return {name: value_and_interval(value) for name, value in values.items()}, columns


def probe_one(benchmark, features, label, size, args, device):
    """Fits a probe to features (N,D) of a benchmark and measures it. Writes the results of each
    attribute under the label, with its extreme pictures of size x size unless size is None.

    -> {measure: [value, low, high]}, what result.json records about the fit, and the probe"""
    train, val, test = benchmark.parts
    targets = benchmark.targets
    probe = fit_linear_probe(
        features[train], targets[train], features[val], targets[val], device=device
    )
    unconverged = probe.info["unconverged"]
    if unconverged > 0:
        say(f"warning: {benchmark.name}, {label}: {unconverged} fits have not converged")
    scores = probe.scores(features[test])
    val_scores = probe.scores(features[val])
    values, columns = measure(scores, targets[test], val_scores, targets[val], args.seed)
    tables.write_results(benchmark, label, probe.strength, scores, columns, size, args)
    strengths, counts = np.unique(probe.strength, return_counts=True)
    chosen = {f"{s:g}": int(count) for s, count in zip(strengths, counts, strict=True)}
    return values, {**probe.info, "strengths": chosen}, probe


# --------------------------------------------------------------------------------------------------
# The command


class Job(NamedTuple):
    """Features of a benchmark's N pictures, to be measured."""

    features: np.ndarray  # (N,D)
    size: int | None = None  # of the pictures to draw, pixels; None: draw none
    channels: int | None = None  # of the latents; None: the features are no latents
    seconds: float = 0.0  # processor seconds that the features took; those in the cache took none


def needs_probe(args):
    return bool(NEED_ATTRIBUTES.intersection(args.task)) or "classes" in args.task


def latent_job(benchmark, vae, args, device):
    """The features are the normalised posterior means of a VAE."""

    def encode(pictures):
        return vae.normalize(vae.encode(pictures)[0])

    begin = processor_seconds()
    size = vae.resolution
    dims = vae.channels * vae.latent_size**2
    encoder = vae.info["hash"][:12]
    latents = cached_features(benchmark, encoder, size, dims, encode, args, device)
    return Job(latents, size, vae.channels, processor_seconds() - begin)


def baseline_jobs(benchmark, vae, args, device):
    """{label: Job} of what a VAE's latents are compared with: pixels, and nothing at all."""

    def identity(pictures):
        return pictures

    dims = vae.channels * vae.latent_size**2
    # The largest square picture of at most as many numbers as the latents.
    side = max(1, min(vae.resolution, int((dims / 3) ** 0.5)))
    pixels = cached_features(benchmark, "pixels", side, 3 * side**2, identity, args, device)
    # Features that are all 0 leave only the biases to learn.
    zeros = np.zeros((len(benchmark.names), 1), np.float32)
    return {f"{dims} pixels": Job(pixels), "majority": Job(zeros)}


def prepare_jobs(paths, benchmarks, args, device):
    """Loads every VAE, and computes the features of all benchmarks' pictures.

    -> {(benchmark, label): Job}, where the label of a VAE's latents is its path; and {path: what
    result.json records about the VAE}"""
    jobs = {}
    about_vaes = {}
    for path in paths:
        vae = load_vae(path, device)
        dims = vae.channels * vae.latent_size**2
        about_vaes[path] = {
            **vae.config,
            "hash": vae.info["hash"],
            "dims": dims,
            "channels": vae.channels,
            "step": vae.info["step"],
        }
        say(
            f"VAE       {path}, {dims} dimensions at {vae.resolution} pixels, "
            f"hash {vae.info['hash']}"
        )
        for benchmark in benchmarks:
            jobs[benchmark, path] = latent_job(benchmark, vae, args, device)
            if needs_probe(args):
                baselines = baseline_jobs(benchmark, vae, args, device)
                for label, job in baselines.items():
                    jobs[benchmark, label] = job
    return jobs, about_vaes


def run_job(benchmark, label, job, args, device):
    """Everything that the tasks ask for -> {measure: [value] or [value, low, high]}, and what
    result.json records about how it was measured, with the processor seconds of each task."""
    values, about = {}, {}
    clock = Clock()
    if needs_probe(args):
        values, about, probe = probe_one(benchmark, job.features, label, job.size, args, device)
        clock.stop("probe")
    clock.spent["features"] = round(job.seconds, 2)
    about["processor_seconds"] = clock.spent
    has_attributes = benchmark.targets.ndim == 2
    # The single feature of the majority's prediction is always 0.
    has_codes = job.features.shape[1] > 1
    if "disentanglement" in args.task and has_attributes and has_codes:
        task_values, about["disentanglement"] = disentangle_one(benchmark, job.features, probe)
        values.update(task_values)
        clock.stop("disentanglement")
    # The rest is about latents only.
    if job.channels is None:
        return values, about
    if "editing" in args.task and has_attributes:
        vae = load_vae(label, device)
        task_values, about["editing"] = edit_one(
            benchmark, label, vae, job.features, probe, args, device
        )
        values.update(task_values)
        clock.stop("editing")
    for task, function in (("uniformity", uniformity), ("mixture", mixture)):
        if task in args.task:
            points = latent_points(job.features, job.channels, args.seed)
            task_values, about[task] = function(points, args.seed)
            values.update(task_values)
            clock.stop(task)
    return values, about


class Clock:
    """The processor seconds of one task after the other: spent, {task: seconds}."""

    def __init__(self):
        self.spent = {}
        self.begin = processor_seconds()

    def stop(self, task):
        """Counts what was spent since the last call to this task."""
        now = processor_seconds()
        self.spent[task] = round(now - self.begin, 2)
        self.begin = now


def disentangle_one(benchmark, features, probe):
    """DCI, SAP and MIG of features (N,D) -> {measure: [value]}, and what result.json records."""
    training, _, test = benchmark.parts
    _, deviation = mean_and_deviation(features[training], "cpu")
    return disentanglement(
        probe.weight.cpu().numpy(),
        deviation.numpy(),
        probe.scores(features[test]),
        features[test],
        benchmark.targets[test],
    )


def edit_one(benchmark, label, vae, latents, probe, args, device):
    """Edits the attributes of pictures in a VAE's flattened latents (N,D)
    -> {measure: [value]}, and what result.json records. label: the VAE's name in files."""
    side = vae.latent_size

    @torch.no_grad()
    def decode(edited):
        maps = edited.to(device).view(len(edited), vae.channels, side, side)
        return to_uint8(vae.decode(vae.denormalize(maps))).cpu()

    weight = probe.weight.cpu()
    return edit_attributes(benchmark, label, weight, latents, decode, vae.resolution, args, device)


def main():
    args = parse_arguments()
    args.task = args.task or ["attributes"]
    device = setup(args.device)
    paths = args.vae
    if not paths:
        newest = newest_result("vae.safetensors", "VAE", "python train_vae.py")
        paths = [os.path.dirname(newest)]
    fids = None
    if args.gfid:
        fids = correlation.read_gfid(args.gfid, paths)
    benchmarks = read_benchmarks(args)
    # A folder that cannot be written to is refused here, before hours of work.
    lock(args.out)
    jobs, about_vaes = prepare_jobs(paths, benchmarks, args, device)

    # The first process does the rest alone, and the others do not wait for it.
    is_first = rank() == 0
    if dist.is_initialized():
        dist.destroy_process_group()
    if not is_first:
        return

    results = {}
    fits = {}
    for (benchmark, label), job in jobs.items():
        values, about = run_job(benchmark, label, job, args, device)
        fits[f"{benchmark.name}, {label}"] = about
        for name, value in values.items():
            measures = results.setdefault(benchmark.name, {})
            measures.setdefault(name, {})[label] = value
    # Each label once, those of the VAEs first.
    labels = list(dict.fromkeys([*paths, *(label for _, label in jobs)]))
    say("\n".join(tables.lines_of_table(results, labels)))
    correlations = {}
    if fids is not None:
        correlations = correlation.report(results, fids, args.out, args.seed)
    result = {
        "results": results,
        "correlations": correlations,
        "fids": fids,
        "vaes": about_vaes,
        "benchmarks": {benchmark.name: benchmark.about for benchmark in benchmarks},
        "fits": fits,
        "arguments": vars(args),
        "provenance": provenance(),
    }
    write_json(os.path.join(args.out, "result.json"), result)
    say(f"done      {args.out}/result.json")


if __name__ == "__main__":
    run_main(main, "lower --train-images, or pass --device cpu")
