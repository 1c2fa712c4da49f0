"""The operators as the AscendC kernels compute them, in the emulator, for the tests of their rooms.

Each function has the arguments of the operator of `torch.ops.lopa` that it stands for, and a number of
vector cores. What the adapters of `ascend_ops/torch` do on the host is done here in Python.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch

from ascend_ops import emulator
from ascend_ops.emulator import Tensor
from lopa_kernels import LopaConfig, LopaState, LopaStep

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
METRICS = ("prob", "margin", "neg_entropy")
REDUCTIONS = ("mean", "bottom", "group", "min")


@pytest.fixture(scope="session")
def ascend() -> ModuleType:
    """The emulator's module, built where it is out of date; no build is a failed test."""
    return emulator.module()


def launch(
    name: str,
    inputs: dict[str, torch.Tensor | None],
    outputs: dict[str, torch.Tensor],
    tiling: dict[str, Any],
    reports: list[Any] | None = None,
) -> None:
    """A launch of kernel `name`; its report is appended to `reports`."""
    tensors = [Tensor(key, "in", value) for key, value in inputs.items()]
    tensors += [Tensor(key, "out", value) for key, value in outputs.items()]
    report = emulator.launch(
        name, tensors, tiling["data"], workspace=tiling["workspace"], blocks=tiling["blocks"]
    )
    if reports is not None:
        reports.append(report)


def _confidence(
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    metric: str,
    everything: bool,
    cores: int,
    reports: list[Any] | None,
    **filters: Any,
) -> dict[str, torch.Tensor]:
    shape = logits.shape[:-1] if rows is None else rows.shape
    tiling = emulator.module().confidence_tiling(
        vocab=logits.shape[-1],
        logits_rows=math.prod(logits.shape[:-1]),
        rows=math.prod(shape),
        has_rows=rows is not None,
        metric=METRICS.index(metric),
        all=everything,
        cores=cores,
        **filters,
    )
    inputs = {"logits": logits, "rows": rows, "seed": None, "step": None}
    floats = ("margin", "neg_entropy", "lse") if everything else ("score",)
    out = {"token": torch.empty(shape, dtype=torch.int64)}
    out |= {key: torch.empty(shape) for key in ("prob", *floats)}
    if not everything:
        out["unusable"] = torch.empty(shape, dtype=torch.int32)
    name = "softmax_stats" if everything else "token_confidence"
    launch(f"{name}_{DTYPES[logits.dtype]}", inputs, out, tiling, reports)
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


def _least_count(share: float, block_size: int) -> int:
    return next(n for n in range(block_size + 2) if n > block_size or n / block_size >= share)


def reduce_tiling(reduction: str, fraction: float, group: int | None, alpha: float) -> Any:
    return emulator.module().Reduce(
        reduction=REDUCTIONS.index(reduction), fraction=fraction, group=group or 0, alpha=alpha
    )


def select_tiling(config: LopaConfig) -> Any:
    return emulator.module().Select(
        block_size=config.block_size,
        act_count=_least_count(config.tau_act, config.block_size),
        mask_id=config.mask_id,
        tau_conf=config.tau_conf,
        by_score=config.accept == "score",
        window=config.fallback == "window",
    )


def branch_step(
    token: torch.Tensor,
    prob: torch.Tensor,
    score: torch.Tensor,
    state: LopaState,
    config: LopaConfig,
    *,
    unusable: torch.Tensor | None = None,
    status: torch.Tensor | None = None,
    cores: int = 40,
    reports: list[Any] | None = None,
) -> LopaStep:
    B, K, W = state.tokens.shape
    slots, window = config.branches or K, config.window or W
    tiling = emulator.module().branch_step_tiling(
        batch=B,
        branches=K,
        window=W,
        next_branches=slots,
        next_window=window,
        has_unusable=unusable is not None,
        has_status=status is not None,
        shift=config.shift,
        force_anchor=config.force_anchor,
        add_count=_least_count(config.tau_add, config.block_size),
        max_blocks=config.max_new_tokens // config.block_size,
        eos_id=-1 if config.eos_id is None else config.eos_id,
        reduce=reduce_tiling(config.reduction, config.fraction, config.group, config.alpha),
        select=select_tiling(config),
    )
    inputs: dict[str, torch.Tensor | None] = {
        "token": token.contiguous(),
        "prob": prob.contiguous(),
        "score": score.contiguous(),
        "unusable": unusable,
        **{key: value.contiguous() for key, value in state._asdict().items()},
        "status_in": status,
    }
    shapes = {"tokens": (B, slots, window)} | dict.fromkeys(
        ("length", "creation", "eos"), (B, slots)
    )
    out = {
        f"next_{key}": torch.empty(shapes.get(key, (B,)), dtype=value.dtype)
        for key, value in state._asdict().items()
    }
    result = {
        "winner": torch.empty(B, dtype=torch.int32),
        "filled": torch.empty(B, dtype=torch.int32),
        "confidence": torch.empty(B, K),
        "committed": torch.empty(B, W, dtype=torch.int64),
        "status": torch.empty(B, dtype=torch.int32),
    }
    blocks = min(B, cores) or 1
    parameters = {"data": tiling, "workspace": 0, "blocks": blocks}
    launch("branch_step", inputs, out | result, parameters, reports)
    return LopaStep(LopaState(*out.values()), **result)
