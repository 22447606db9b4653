"""A generator of its own for each parameter, so that its values depend on nothing else."""

from __future__ import annotations

import hashlib

import torch


def generator_of(name: str, seed: int) -> torch.Generator:
    """The CPU generator that parameter ``name`` starts from."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
