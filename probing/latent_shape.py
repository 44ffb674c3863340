"""The shape of a VAE's latent space, for probe.py: how evenly the latents fill it, and how far
their distribution is from one Gaussian."""

import numpy as np
from scipy.special import logsumexp
from scipy.stats import gaussian_kde, multivariate_normal


def latent_points(latents, channels, seed, count=10000):
    """The latents at one random position of each of at most `count` pictures, in the axes of their
    principal components.

    latents: flattened, (N, C*h*w), of C channels
    -> float64 (n,C), with mean 0 and variance 1 along each component, in order of falling variance
    of the latents"""
    rng = np.random.default_rng(seed)
    pictures = np.sort(rng.permutation(len(latents))[:count])
    n = len(pictures)
    positions = rng.integers(0, latents.shape[1] // channels, n)
    maps = latents[pictures].reshape(n, channels, -1)  # (n,C,h*w)
    points = maps[np.arange(n), :, positions].astype(np.float64)  # (n,C)
    points -= points.mean(0)
    variances, axes = np.linalg.eigh(points.T @ points / n)
    # eigh gives the variances in rising order.
    return (points @ axes / np.sqrt(variances.clip(1e-12)))[:, ::-1].copy()


# --------------------------------------------------------------------------------------------------
# How evenly the latents are spread


def gini(values):
    """Gini coefficient: the mean absolute difference over twice the mean. It is 0 if all values are
    equal, and approaches 1 if one value is everything."""
    x = np.sort(np.asarray(values, np.float64).ravel())
    n = len(x)
    ranks = np.arange(1, n + 1)
    return float(((2 * ranks - n - 1) * x).sum() / (n * x.sum()))


def uniformity(points, seed):
    """Gini coefficient of the density at each point, in the plane of the first two principal
    components. The density is a Gaussian KDE with Scott's bandwidth. The lower, the more evenly the
    points are spread (VA-VAE, arXiv:2501.01423, does so in a plane made by t-SNE).

    points: float64 (n,C) of latent_points. seed: not used; `mixture` has the same arguments.
    -> {measure: [value]}, and what result.json records about it"""
    plane = points[:, :2].T
    kde = gaussian_kde(plane)
    about = {
        "points": len(points),
        "plane": "PCA, whitened",
        "dims": 2,
        "bandwidth": float(kde.factor),
    }
    return {"Gini of density": [gini(kde(plane))]}, about


# --------------------------------------------------------------------------------------------------
# How far the latents are from one Gaussian


def log_joint(points, components):
    """log(share_k N(x_n; mean_k, covariance_k)) of points (n,C) and K components, (n,K)."""
    columns = []
    for share, mean, covariance in components:
        density = multivariate_normal.logpdf(points, mean, covariance)
        columns.append(np.log(share) + density)
    return np.stack(columns, 1)


def fit_mixture(points, k, steps):
    """Expectation maximisation of a mixture of k Gaussians with full covariance, from the first k
    of the points (n,C) as means and unit covariances, for at most `steps` steps.

    -> list of k components (share, mean (C,), covariance (C,C))"""
    dims = points.shape[1]
    components = [(1 / k, mean, np.eye(dims)) for mean in points[:k]]
    last = -np.inf
    for _ in range(steps):
        # Expectation: the share of each component in each point, kept above 0.
        joint = log_joint(points, components)
        log_density = logsumexp(joint, 1)  # (n,)
        if log_density.mean() - last < 1e-5:
            break
        last = log_density.mean()
        responsibilities = np.exp(joint.T - log_density) + 1e-9  # (k,n)
        # Maximisation. The ridge keeps a component from shrinking to one point.
        components = []
        for weights in responsibilities:
            mean = np.average(points, 0, weights)
            covariance = np.cov(points.T, aweights=weights, ddof=0) + 1e-3 * np.eye(dims)
            components.append((weights.mean(), mean, covariance))
    return components


def mixture(points, seed, counts=(1, 2, 4, 8, 16, 32), steps=100):
    """How much better mixtures of Gaussians fit than one Gaussian. They are fitted to a seeded four
    fifths of the points; the measure is the mean log-likelihood of the others per dimension, less
    that of one Gaussian, in nats. The higher, the further the latents are from one Gaussian.

    points: float64 (n,C) of latent_points. counts: numbers of components; those with fewer than 20
    points a component are left out.
    -> {measure: [value]}, and what result.json records about it"""
    points = np.random.default_rng(seed).permutation(points)
    train, test = np.split(points, [len(points) * 4 // 5])
    dims = points.shape[1]
    log_likelihood = {}
    for k in counts:
        if k * 20 <= len(train):
            components = fit_mixture(train, k, steps)
            log_density = logsumexp(log_joint(test, components), 1)
            log_likelihood[k] = float(log_density.mean()) / dims
    gains = {}
    for k, value in log_likelihood.items():
        if k > 1:
            gains[f"mixture of {k}"] = [value - log_likelihood[1]]
    about = {
        "points": len(train),
        "held_out": len(test),
        "dims": dims,
        "log_likelihood": log_likelihood,
    }
    return gains, about
