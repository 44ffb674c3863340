"""The shape of a VAE's latent space, for probe.py: how evenly points fill it, and how far they are from one Gaussian."""

import numpy as np
from scipy.special import logsumexp
from scipy.stats import gaussian_kde, multivariate_normal


def gini(values):
    """0: all values are equal; towards 1: one has everything. Mean absolute difference over twice the mean."""
    x = np.sort(np.asarray(values, np.float64).ravel())
    return float(((2 * np.arange(1, len(x) + 1) - len(x) - 1) * x).sum() / (len(x) * x.sum()))


def latent_points(x, channels, seed, count=10000):
    """One position of each of `count` pictures, seeded -> principal components (count,C), each of variance 1."""
    rng = np.random.default_rng(seed)
    picture = np.sort(rng.permutation(len(x))[:count])
    place = rng.integers(0, x.shape[1] // channels, len(picture))
    points = (
        x[picture]
        .reshape(len(picture), channels, -1)[np.arange(len(picture)), :, place]
        .astype(np.float64)
    )
    points -= points.mean(0)
    values, axes = np.linalg.eigh(points.T @ points / len(points))
    return (points @ axes / np.sqrt(values.clip(1e-12)))[:, ::-1].copy()


def uniformity(points, seed):
    """Gini coefficient of a Gaussian KDE's density at its own points, in the plane of the first two principal
    components; bandwidth by Scott's rule. Low: the points are spread evenly."""
    kde = gaussian_kde(points[:, :2].T)
    about = dict(points=len(points), plane="PCA, whitened", dims=2, bandwidth=float(kde.factor))
    return {"Gini of density": [gini(kde(points[:, :2].T))]}, about


def mixture(points, seed, counts=(1, 2, 4, 8, 16, 32), steps=100):
    """Gaussian mixtures of full covariance, by EM from seeded points of four fifths -> the others' mean log-likelihood
    a dimension, less that of one Gaussian. The more, the less Gaussian the latents are."""
    points, found = np.random.default_rng(seed).permutation(points), {}
    (train, test), dims = np.split(points, [len(points) * 4 // 5]), points.shape[1]

    def log_joint(x):  # log(share_k N(x_n; mean_k, covariance_k)), (n,K)
        return np.stack([np.log(s) + multivariate_normal.logpdf(x, m, c) for s, m, c in model], 1)

    for k in (c for c in counts if c * 20 <= len(train)):
        model, last = [(1 / k, mean, np.eye(dims)) for mean in train[:k]], -np.inf
        for _ in range(steps):
            joint = log_joint(train)
            total = logsumexp(joint, 1)
            if total.mean() - last < 1e-5:
                break
            weights, last = np.exp(joint.T - total) + 1e-9, total.mean()  # (K,n)
            model = [
                (
                    w.mean(),
                    np.average(train, 0, w),
                    np.cov(train.T, aweights=w, ddof=0) + 1e-3 * np.eye(dims),
                )
                for w in weights
            ]
        found[k] = float(logsumexp(log_joint(test), 1).mean()) / dims
    gains = {f"mixture of {k}": [v - found[1]] for k, v in found.items() if k > 1}
    return gains, dict(points=len(train), held_out=len(test), dims=dims, log_likelihood=found)
