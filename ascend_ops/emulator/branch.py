"""The branch room and the round by the AscendC kernels, in the emulator.

As for :mod:`ascend_ops.emulator.confidence`.
"""

from __future__ import annotations

from typing import Any

import torch

from ascend_ops.emulator import module, run
from ascend_ops.emulator.confidence import token_confidence
from lopa_kernels import LopaConfig, LopaState, LopaStep

REDUCTIONS = ("mean", "bottom", "group", "min")


def _least_count(share: float, block_size: int) -> int:
    return next(n for n in range(block_size + 2) if n > block_size or n / block_size >= share)


def reduce_tiling(reduction: str, fraction: float, group: int | None, alpha: float) -> Any:
    return module().Reduce(
        reduction=REDUCTIONS.index(reduction), fraction=fraction, group=group or 0, alpha=alpha
    )


def select_tiling(config: LopaConfig) -> Any:
    return module().Select(
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
    in_place: bool = False,
    cores: int = 40,
    reports: list[Any] | None = None,
) -> LopaStep:
    """With `in_place` the next state is the memory of the state."""
    B, K, W = state.tokens.shape
    slots, window = config.branches or K, config.window or W
    tiling = module().branch_step_tiling(
        batch=B,
        branches=K,
        window=W,
        next_branches=slots,
        next_window=window,
        has_unusable=unusable is not None,
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
    }
    shapes = dict.fromkeys(("length", "creation", "eos"), (B, slots)) | {
        "tokens": (B, slots, window)
    }
    out = {
        f"next_{key}": value if in_place else torch.empty(shapes.get(key, (B,)), dtype=value.dtype)
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
    run("lopa_branch_step", inputs, out | result, parameters, reports)
    return LopaStep(LopaState(*out.values()), **result)


def _rows_tiling(state: LopaState, config: LopaConfig, given: bool, capacity: int) -> bytes:
    B, K, W = state.tokens.shape
    data: bytes = module().rows_tiling(
        batch=B,
        branches=K,
        window=W,
        shift=config.shift,
        has_given=given,
        mask_id=config.mask_id,
        capacity=capacity,
    )
    return data


def _rows_inputs(state: LopaState) -> dict[str, torch.Tensor | None]:
    names = ("tokens", "length", "branches", "cache_len", "commit_len", "prompt_len", "done")
    return {name: getattr(state, name).contiguous() for name in names}


def step_rows(
    state: LopaState, config: LopaConfig, given: torch.Tensor | None = None, *, cores: int = 40
) -> torch.Tensor:
    """The row of logits of each column that the round needs, -1 elsewhere."""
    wanted = torch.empty(state.tokens.shape, dtype=torch.int32)
    data = _rows_tiling(state, config, given is not None, 0)
    parameters = {"data": data, "workspace": 0, "blocks": min(len(state.tokens), cores)}
    inputs = _rows_inputs(state) | {"given_rows": given}
    run("lopa_step_rows", inputs, {"wanted": wanted}, parameters)
    return wanted


def needed_rows(
    state: LopaState, config: LopaConfig, capacity: int | None = None, *, cores: int = 40
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    capacity = state.tokens.numel() if capacity is None else capacity
    out = {
        "index": torch.empty(capacity, dtype=torch.int64),
        "rows": torch.empty(state.tokens.shape, dtype=torch.int32),
        "count": torch.empty(1, dtype=torch.int32),
    }
    blocks = min(len(state.tokens), cores)
    data = _rows_tiling(state, config, False, capacity)
    parameters = {"data": data, "workspace": 32 * blocks, "blocks": blocks}
    run("lopa_needed_rows", _rows_inputs(state), out, parameters)
    return out["index"], out["rows"], out["count"]


def lopa_step(
    logits: torch.Tensor,
    state: LopaState,
    config: LopaConfig,
    rows: torch.Tensor | None = None,
    *,
    cores: int = 40,
    reports: list[Any] | None = None,
) -> LopaStep:
    """The composite: the rows that the round needs, their statistics, the round."""
    wanted = step_rows(state, config, rows, cores=cores)
    *statistics, unusable = token_confidence(
        logits, wanted, metric=config.metric, cores=cores, reports=reports
    )
    return branch_step(*statistics, state, config, unusable=unusable, cores=cores, reports=reports)


def branch_confidence(
    score: torch.Tensor,
    open: torch.Tensor,
    creation: torch.Tensor,
    branches: torch.Tensor | None,
    length: torch.Tensor | None,
    reduction: str,
    fraction: float,
    group: int | None,
    alpha: float,
    *,
    cores: int = 40,
) -> torch.Tensor:
    B, K, W = score.shape
    data = module().branch_confidence_tiling(
        batch=B,
        branches=K,
        window=W,
        has_branches=branches is not None,
        has_length=length is not None,
        reduce=reduce_tiling(reduction, fraction, group, alpha),
    )
    inputs = {
        "score": score,
        "open": open,
        "creation": creation,
        "branches": branches,
        "length": length,
    }
    out = {"confidence": torch.empty(B, K)}
    parameters = {"data": data, "workspace": 0, "blocks": min(B * K, cores)}
    run("lopa_branch_confidence", inputs, out, parameters)
    return out["confidence"]


def select_positions(
    token: torch.Tensor,
    prob: torch.Tensor,
    score: torch.Tensor,
    tokens: torch.Tensor,
    length: torch.Tensor,
    cache_len: torch.Tensor,
    prompt_len: torch.Tensor,
    lookahead: int,
    config: LopaConfig,
    *,
    cores: int = 40,
) -> tuple[torch.Tensor, ...]:
    """fill, columns, filled."""
    B, W = tokens.shape
    data = module().select_positions_tiling(
        batch=B, window=W, lookahead=lookahead, select=select_tiling(config)
    )
    inputs = {"token": token, "prob": prob, "score": score, "tokens": tokens, "length": length}
    inputs |= {"cache_len": cache_len, "prompt_len": prompt_len}
    out = {
        "fill": torch.empty(B, W, dtype=torch.bool),
        "columns": torch.empty(B, lookahead, dtype=torch.int32),
        "filled": torch.empty(B, dtype=torch.int32),
    }
    parameters = {"data": data, "workspace": 0, "blocks": min(B, cores)}
    run("lopa_select_positions", dict(inputs), out, parameters)
    return tuple(out.values())


def spawn_branches(
    tokens: torch.Tensor,
    eos: torch.Tensor,
    token: torch.Tensor,
    score: torch.Tensor,
    columns: torch.Tensor,
    eos_id: int,
    *,
    cores: int = 40,
) -> tuple[torch.Tensor, ...]:
    """tokens, creation, eos, branches."""
    B, W = tokens.shape
    K = columns.shape[1] + 1
    data = module().spawn_branches_tiling(batch=B, branches=K, window=W, eos_id=eos_id)
    inputs = {"tokens": tokens, "eos": eos, "token": token, "score": score, "columns": columns}
    out = {
        "out_tokens": torch.empty(B, K, W, dtype=torch.int64),
        "out_creation": torch.empty(B, K),
        "out_eos": torch.empty(B, K, dtype=torch.bool),
        "out_branches": torch.empty(B, dtype=torch.int32),
    }
    parameters = {"data": data, "workspace": 0, "blocks": min(B, cores)}
    run("lopa_spawn_branches", dict(inputs), out, parameters)
    return tuple(out.values())
