"""Shapes that break kernels, shared with the benchmarks, and the tests' small helpers."""

from __future__ import annotations

import torch

# confidence: one element, vector and block edges, primes, GPT-2's and Qwen's vocabularies.
VOCABULARIES = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 1000, 8193, 50257, 152064)

# branch_attention: (batch, branches, window, q_heads, kv_heads, head_dim, capacity). One of
# everything, head dimensions beside the vector widths, tiles of 64 keys just missed and just
# passed, tasks of several branches and branches of several tasks.
ATTENTION = (
    (1, 1, 1, 1, 1, 16, 1),
    (2, 2, 5, 2, 2, 1, 9),
    (1, 2, 9, 3, 1, 37, 66),
    (2, 3, 7, 6, 2, 64, 70),
    (3, 16, 16, 4, 4, 32, 64),
    (1, 3, 33, 28, 4, 128, 130),
    (2, 1, 130, 5, 1, 80, 65),
    (1, 2, 17, 8, 1, 256, 70),
    (4, 3, 96, 6, 2, 64, 200),
)

# kv_cache: (layers, batch, branches, window, kv_heads, q_heads, head_dim, capacity)
CACHES = (
    (1, 1, 1, 1, 1, 1, 2, 1),
    (2, 3, 4, 7, 2, 6, 64, 40),
    (3, 2, 16, 33, 4, 4, 80, 64),
    (2, 2, 3, 16, 1, 5, 10, 20),
)


def close(actual: torch.Tensor, expected: torch.Tensor, absolute: float = 1e-37) -> None:
    """Within 1e-5, relative or `absolute`, compared in float64."""
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=1e-5, atol=absolute, equal_nan=False
    )


def random_logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers of standard deviation 4: probabilities from 1e-12 to nearly 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 4).to(dtype)


def integer(value: int) -> torch.Tensor:
    """A seed or step: int64 with one element."""
    return torch.tensor([value], dtype=torch.int64)
