"""Random draws that depend on (seed, name of the draw, position of the sample) alone."""

import functools
import zlib

import numpy as np
import torch


def _mix(x):
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, None)):
        x = x ^ (
            (x >> shift) & ((1 << (64 - shift)) - 1)
        )  # >> on int64 is arithmetic: mask the sign
        x = x if factor is None else x * factor
    return x


def random_bits(seed, name, ids, n):
    """64 random bits as int64 (B,n) for sample ids (B,), a function of (seed, name, id, column)."""
    golden = -0x61C8864680B583EB  # 2^64 / golden ratio, odd
    start = (seed * 0x10001 + zlib.crc32(name.encode())) % 2**62
    key = _mix(_mix(ids.long() * golden + start) + zlib.crc32(name.encode()))
    return _mix(key[:, None] + golden * torch.arange(1, n + 1, device=ids.device))


def uniform(seed, name, ids):
    """(B,) uniform in (0,1), 24 bits."""
    return ((random_bits(seed, name, ids, 1)[:, 0] >> 40 & 0xFFFFFF).float() + 0.5) / 2**24


def normal(seed, name, ids, shape):
    """(B,*shape) standard normal, float32, by Box and Muller's transform."""
    count = int(np.prod(shape))
    bits = random_bits(seed, name, ids, (count + 1) // 2)
    radius = (
        -2 * (((bits >> 32 & 0xFFFFFFFF).float() + 0.5) / 2**32).clamp(max=1 - 2**-24).log()
    ).sqrt()
    angle = (bits & 0xFFFFFFFF).float() * (2 * np.pi / 2**32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count].view(
        len(ids), *shape
    )


@functools.lru_cache(2)
def epoch_order(seed, epoch, count):
    return np.random.default_rng([seed, epoch]).permutation(count)
