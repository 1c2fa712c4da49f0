"""The step room in Triton: arguments, memory and launches; device code is in triton_*.py."""

from __future__ import annotations

import math
from typing import Any

import torch

from lopa_kernels._dispatch import implements_triton
from lopa_kernels.config import ACCEPTS, FALLBACKS
from lopa_kernels.ops.branch.triton import (
    block_tile,
    check_window,
    double_bits,
    launch_options,
    least_count,
    on_device,
    power_of_two,
    reduction_code,
    single,
)
from lopa_kernels.ops.confidence.triton import vocabulary_statistics
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

#: the fields of the state that say which rows a round reads
_ROW_FIELDS = tuple(
    LopaState._fields.index(name)
    for name in (
        "tokens",
        "length",
        "branches",
        "cache_len",
        "commit_len",
        "prompt_len",
        "done",
    )
)


def _fail(op: str, name: str, expected: object, got: object) -> None:
    raise RuntimeError(f"{op}: {name}: expected {expected}, got {got}")


def _tile_slots(slots: int, columns: int) -> int:
    return min(power_of_two(slots), max(MAX_TILE // columns, 1))


def _next_shapes(state: Tensors, next_slots: int, next_window: int) -> list[tuple[int, ...]]:
    batch = state[0].shape[0]
    return [
        (batch, next_slots, next_window),
        *((batch, next_slots),) * 3,
        *((batch,),) * (_STATE_ARGUMENTS - 4),
    ]


def _result_shapes(state: Tensors) -> list[tuple[int, ...]]:
    batch, slots, window = state[0].shape
    return [(batch,), (batch,), (batch, slots), (batch, window), (batch,)]


_RESULT_DTYPES = (torch.int32, torch.int32, torch.float32, torch.int64, torch.int32)


def _allocate(state: Tensors, config: tuple[Any, ...]) -> Tensors:
    """The next state and the results."""
    device = state[0].device
    shapes = _next_shapes(state, config[0], config[1]) + _result_shapes(state)
    dtypes = (*(tensor.dtype for tensor in state), *_RESULT_DTYPES)
    return tuple(
        torch.empty(shape, dtype=dtype, device=device)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


def _given(op: str, state: Tensors, config: tuple[Any, ...], out: dict[str, Any]) -> Tensors:
    """The caller's tensors for the next state (or the state's own) and the results."""
    in_place = len(out) == len(_RESULT_NAMES)
    slots, window = state[0].shape[1:]
    if in_place and config[:2] != (slots, window):
        _fail(op, "out_branches, out_window", f"{slots}, {window} for an in-place step", config[:2])
    shapes = _next_shapes(state, config[0], config[1]) + _result_shapes(state)
    dtypes = (*(tensor.dtype for tensor in state), *_RESULT_DTYPES)
    names = (*(LopaState._fields if in_place else _NEXT_NAMES), *_RESULT_NAMES)
    tensors = (*(state if in_place else ()), *(out[name] for name in names if name in out))
    for name, tensor, shape, dtype in zip(names, tensors, shapes, dtypes, strict=True):
        if tensor.dtype != dtype or tensor.device != state[0].device:
            expected = f"{dtype} on {state[0].device}"
            _fail(op, name, expected, f"{tensor.dtype} on {tensor.device}")
        if tensor.shape != shape:
            _fail(op, name, f"shape {list(shape)}", f"shape {list(tensor.shape)}")
        if not tensor.is_contiguous():
            _fail(op, name, "a contiguous tensor", f"strides {list(tensor.stride())}")
    return tensors


def _run_round(
    op: str,
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
    check_window(op, max(window, next_window))
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
    statistics = tuple(tensor.contiguous() for tensor in args[:3])
    state, config = args[3 : 3 + _STATE_ARGUMENTS], args[3 + _STATE_ARGUMENTS :]
    outputs = _allocate(state, config) if out is None else _given(op, state, config, out)
    state = tuple(tensor.contiguous() for tensor in state)
    _run_round(op, statistics, None, state, config, outputs)
    return outputs


def _from_logits(op: str, args: tuple[Any, ...], out: dict[str, Any] | None) -> Tensors:
    logits, rows, seed, step = args[:4]
    state = args[4 : 4 + _STATE_ARGUMENTS]
    config = args[4 + _STATE_ARGUMENTS :][:_CONFIG_ARGUMENTS]
    metric, temperature, top_k, top_p = args[4 + _STATE_ARGUMENTS + _CONFIG_ARGUMENTS :]
    outputs = _allocate(state, config) if out is None else _given(op, state, config, out)
    state = tuple(tensor.contiguous() for tensor in state)
    batch, slots, window = state[0].shape
    total = batch * slots * window
    if total == 0:
        return outputs
    device = logits.device
    wanted = torch.empty((total,), dtype=torch.int32, device=device)
    places = torch.empty((batch, slots, window), dtype=torch.int32, device=device)
    count = torch.empty((1,), dtype=torch.int32, device=device)
    fields = tuple(state[i] for i in _ROW_FIELDS)
    logits_rows = math.prod(logits.shape[:-1])
    mask_id, shift = config[7], config[15]
    _list_rows(fields, rows, wanted, places, count, total, logits_rows, mask_id, shift)
    *statistics, flags = vocabulary_statistics(
        logits, wanted, count, total, seed, step, metric, temperature, top_k, top_p
    )
    _run_round(op, tuple(statistics), (flags, places), state, config, outputs)
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
                *fields, counts, slots, window, mask_id, int(shift), **options
            )
        list_needed_kernel[(max(batch, 1),)](
            *fields,
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
    batch, slots, window = tokens.shape
    check_window(op, window)
    fields = (tokens, length, branches, cache_len, commit_len, prompt_len, done)
    device = tokens.device
    index = torch.empty((capacity,), dtype=torch.int64, device=device)
    rows = torch.empty((batch, slots, window), dtype=torch.int32, device=device)
    count = torch.empty((1,), dtype=torch.int32, device=device)
    state = tuple(tensor.contiguous() for tensor in fields)
    _list_rows(state, None, index, rows, count, capacity, 0, mask_id, shift)
    return index, rows, count
