"""Shapes that break kernels, shared with the benchmarks, and the tests' small helpers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from targets import Target, cpu
from torch.utils._pytree import tree_map_only

# confidence: one element, vector and block edges, primes, GPT-2's and Qwen's vocabularies.
VOCABULARIES = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 1000, 8193, 50257, 152064)

# confidence: the edges of the tiles of 2048 that a draw goes by, and Qwen's vocabulary.
DRAW_VOCABULARIES = (1, 2047, 2048, 2049, 4096, 10000, 152064)

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


def skip_where_slow(target: Target, slow: bool) -> None:
    """Triton's interpreter takes a tenth of a second a row, and more for long ones and filters."""
    if target.interpreted and slow:
        pytest.skip("too long for Triton's interpreter")


def moved(values: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """Tensors, also those in tuples, lists and dictionaries, with their strides and offsets.

    (``Tensor.to`` makes most views contiguous.) What lies between the elements moves along.
    """

    def move(tensor: torch.Tensor) -> torch.Tensor:
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        storage = tensor.as_strided((elements,), (1,), 0).to(device, dtype)
        return storage.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    return tree_map_only(torch.Tensor, move, values)


def run_on(target: Target, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A public function on the target, of tensors of the CPU and back to it."""
    arguments, options = moved((arguments, options), target.device)
    return cpu(function(*arguments, **options, backend=target.backend))


def operator(target: Target, name: str) -> Callable[..., Any]:
    """The operator below the public function, of the target's backend."""
    library = torch.ops.lopa_triton if target.backend == "triton" else torch.ops.lopa
    return getattr(library, name).default


def chi_square_limit(degrees: int) -> float:
    """What a chi-square statistic passes once in a million times.

    By Wilson and Hilferty, "The distribution of chi-square", PNAS 17 (1931): its cube root is
    nearly normal.
    """
    variance = 2 / (9 * degrees)
    return degrees * (1 - variance + 4.753 * variance**0.5) ** 3


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


# confidence: one set of options for every way through the kernels
VOCABULARY_OPTIONS = [
    {"metric": "neg_entropy"},
    {"metric": "margin", "top_p": 0.9},
    {"temperature": 1.0, "seed": integer(6), "top_k": 1000},
    {"temperature": 0.3, "seed": integer(6)},
]
