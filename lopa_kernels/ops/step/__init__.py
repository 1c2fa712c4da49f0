"""A round of LoPA as one operator, from logits or from ready statistics."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch

from lopa_kernels import _dispatch
from lopa_kernels._checks import (
    FLOATING,
    check_device,
    check_dtype,
    check_rank,
    check_shape,
    check_unit_stride,
)
from lopa_kernels._interop import accepts_dlpack
from lopa_kernels.config import LopaConfig
from lopa_kernels.ops.step import eager
from lopa_kernels.ops.step import fake as _fake
from lopa_kernels.ops.step import reference as _reference
from lopa_kernels.state import LopaState, LopaStep, check_state

__all__ = [
    "NeededRows",
    "branch_step",
    "branch_step_out",
    "lopa_step",
    "lopa_step_out",
    "needed_rows",
]

_ROUNDS = (
    "lopa_step",
    "lopa_step_out",
    "lopa_step_",
    "branch_step",
    "branch_step_out",
    "branch_step_",
)
_dispatch.native(*_ROUNDS, "needed_rows")
_dispatch.eager(*_ROUNDS, change=eager.schema)


class NeededRows(NamedTuple):
    """Which columns of a state need logits."""

    index: torch.Tensor  # type: ignore[assignment]
    """int64 [capacity]: flat columns (of B * K * W) to gather, in order; 0 beyond `count`."""
    rows: torch.Tensor
    """int32 [B, K, W]: column to row of the gathered logits, -1 where none is needed."""
    count: torch.Tensor  # type: ignore[assignment]
    """int32 [1]: rows needed; above the capacity, the last ones have no row."""


def _check_config(op: str, state: LopaState, config: LopaConfig) -> None:
    if not isinstance(config, LopaConfig):
        raise TypeError(f"{op}: config: expected a LopaConfig, got {type(config).__name__}")
    if config.window is None and state.tokens.shape[2] < config.block_size:
        raise ValueError(
            f"{op}: state.tokens: expected a window of at least block_size "
            f"({config.block_size}) columns, got {state.tokens.shape[2]}; "
            "or set config.window"
        )


def _check_logits(
    op: str,
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    seed: torch.Tensor | None,
    step: torch.Tensor | None,
    state: LopaState,
    config: LopaConfig,
) -> None:
    check_state(op, state)
    _check_config(op, state, config)
    device = state.tokens.device
    check_dtype(op, "logits", logits, FLOATING)
    check_device(op, "logits", logits, device)
    check_unit_stride(op, "logits", logits)
    if rows is None:
        check_rank(op, "logits", logits, 4)
        check_shape(op, "logits", logits, (*state.tokens.shape, logits.shape[-1]))
    else:
        check_rank(op, "logits", logits, 2)
        check_dtype(op, "rows", rows, torch.int32)
        check_shape(op, "rows", rows, state.tokens.shape)
        check_device(op, "rows", rows, device)
    if logits.shape[-1] < 1:
        raise ValueError(f"{op}: logits: expected a vocabulary, got shape {list(logits.shape)}")
    if config.temperature > 0 and seed is None:
        raise ValueError(f"{op}: seed: expected an int64 tensor with temperature > 0, got None")
    for name, value in (("seed", seed), ("step", step)):
        if value is not None:
            check_dtype(op, name, value, torch.int64)
            check_device(op, name, value, device)
            if value.numel() != 1:
                raise ValueError(
                    f"{op}: {name}: expected one element, got shape {list(value.shape)}"
                )


def _check_stats(
    op: str,
    token: torch.Tensor,
    prob: torch.Tensor,
    score: torch.Tensor,
    state: LopaState,
    config: LopaConfig,
) -> None:
    check_state(op, state)
    _check_config(op, state, config)
    shape, device = state.tokens.shape, state.tokens.device
    for name, value, dtype in (
        ("token", token, torch.int64),
        ("prob", prob, torch.float32),
        ("score", score, torch.float32),
    ):
        if value.dtype != dtype or value.shape != shape or value.device != device:
            check_dtype(op, name, value, dtype)
            check_shape(op, name, value, shape)
            check_device(op, name, value, device)


def _config_args(state: LopaState, config: LopaConfig) -> tuple[object, ...]:
    _, branches, window = state.tokens.shape
    return config.step_args(branches, window)


def _as_step(outputs: tuple[torch.Tensor, ...]) -> LopaStep:
    return LopaStep(LopaState(*outputs[:12]), *outputs[12:])


def _run_plain(
    op: str,
    backend: str | None,
    inputs: tuple[object, ...],
    state: LopaState,
    config: LopaConfig,
) -> LopaStep | None:
    """The round, if the call is a plain one and all is well (see :func:`_dispatch.plain_call`)."""
    run = _dispatch.plain_call(op, state[0], backend)
    if run is None or not isinstance(config, LopaConfig):
        return None
    try:
        outputs = run(*inputs, *state, eager.settings(config))
    except RuntimeError:
        return None
    # As _as_step, without a call of Python for each tuple.
    return _tuple(LopaStep, (_tuple(LopaState, outputs[:12]), *outputs[12:]))


def _run_plain_out(
    op: str,
    backend: str | None,
    inputs: tuple[object, ...],
    state: LopaState,
    config: LopaConfig,
    out: LopaStep,
) -> bool:
    """Whether the round is done, as :func:`_run_plain`."""
    following = out[0]
    in_place = following[0] is state[0]
    if in_place and following is not state and not all(map(operator.is_, following, state)):
        return False  # an error to word
    run = _dispatch.plain_call(op + ("_" if in_place else "_out"), state[0], backend)
    if run is None or not isinstance(config, LopaConfig):
        return False
    results = out[1:] if in_place else (*following, *out[1:])
    try:
        run(*inputs, *state, eager.settings(config), *results)
    except RuntimeError:
        return False
    return True


def _run_out(
    op: str,
    backend: str | None,
    inputs: tuple[object, ...],
    state: LopaState,
    arguments: tuple[object, ...],
    out: LopaStep,
) -> None:
    """Calls `op`_ where `out` holds the state itself, `op`_out otherwise."""
    in_place = out.state.tokens is state.tokens
    if in_place and any(a is not b for a, b in zip(out.state, state, strict=True)):
        raise ValueError(f"{op}: out: expected all tensors of the state, or none of them")
    run = _dispatch.implementation(
        op + ("_" if in_place else "_out"), state.tokens.device.type, backend
    )
    results = out[1:] if in_place else (*out.state, *out[1:])
    if backend == "reference" or (backend is None and _dispatch.get_backend() == "reference"):
        run(*inputs, *state, *arguments, *results)
    else:
        names = _RESULT_NAMES if in_place else (*_NEXT_NAMES, *_RESULT_NAMES)
        run(*inputs, *state, *arguments, **dict(zip(names, results, strict=True)))


_tuple = tuple.__new__
_NEXT_NAMES = tuple(f"next_{name}" for name in LopaState._fields)
_RESULT_NAMES = LopaStep._fields[1:]


@accepts_dlpack
def lopa_step(
    logits: torch.Tensor,
    state: LopaState,
    config: LopaConfig,
    rows: torch.Tensor | None = None,
    *,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    backend: str | None = None,
) -> LopaStep:
    """One round of LoPA: verify the branches, keep the best, fill it, and branch again.

    For each sequence that is not done: the statistics of every open column of every live branch;
    the confidence of each branch; the winner (ties: the lowest lookahead slot, the anchor last);
    its complete leading columns leave the window (`committed`); its confident columns are filled;
    the best open columns that are left make the next lookahead branches; blocks are opened.
    docs/operators.md has the rules one by one.

    Args:
        logits: bf16, fp16 or fp32 [B, K, W, V], or [R, V] with `rows`; unit stride on V. Only
            the rows that :func:`needed_rows` names are read.
        state: the round's state.
        config: its settings. ``config.branches`` and ``config.window`` are K and W of the next
            state.
        rows: int32 [B, K, W], the row of `logits` for each column.
        seed, step: int64, one element each: the key of the sampling (temperature > 0).
        backend: None for the default.

    Returns:
        LopaStep. Nothing is mutated.

    Raises:
        TypeError, ValueError: dtype, shape, device, stride or range of an argument. What only
            the values tell (a length beyond W, a NaN row) is reported in ``status``.

    Source: LoPA, arXiv 2512.16229, Algorithm 1 and sections 3.3-3.4.
    """
    inputs = (logits, rows, seed, step)
    if rows is None or logits.dim() == 2:  # the operator takes more shapes, which this does not
        made = _run_plain("lopa_step", backend, inputs, state, config)
        if made is not None:
            return made
    _check_logits("lopa_step", *inputs, state, config)
    run = _dispatch.implementation("lopa_step", state[0].device.type, backend)
    return _as_step(run(*inputs, *state, *_config_args(state, config), *config.sampling_args()))


@accepts_dlpack
def lopa_step_out(
    logits: torch.Tensor,
    state: LopaState,
    config: LopaConfig,
    out: LopaStep,
    rows: torch.Tensor | None = None,
    *,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """:func:`lopa_step` into existing tensors (see :func:`lopa_kernels.empty_step`).

    ``out.state`` may be `state` itself: then the state is updated in place, which needs K and W
    to stay as they are. Any other overlap of outputs and inputs is not supported.
    """
    inputs = (logits, rows, seed, step)
    if (rows is None or logits.dim() == 2) and _run_plain_out(
        "lopa_step", backend, inputs, state, config, out
    ):
        return
    _check_logits("lopa_step_out", *inputs, state, config)
    arguments = (*_config_args(state, config), *config.sampling_args())
    _run_out("lopa_step", backend, inputs, state, arguments, out)


@accepts_dlpack
def branch_step(
    token: torch.Tensor,
    prob: torch.Tensor,
    score: torch.Tensor,
    state: LopaState,
    config: LopaConfig,
    *,
    backend: str | None = None,
) -> LopaStep:
    """:func:`lopa_step` from ready statistics: what a branch-parallel decoder calls.

    Args:
        token: int64 [B, K, W], of each logits row (with ``config.shift``, row c speaks of column
            c + 1; the move is made here).
        prob, score: fp32 [B, K, W]. Only rows that :func:`needed_rows` names are read.
        state, config, backend: as for :func:`lopa_step`.

    Raises:
        TypeError, ValueError: dtype, shape or device of an argument.
    """
    inputs = (token, prob, score)
    made = _run_plain("branch_step", backend, inputs, state, config)
    if made is not None:
        return made
    _check_stats("branch_step", *inputs, state, config)
    run = _dispatch.implementation("branch_step", state[0].device.type, backend)
    return _as_step(run(*inputs, *state, *_config_args(state, config)))


@accepts_dlpack
def branch_step_out(
    token: torch.Tensor,
    prob: torch.Tensor,
    score: torch.Tensor,
    state: LopaState,
    config: LopaConfig,
    out: LopaStep,
    *,
    backend: str | None = None,
) -> None:
    """:func:`branch_step` into existing tensors, as :func:`lopa_step_out`."""
    inputs = (token, prob, score)
    if _run_plain_out("branch_step", backend, inputs, state, config, out):
        return
    _check_stats("branch_step_out", *inputs, state, config)
    _run_out("branch_step", backend, inputs, state, _config_args(state, config), out)


@accepts_dlpack
def needed_rows(
    state: LopaState,
    config: LopaConfig,
    capacity: int | None = None,
    *,
    backend: str | None = None,
) -> NeededRows:
    """The columns whose logits a round reads, so that the LM head runs on no others.

    ``lm_head(hidden.flatten(0, 2)[needed.index])`` and ``rows=needed.rows`` go into
    :func:`lopa_step`. The capacity fixes the shapes; nothing is read back to the host.

    Args:
        state, config: as for :func:`lopa_step`.
        capacity: rows to gather at most; None: B * K * W. A column beyond it has no row, and its
            sequence gets ``Status.MISSING_ROW`` in the round.
        backend: None for the default.

    Raises:
        TypeError, ValueError: dtype, shape or device of an argument; a negative capacity.
    """
    op = "needed_rows"
    check_state(op, state)
    batch, slots, window = state.tokens.shape
    if capacity is None:
        capacity = batch * slots * window
    if capacity < 0:
        raise ValueError(f"{op}: capacity: expected at least 0, got {capacity!r}")
    run = _dispatch.implementation(op, state[0].device.type, backend)
    return NeededRows(
        *run(
            state.tokens,
            state.length,
            state.branches,
            state.cache_len,
            state.commit_len,
            state.prompt_len,
            state.done,
            config.mask_id,
            config.shift,
            capacity,
        )
    )
