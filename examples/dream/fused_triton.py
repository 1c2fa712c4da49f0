# mypy: allow-untyped-defs
"""The functions of `fused` as Triton kernels: one program a row, or a piece of one.

On sm_90 and later they are launched while the product before them still ends (programmatic
dependent launch), and wait for it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: columns of a program of SwiGLU, which needs no sum over its row
_PIECE = 2048


@triton.jit
def _add_rms_norm_kernel(
    residual, delta, weight, index, total, normed, eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, STORE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """grid (M,): row of the output."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    source = row
    if index is not None:
        source = tl.load(index + row).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    # Loaded before the sum that needs it, so that both reads are under way at once.
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    raw = tl.load(residual + source * HIDDEN + column, mask=inside, other=0.0)
    x = raw.to(tl.float32)
    if delta is not None:
        x += tl.load(delta + source * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)
        x = x.to(raw.dtype).to(tl.float32)
    if STORE:
        tl.store(total + row * HIDDEN + column, x.to(raw.dtype), mask=inside)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / HIDDEN + eps)
    unit = (x * inverse).to(raw.dtype).to(tl.float32)
    tl.store(normed + row * HIDDEN + column, (unit * scale).to(raw.dtype), mask=inside)


@triton.jit
def _swiglu_kernel(gate_up, out, INNER: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """grid (N, pieces of a row)."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INNER
    source = gate_up + row * (2 * INNER) + column
    gate_raw = tl.load(source, mask=inside, other=0.0)
    up = tl.load(source + INNER, mask=inside, other=0.0).to(tl.float32)
    gate = gate_raw.to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * INNER + column, value.to(gate_raw.dtype), mask=inside)


@functools.cache
def _launch_options(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda" or torch.version.hip is not None:
        return {"DEPENDENT": False}
    dependent = torch.cuda.get_device_capability(device)[0] >= 9
    return {"DEPENDENT": True, "launch_pdl": True} if dependent else {"DEPENDENT": False}


def add_rms_norm(
    residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    hidden = residual.shape[1]
    rows = residual.shape[0] if index is None else index.shape[0]
    normed = residual.new_empty(rows, hidden)
    store = delta is not None or index is not None
    total = torch.empty_like(normed) if store else residual
    block = triton.next_power_of_2(hidden)
    if rows > 0:
        _add_rms_norm_kernel[(rows,)](
            residual, delta, weight, index, total, normed, eps,
            HIDDEN=hidden, BLOCK=block, STORE=store, num_warps=max(1, min(8, block // 512)),
            **_launch_options(residual.device),
        )  # fmt: skip
    return total, normed


def swiglu(gate_up: Tensor) -> Tensor:
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    block = min(_PIECE, triton.next_power_of_2(inner))
    if rows > 0:
        grid = (rows, triton.cdiv(inner, block))
        _swiglu_kernel[grid](
            gate_up, out, INNER=inner, BLOCK=block, num_warps=4, **_launch_options(out.device)
        )
    return out
