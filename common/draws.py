"""Random draws that depend on nothing but (seed, name of the draw, position of the sample).

A sample gets the same noise, time and flip in any batch, on any number of processes and after a
resumption. No generator's state has to be saved: the bits are a hash of the three, by SplitMix64.
"""

import functools
import zlib

import numpy as np
import torch

# 2^64 / golden ratio as a signed 64-bit number: the increment of SplitMix64.
GOLDEN = -0x61C8864680B583EB


def _shift_right(x, bits):
    """int64 -> x >> bits, filled with zeros; torch's own >> fills with the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x):
    """int64 -> int64 of the same shape: the output function of SplitMix64 (Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators", 2014), with its factors as signed numbers."""
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift_right(x, 31)


def random_bits(seed, name, ids, n):
    """Sample ids (B,) -> 64 random bits as int64 (B,n), a function of (seed, name, id, column)."""
    name_hash = zlib.crc32(name.encode())
    start = (seed * 0x10001 + name_hash) % 2**62
    key = _mix(_mix(ids.long() * GOLDEN + start) + name_hash)  # (B,)
    columns = torch.arange(1, n + 1, device=ids.device)  # (n,)
    return _mix(key[:, None] + GOLDEN * columns)


def uniform(seed, name, ids):
    """Sample ids (B,) -> float32 (B,), uniform in (0,1), 24 bits."""
    bits = random_bits(seed, name, ids, 1)[:, 0]
    return ((bits >> 40 & 0xFFFFFF).float() + 0.5) / 2**24


def normal(seed, name, ids, shape):
    """Sample ids (B,) -> float32 (B,*shape), standard normal, by Box and Muller's transform."""
    count = int(np.prod(shape))
    # Every 64 bits give two normal numbers: the upper 32 their radius, the lower 32 their angle.
    bits = random_bits(seed, name, ids, (count + 1) // 2)  # (B, count/2 rounded up)
    u = ((bits >> 32 & 0xFFFFFFFF).float() + 0.5) / 2**32
    # float32 rounds the largest of these to 1, which is outside the open interval (0,1).
    u = u.clamp(max=1 - 2**-24)
    radius = (-2 * u.log()).sqrt()
    angle = (bits & 0xFFFFFFFF).float() * (2 * np.pi / 2**32)
    x = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
    return x[:, :count].view(len(ids), *shape)


# A batch may span two epochs, and their orders are asked for again and again.
@functools.lru_cache(2)
def epoch_order(seed, epoch, count):
    """-> int64 (count,): the order in which an epoch visits the `count` pictures of a set."""
    return np.random.default_rng([seed, epoch]).permutation(count)
