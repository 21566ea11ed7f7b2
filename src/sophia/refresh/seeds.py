"""Random streams of a Hessian pass, a pure function of (seed, step, rank, micro-batch, purpose).

Nothing has to be saved for an exact resume but the seed and the step, both of which live in the optimizer's
parameter groups; the ranks draw independent labels; the global generators are never touched.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator", "seed_for"]


def seed_for(*key: int | str) -> int:
    """Hash a key to a 63-bit seed. A cryptographic hash, so that neighbouring keys give unrelated streams.

    >>> seed_for(0, 10, "labels") == seed_for(0, 10, "labels")
    True
    >>> seed_for(0, 10, "labels") == seed_for(0, 11, "labels")
    False
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(device: torch.device, *key: int | str) -> torch.Generator:
    """Return a fresh generator on ``device`` whose stream depends on ``key`` alone."""
    return torch.Generator(device=device).manual_seed(seed_for(*key))
