# mypy: allow-untyped-defs
"""Device code that the Triton rooms share."""

from __future__ import annotations

import triton
import triton.language as tl

from lopa_kernels import _dispatch

INTERPRETED = tl.constexpr(_dispatch.interpreted())


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 in another dtype, rounded to nearest even; the interpreter's own cast to bf16 cuts."""
    if INTERPRETED & (dtype == tl.bfloat16):
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        result = tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result
