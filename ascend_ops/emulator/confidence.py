"""token_confidence and softmax_stats by the AscendC kernels, in the emulator.

Each function has the arguments of the operator of `torch.ops.lopa` that it stands for, a number of
vector cores, and a list that takes the reports of its launches. What the adapters of
`ascend_ops/torch` do on the host is done here in Python.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ascend_ops.emulator import module, run

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
METRICS = ("prob", "margin", "neg_entropy")


def _confidence(
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    metric: str,
    everything: bool,
    cores: int,
    reports: list[Any] | None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    **filters: Any,
) -> dict[str, torch.Tensor]:
    shape = logits.shape[:-1] if rows is None else rows.shape
    tiling = module().confidence_tiling(
        vocab=logits.shape[-1],
        logits_rows=math.prod(logits.shape[:-1]),
        rows=math.prod(shape),
        has_rows=rows is not None,
        has_seed=seed is not None,
        has_step=step is not None,
        metric=METRICS.index(metric),
        all=everything,
        cores=cores,
        **filters,
    )
    inputs = {"logits": logits, "rows": rows, "seed": seed, "step": step}
    floats = ("margin", "neg_entropy", "lse") if everything else ("score",)
    out = {"token": torch.empty(shape, dtype=torch.int64)}
    out |= {key: torch.empty(shape) for key in ("prob", *floats)}
    if not everything:
        out["unusable"] = torch.empty(shape, dtype=torch.int32)
    name = "softmax_stats" if everything else "token_confidence"
    run(f"lopa_{name}_{DTYPES[logits.dtype]}", inputs, out, tiling, reports)
    return out


def softmax_stats(
    logits: torch.Tensor,
    rows: torch.Tensor | None = None,
    *,
    cores: int = 40,
    reports: list[Any] | None = None,
    **filters: Any,
) -> tuple[torch.Tensor, ...]:
    """token, prob, margin, neg_entropy, lse."""
    return tuple(_confidence(logits, rows, "prob", True, cores, reports, **filters).values())


def token_confidence(
    logits: torch.Tensor,
    rows: torch.Tensor | None = None,
    *,
    metric: str = "prob",
    cores: int = 40,
    reports: list[Any] | None = None,
    **filters: Any,
) -> tuple[torch.Tensor, ...]:
    """token, prob, score, unusable."""
    return tuple(_confidence(logits, rows, metric, False, cores, reports, **filters).values())
