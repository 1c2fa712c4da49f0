"""What lies between the matrix products: residual additions, RMSNorm, SwiGLU.

Each function is one kernel on a GPU and plain PyTorch on a CPU. Under torch.compile it is plain
PyTorch everywhere, which the compiler fuses with its neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_rms_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The new residual stream, and its normed rows.

    Args:
        residual: [N, H], contiguous: the stream, or the embedding table.
        delta: [N, H], contiguous, what is added to it; None: nothing.
        weight: [H], of the norm.
        eps: of the norm.
        index: int64 [M], the rows that are wanted; None: all in order (M = N).

    Returns:
        residual + delta and its RMSNorm, both [M, H] in the dtype of `residual`. The norm is
        formed in fp32 and rounded before the weight is applied, as the published models do.
        Without `delta` and `index` the first is `residual` itself.

    Source: RMSNorm, arXiv 1910.07467.
    """
    if residual.is_cuda and not torch.compiler.is_compiling():
        from examples.dream import fused_triton

        return fused_triton.add_rms_norm(residual, delta, weight, eps, index)
    if index is not None:
        residual = residual[index]
        delta = None if delta is None else delta[index]
    if delta is not None:
        residual = residual + delta
    x = residual.float()
    normed = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(residual.dtype)
    return residual, normed * weight


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up in fp32, from [N, 2 I] (gate, then up) to [N, I] in the same dtype.

    Source: arXiv 2002.05202.
    """
    if gate_up.is_cuda and not torch.compiler.is_compiling():
        from examples.dream import fused_triton

        return fused_triton.swiglu(gate_up)
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
