"""The step room in Triton: arguments, memory and launches; device code is in triton_*.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from lopa_kernels._dispatch import implements_triton
from lopa_kernels._triton import (
    MAX_INT32,
    MAX_WINDOW,
    check_at_least,
    check_at_most,
    check_share,
    check_tensor,
    fail,
    launch_options,
    on_device,
    power_of_two,
)
from lopa_kernels.config import ACCEPTS, FALLBACKS
from lopa_kernels.ops.branch.triton import (
    block_tile,
    check_reduction,
    check_selection,
    double_bits,
    least_count,
    reduction_code,
    single,
)
from lopa_kernels.ops.confidence.triton import check_vocabulary, vocabulary_statistics
from lopa_kernels.ops.step.triton_round import round_kernel
from lopa_kernels.ops.step.triton_rows import count_needed_kernel, list_needed_kernel
from lopa_kernels.state import LopaState, LopaStep

Tensors = tuple[torch.Tensor, ...]

# Elements of a tile of branches; of what is written or added up along the batch.
MAX_TILE = 4096
LIST_TILE = 256

#: fields of the state and the results, as the out forms name them
_NEXT_NAMES = tuple(f"next_{name}" for name in LopaState._fields)
_RESULT_NAMES = LopaStep._fields[1:]

#: arguments of the state and of the round's settings in the schemas
_STATE_ARGUMENTS = len(LopaState._fields)
_CONFIG_ARGUMENTS = 17

_STATE_DTYPES = (
    torch.int64,
    torch.int32,
    torch.float32,
    torch.bool,
    *(torch.int32,) * 4,
    torch.int64,
    torch.float32,
    torch.float32,
    torch.bool,
)
_RESULT_DTYPES = (torch.int32, torch.int32, torch.float32, torch.int64, torch.int32)

#: the fields of the state that say which rows a round reads
_ROW_NAMES = ("tokens", "length", "branches", "cache_len", "commit_len", "prompt_len", "done")
_ROW_FIELDS = tuple(LopaState._fields.index(name) for name in _ROW_NAMES)


def _tile_slots(slots: int, columns: int) -> int:
    return min(power_of_two(slots), max(MAX_TILE // columns, 1))


def _state_shapes(batch: int, slots: int, window: int) -> list[tuple[int, ...]]:
    return [(batch, slots, window), *((batch, slots),) * 3, *((batch,),) * (_STATE_ARGUMENTS - 4)]


def _result_shapes(batch: int, slots: int, window: int) -> list[tuple[int, ...]]:
    return [(batch,), (batch,), (batch, slots), (batch, window), (batch,)]


@functools.lru_cache
def _check_config(op: str, config: tuple[Any, ...]) -> None:
    slots, window, tau_conf, tau_add, tau_act, block_size, max_new_tokens = config[:7]
    check_at_least(op, "out_branches", slots, 1)
    check_at_least(op, "block_size", block_size, 1)
    check_at_least(op, "out_window", window, block_size)
    check_at_least(op, "max_new_tokens", max_new_tokens, block_size)
    check_share(op, "tau_add", tau_add)
    accept, fallback, reduction, fraction, group, alpha = config[9:15]
    check_selection(op, tau_conf, tau_act, block_size, accept, fallback)
    check_reduction(op, reduction, fraction, group, alpha)
    check_at_most(op, "out_window", window, MAX_WINDOW)


def _check_sizes(op: str, batch: int, slots: int, window: int) -> None:
    check_at_most(op, "columns of tokens", window, MAX_WINDOW)
    check_at_most(op, "elements of tokens", batch * slots * window, MAX_INT32)


def _check_tensors(
    op: str,
    names: Sequence[str],
    tensors: Tensors,
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
) -> None:
    for name, tensor, dtype, shape in zip(names, tensors, dtypes, shapes, strict=True):
        check_tensor(op, name, tensor, dtype, shape, device)


def _check_state(op: str, state: Tensors, config: tuple[Any, ...]) -> None:
    _check_config(op, config)
    if state[0].dim() != 3:
        fail(op, "tokens", "shape [B, K, W]", list(state[0].shape))
    batch, slots, window = state[0].shape
    check_at_least(op, "branches of tokens", slots, 1)
    check_at_least(op, "columns of tokens", window, 1)
    shapes = _state_shapes(batch, slots, window)
    _check_tensors(op, LopaState._fields, state, _STATE_DTYPES, shapes, state[0].device)
    _check_sizes(op, batch, slots, window)
    check_at_most(op, "elements of next_tokens", batch * config[0] * config[1], MAX_INT32)


def _allocate(state: Tensors, config: tuple[Any, ...]) -> Tensors:
    """The next state and the results."""
    device = state[0].device
    batch = state[0].shape[0]
    shapes = _state_shapes(batch, *config[:2]) + _result_shapes(*state[0].shape)
    return tuple(
        torch.empty(shape, dtype=dtype, device=device)
        for shape, dtype in zip(shapes, _STATE_DTYPES + _RESULT_DTYPES, strict=True)
    )


def _given(op: str, state: Tensors, config: tuple[Any, ...], out: dict[str, Any]) -> Tensors:
    """The caller's tensors for the next state (or the state's own) and the results."""
    batch, slots, window = state[0].shape
    device = state[0].device
    results = tuple(out[name] for name in _RESULT_NAMES)
    in_place = len(out) == len(results)
    if in_place:
        if config[:2] != (slots, window):
            expected = f"{slots}, {window} for an in-place step"
            fail(op, "out_branches, out_window", expected, f"{config[0]}, {config[1]}")
        following = state
    else:
        following = tuple(out[name] for name in _NEXT_NAMES)
        shapes = _state_shapes(batch, *config[:2])
        _check_tensors(op, _NEXT_NAMES, following, _STATE_DTYPES, shapes, device)
    shapes = _result_shapes(batch, slots, window)
    _check_tensors(op, _RESULT_NAMES, results, _RESULT_DTYPES, shapes, device)
    outputs = following + results
    if not all(tensor.is_contiguous() for tensor in outputs):
        fail(op, "outputs", "contiguous tensors", "strided")
    return outputs


def _run_round(
    statistics: Tensors,
    listed: Tensors | None,
    state: Tensors,
    config: tuple[Any, ...],
    outputs: Tensors,
) -> None:
    """Launches the round from statistics by logits row, [B, K, W]; `outputs` may hold the state.

    Or from statistics of a list of rows: `listed` then has their flags, and places [B, K, W].
    """
    (
        next_slots,
        next_window,
        tau_conf,
        tau_add,
        tau_act,
        block_size,
        max_new_tokens,
        mask_id,
        eos_id,
        accept,
        fallback,
        reduction,
        fraction,
        group,
        alpha,
        shift,
        force_anchor,
    ) = config
    batch, slots, window = state[0].shape
    if batch == 0:
        return
    columns, next_columns = power_of_two(window), power_of_two(next_window)
    tile_slots = _tile_slots(slots, columns)
    blocks, span = block_tile(block_size, window)
    score = statistics[2]
    scratch = score
    if reduction == "group":
        scratch = torch.empty((batch, slots, window), dtype=torch.float32, device=score.device)
    with on_device(score):
        round_kernel[(batch,)](
            *state,
            *statistics,
            *(listed or (score, score)),
            *outputs,
            scratch,
            slots,
            window,
            next_slots,
            next_window,
            block_size,
            mask_id,
            eos_id,
            single(tau_conf),
            least_count(tau_act, block_size),
            least_count(tau_add, block_size),
            min(max_new_tokens // block_size, 2**31 - 1),
            group or 1,
            double_bits(fraction),
            double_bits(alpha),
            ACCEPTS.index(accept),
            FALLBACKS.index(fallback),
            int(force_anchor),
            SHIFT=int(shift),
            LISTED=listed is not None,
            REDUCTION=reduction_code(reduction, fraction),
            SLOTS=tile_slots,
            WINDOW=columns,
            BLOCKS=blocks,
            SPAN=span,
            ALL_SLOTS=power_of_two(max(slots, next_slots)),
            NEXT_SLOTS=_tile_slots(next_slots, next_columns),
            NEXT_WINDOW=next_columns,
            enable_fp_fusion=False,
            **launch_options(score.device, tile_slots * columns),
        )


def _from_statistics(op: str, args: tuple[Any, ...], out: dict[str, Any] | None) -> Tensors:
    state, config = args[3 : 3 + _STATE_ARGUMENTS], args[3 + _STATE_ARGUMENTS :]
    _check_state(op, state, config)
    outputs = _allocate(state, config) if out is None else _given(op, state, config, out)
    names, dtypes = ("token", "prob", "score"), (torch.int64, torch.float32, torch.float32)
    shapes = [tuple(state[0].shape)] * 3
    _check_tensors(op, names, args[:3], dtypes, shapes, state[0].device)
    statistics = tuple(tensor.contiguous() for tensor in args[:3])
    state = tuple(tensor.contiguous() for tensor in state)
    _run_round(statistics, None, state, config, outputs)
    return outputs


def _from_logits(op: str, args: tuple[Any, ...], out: dict[str, Any] | None) -> Tensors:
    logits, rows, seed, step = args[:4]
    state = args[4 : 4 + _STATE_ARGUMENTS]
    config = args[4 + _STATE_ARGUMENTS :][:_CONFIG_ARGUMENTS]
    sampling = args[4 + _STATE_ARGUMENTS + _CONFIG_ARGUMENTS :]
    _check_state(op, state, config)
    outputs = _allocate(state, config) if out is None else _given(op, state, config, out)
    batch, slots, window = shape = tuple(state[0].shape)
    device = state[0].device
    if rows is not None:
        check_tensor(op, "rows", rows, torch.int32, shape, device)
    elif logits.dim() != 4 or logits.shape[:3] != shape:
        expected = f"shape [{batch}, {slots}, {window}, V], or rows"
        fail(op, "logits", expected, f"shape {list(logits.shape)}")
    check_vocabulary(op, device, logits, None, seed, step, *sampling)
    state = tuple(tensor.contiguous() for tensor in state)
    total = batch * slots * window
    if total == 0:
        return outputs
    wanted = torch.empty((total,), dtype=torch.int32, device=device)
    places = torch.empty((batch, slots, window), dtype=torch.int32, device=device)
    count = torch.empty((1,), dtype=torch.int32, device=device)
    fields = tuple(state[i] for i in _ROW_FIELDS)
    logits_rows = math.prod(logits.shape[:-1])
    mask_id, shift = config[7], config[15]
    _list_rows(fields, rows, wanted, places, count, total, logits_rows, mask_id, shift)
    *statistics, flags = vocabulary_statistics(
        op, logits, wanted, count, total, seed, step, *sampling
    )
    _run_round(tuple(statistics), (flags, places), state, config, outputs)
    return outputs


def _list_rows(
    fields: Tensors,
    named: torch.Tensor | None,
    listed: torch.Tensor,
    places: torch.Tensor,
    count: torch.Tensor,
    capacity: int,
    logits_rows: int,
    mask_id: int,
    shift: bool,
) -> None:
    """Launches :func:`list_needed_kernel`, after a count where there are several sequences.

    `listed` int64 takes slots, int32 rows of logits.
    """
    tokens = fields[0]
    batch, slots, window = tokens.shape
    columns = power_of_two(window)
    tile_slots = _tile_slots(slots, columns)
    counts = count
    options = {
        "SLOTS": tile_slots,
        "WINDOW": columns,
        **launch_options(tokens.device, tile_slots * columns),
    }
    with on_device(tokens):
        if batch > 1:
            counts = torch.empty((batch,), dtype=torch.int32, device=tokens.device)
            count_needed_kernel[(batch,)](
                fields, counts, slots, window, mask_id, int(shift), **options
            )
        list_needed_kernel[(max(batch, 1),)](
            fields,
            counts,
            listed if named is None else named.contiguous(),
            listed,
            places,
            count,
            batch,
            slots,
            window,
            mask_id,
            int(shift),
            capacity,
            logits_rows,
            TILE=LIST_TILE,
            COUNTED=batch != 1,
            SLOT_LIST=listed.dtype == torch.int64,
            NAMED=named is not None,
            **options,
        )


@implements_triton("branch_step")
def branch_step(*args: Any) -> Tensors:
    return _from_statistics("branch_step", args, None)


@implements_triton("branch_step_out")
def branch_step_out(*args: Any, **out: Any) -> None:
    _from_statistics("branch_step_out", args, out)


@implements_triton("branch_step_")
def branch_step_(*args: Any, **out: Any) -> None:
    _from_statistics("branch_step_", args, out)


@implements_triton("lopa_step")
def lopa_step(*args: Any) -> Tensors:
    return _from_logits("lopa_step", args, None)


@implements_triton("lopa_step_out")
def lopa_step_out(*args: Any, **out: Any) -> None:
    _from_logits("lopa_step_out", args, out)


@implements_triton("lopa_step_")
def lopa_step_(*args: Any, **out: Any) -> None:
    _from_logits("lopa_step_", args, out)


@implements_triton("needed_rows")
def needed_rows(
    tokens: torch.Tensor,
    length: torch.Tensor,
    branches: torch.Tensor,
    cache_len: torch.Tensor,
    commit_len: torch.Tensor,
    prompt_len: torch.Tensor,
    done: torch.Tensor,
    mask_id: int,
    shift: bool,
    capacity: int,
) -> Tensors:
    op = "needed_rows"
    if tokens.dim() != 3:
        fail(op, "tokens", "shape [B, K, W]", list(tokens.shape))
    batch, slots, window = tokens.shape
    device = tokens.device
    fields = (tokens, length, branches, cache_len, commit_len, prompt_len, done)
    shapes = _state_shapes(batch, slots, window)
    for name, tensor, i in zip(_ROW_NAMES, fields, _ROW_FIELDS, strict=True):
        check_tensor(op, name, tensor, _STATE_DTYPES[i], shapes[i], device)
    check_at_least(op, "capacity", capacity, 0)
    _check_sizes(op, batch, slots, window)
    index = torch.empty((capacity,), dtype=torch.int64, device=device)
    rows = torch.empty((batch, slots, window), dtype=torch.int32, device=device)
    count = torch.empty((1,), dtype=torch.int32, device=device)
    state = tuple(tensor.contiguous() for tensor in fields)
    _list_rows(state, None, index, rows, count, capacity, 0, mask_id, shift)
    return index, rows, count
