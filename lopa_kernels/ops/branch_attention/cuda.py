"""branch_attention on CUDA devices: which kernel runs.

``torch.ops.lopa.branch_attention*`` on a CUDA device is one operator of two kernels: the CUDA
kernel of compute capability 9.0 for what it takes, else Triton's. The choice is made where the
operator runs, by dtype, head_dim, strides and addresses; no value of a tensor is read.
"""

from __future__ import annotations

from typing import Any

import torch

from lopa_kernels import _dispatch, _load
from lopa_kernels._triton import check_rank

_library = torch.library.Library("lopa", "IMPL")

_COVERED = (
    "bf16 or fp16 of head_dim 64 or 128 with at most 32 branches and operands at multiples of 16 "
    "bytes on compute capability 9.0, or the package triton"
)


def _out(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    cache_len: torch.Tensor,
    length: torch.Tensor,
    prompt_len: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    mask: str = "full",
    block_size: int | None = None,
    scale: float | None = None,
    *,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    form: int = 2,
) -> None:
    inputs = (
        q, k_cache, v_cache, k_window, v_window, cache_len, length, prompt_len, block_table, mask,
        block_size, scale,
    )  # fmt: skip
    if torch.ops.lopa_cuda.branch_attention_out.default(*inputs, form, 0, 0, 0, out=out, lse=lse):
        return
    reason = _dispatch.why_absent("triton", "branch_attention_out")
    if reason is not None:
        raise RuntimeError(
            f"branch_attention: q: expected {_COVERED}, got {q.dtype} of head_dim {q.shape[-1]}; "
            f"{reason}"
        )
    from lopa_kernels.ops.branch_attention import triton

    triton.branch_attention_out(*inputs, out=out, lse=lse)


def _new_out(q: torch.Tensor) -> torch.Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _without_lse(q: torch.Tensor, *inputs: Any) -> torch.Tensor:
    out = _new_out(q)
    _out(q, *inputs, out=out, form=0)
    return out


def _with_lse(q: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    check_rank("branch_attention_lse", "q", q, 5)
    out = _new_out(q)
    batch, branches, window, q_heads = q.shape[:4]
    lse = torch.empty((batch, branches, q_heads, window), dtype=torch.float32, device=q.device)
    _out(q, *inputs, out=out, lse=lse, form=1)
    return out, lse


if "lopa_cuda" not in _load.missing:
    _library.impl("branch_attention", _without_lse, "CUDA")
    _library.impl("branch_attention_lse", _with_lse, "CUDA")
    _library.impl("branch_attention_out", _out, "CUDA")
