"""Where the tests run an operator: a backend on a device. The same tests run on all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from lopa_kernels import _dispatch


@dataclass(frozen=True)
class Target:
    """A backend, and the device of its tensors."""

    backend: str
    device: str

    def to(self, values: Any) -> Any:
        """Tensors, also those in tuples, lists and dictionaries, on the device."""
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device), values)

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter: large shapes take too long."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}" if self.gpu else self.backend


def cpu(values: Any) -> Any:
    """The same values on the CPU."""
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, values)


def _kernels() -> list[Target]:
    targets = [Target("cpu", "cpu")]
    if _dispatch.interpreted() and _dispatch.why_absent("triton") is None:
        targets.append(Target("triton", "cpu"))
    elif torch.cuda.is_available():
        targets += [
            Target(backend, "cuda")
            for backend in ("cuda", "triton")
            if _dispatch.why_absent(backend) is None
        ]
    return targets


#: every backend but the reference
KERNELS = _kernels()
TARGETS = [Target("reference", "cpu"), *KERNELS]
GPU_TARGETS = [target for target in KERNELS if target.gpu]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def over(targets: list[Target]) -> pytest.MarkDecorator:
    """Parametrizes the argument `target`; skips where there is none."""
    return pytest.mark.parametrize("target", targets, ids=str)
