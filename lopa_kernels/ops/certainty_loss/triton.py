"""The certainty-forcing loss in Triton.

Forward: the list of the masked rows; tiles of 2048 logits, one warp a tile, to their maximum and
sums; the tiles of a row to its statistics; the means. Backward: one pass over the tiles. What a
tile gives depends on its values alone, and sums are formed in one order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from lopa_kernels._checks import shares_memory
from lopa_kernels._dispatch import implements_triton
from lopa_kernels._triton import (
    MAX_INT32,
    check_device,
    check_floating,
    check_tensor,
    fail,
    on_device,
)
from lopa_kernels._triton_math import narrow
from lopa_kernels.ops.certainty_loss.autograd import differentiable
from lopa_kernels.ops.confidence.triton import device_of, layout, pairwise_sum
from lopa_kernels.ops.confidence.triton_merge import TILE, offset_of

_INF = tl.constexpr(float("inf"))
_FLT_MAX = tl.constexpr(3.4028234663852886e38)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# Exponents do not fall below: 2^-200 is 0, and is not multiplied by an infinity.
_LEAST = tl.constexpr(-200.0)
#: at this temperature exp(x / temperature) is the square of exp(x), and one exponential does
_SQUARE_TEMPERATURE = 0.5
#: of a row that has no part in the mean of the entropies
_NO_ENTROPY = tl.constexpr(-1.0)

_BLOCK = 1024  # rows at a time, of the kernels that are one program
_FLOAT32 = torch.finfo(torch.float32)

# Programs a multiprocessor: as many as run at a time, times some waves, so that they even out.
_TILE_PROGRAMS = 80
_ROW_PROGRAMS = 16
# Nothing is summed up there: 16 elements a thread keep everything in registers.
_GRADIENT_WARPS = 4


@triton.jit
def _floored(exponent: tl.tensor) -> tl.tensor:
    """A NaN stays."""
    return tl.maximum(exponent, _LEAST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["rows"])
def _order_kernel(
    masked: tl.tensor,
    order: tl.tensor,
    counts: tl.tensor,
    stats: tl.tensor,
    rows: tl.tensor,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """The masked rows in order, then the others; these get their statistics here."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    lane = tl.arange(0, BLOCK)
    total = 0
    for begin in range(0, rows, BLOCK):
        row = begin + lane
        total += tl.sum(tl.load(masked + row, mask=row < rows, other=0).to(tl.int32))
    tl.store(order, total)
    tl.store(counts, total)
    before = 0
    for begin in range(0, rows, BLOCK):
        row = begin + lane
        live = row < rows
        mine = tl.load(masked + row, mask=live, other=0).to(tl.int32)
        place = before + tl.cumsum(mine) - mine
        other = total + row - place
        tl.store(order + 1 + tl.where(mine > 0, place, other), row, mask=live)
        rest = live & (mine == 0)
        for field in tl.static_range(4):
            value = _NO_ENTROPY if field == 3 else 0.0
            tl.store(stats + row.to(tl.int64) * 4 + field, value, mask=rest)
        before += tl.sum(mine)


@triton.jit(do_not_specialize=["vocab", "tiles"])
def _tile_kernel(
    logits: tl.tensor,
    order: tl.tensor,
    maxima: tl.tensor,
    places: tl.tensor,
    plains: tl.tensor,
    sums: tl.tensor,
    weighted_sums: tl.tensor,
    sizes: tl.tensor,
    strides: tl.tensor,
    vocab: tl.tensor,
    tiles: tl.tensor,
    scale: tl.tensor,
    SQUARE: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """Of every tile of the listed rows: its maximum m and where that is, the sum of
    2^((x - m) log2(e)), and with t = (x - m) * scale the sums of v = 2^t and of v * t.

    NaN and +inf make the sums NaN.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    listed = tl.load(order)
    lane = tl.arange(0, TILE)
    for item in range(tl.program_id(0), listed * tiles, tl.num_programs(0)):
        row = tl.load(order + 1 + item // tiles)
        begin = item % tiles * TILE
        source = logits + (offset_of(row, sizes, strides) + begin)
        if begin + TILE <= vocab:
            x = tl.load(source + lane).to(tl.float32)
        else:
            x = tl.load(source + lane, mask=begin + lane < vocab, other=-float("inf"))
            x = x.to(tl.float32)
        largest = tl.max(x)
        place = tl.min(tl.where(x == largest, lane, TILE))
        distance = x - tl.maximum(largest, -_FLT_MAX)
        s = _floored(distance * _LOG2E)
        w = tl.exp2(s)
        if SQUARE:
            v = w * w
            weighted = 2 * pairwise_sum(v * s, 3)
        else:
            t = _floored(distance * scale)
            v = tl.exp2(t)
            weighted = pairwise_sum(v * t, 3)
        tl.store(maxima + item, largest)
        tl.store(places + item, begin + place)
        tl.store(plains + item, pairwise_sum(w, 3))
        tl.store(sums + item, pairwise_sum(v, 3))
        tl.store(weighted_sums + item, weighted)


@triton.jit(do_not_specialize=["vocab", "tiles"])
def _row_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    order: tl.tensor,
    maxima: tl.tensor,
    places: tl.tensor,
    plains: tl.tensor,
    sums: tl.tensor,
    weighted_sums: tl.tensor,
    stats: tl.tensor,
    cross_entropies: tl.tensor,
    sizes: tl.tensor,
    strides: tl.tensor,
    vocab: tl.tensor,
    tiles: tl.tensor,
    scale: tl.tensor,
    TILES: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    listed = tl.load(order)
    tile = tl.arange(0, TILES)
    live = tile < tiles
    for position in range(tl.program_id(0), listed, tl.num_programs(0)):
        row = tl.load(order + 1 + position)
        at = tl.cast(position, tl.int64) * tiles + tile
        tile_largest = tl.load(maxima + at, mask=live, other=-float("inf"))
        plain = tl.load(plains + at, mask=live, other=0.0)
        tempered = tl.load(sums + at, mask=live, other=0.0)
        weighted = tl.load(weighted_sums + at, mask=live, other=0.0)
        place = tl.load(places + at, mask=live, other=MAX_PLACE)
        largest = tl.max(tile_largest)
        distance = tile_largest - largest
        plain = tl.sum(tl.exp2(_floored(distance * _LOG2E)) * plain)
        shift = _floored(distance * scale)
        factor = tl.exp2(shift)
        weighted = tl.sum(tl.where(factor > 0, factor * (weighted + shift * tempered), 0.0))
        tempered = tl.sum(factor * tempered)
        argmax = tl.min(tl.where(tile_largest == largest, place, MAX_PLACE))
        label = tl.load(labels + row)
        # A label outside the vocabulary, which the host cannot refuse, is as bad as a NaN.
        known = (label >= 0) & (label < vocab)
        good = known & (plain > 0) & (plain < _INF)
        # Not a global: no NaN equals itself, and Triton compares globals.
        nan = float("nan")
        log_sum = tl.where(good, tl.log(plain), nan)
        log_tempered = tl.where(good, tl.log(tempered), nan)
        entropy = tl.maximum(log_tempered - weighted / tempered * _LN2, 0.0)
        entropy = tl.where(argmax == label, entropy, _NO_ENTROPY)
        source = logits + offset_of(row, sizes, strides)
        value = tl.load(source + label, mask=known, other=0.0).to(tl.float32)
        out = stats + row.to(tl.int64) * 4
        tl.store(out, tl.where(good, largest, nan))
        tl.store(out + 1, log_sum)
        tl.store(out + 2, log_tempered)
        tl.store(out + 3, tl.where(good, entropy, nan))
        tl.store(cross_entropies + position, log_sum - (value - largest))


MAX_PLACE = tl.constexpr(MAX_INT32)


@triton.jit
def _means_kernel(
    order: tl.tensor,
    stats: tl.tensor,
    cross_entropies: tl.tensor,
    beta: tl.tensor,
    loss: tl.tensor,
    terms: tl.tensor,
    counts: tl.tensor,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    listed = tl.load(order)
    cross = tl.zeros([BLOCK], tl.float64)
    entropies = tl.zeros([BLOCK], tl.float64)
    agreeing = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, listed, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        live = position < listed
        cross += tl.load(cross_entropies + position, mask=live, other=0.0).to(tl.float64)
        row = tl.load(order + 1 + position, mask=live, other=0).to(tl.int64)
        entropy = tl.load(stats + row * 4 + 3, mask=live, other=-1.0)
        agrees = entropy >= 0
        entropies += tl.where(agrees, entropy, 0.0).to(tl.float64)
        agreeing += agrees.to(tl.int32)
    count = tl.sum(agreeing)
    cross_mean = tl.sum(cross) / tl.maximum(listed, 1)
    entropy_mean = tl.sum(entropies) / tl.maximum(count, 1)
    tl.store(terms, cross_mean.to(tl.float32))
    tl.store(terms + 1, entropy_mean.to(tl.float32))
    tl.store(loss, (cross_mean + beta * entropy_mean).to(tl.float32))
    tl.store(counts + 1, count)


@triton.jit(do_not_specialize=["vocab", "tiles", "rows"])
def _gradient_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    stats: tl.tensor,
    order: tl.tensor,
    counts: tl.tensor,
    grad_loss: tl.tensor,
    out: tl.tensor,
    sizes: tl.tensor,
    strides: tl.tensor,
    out_sizes: tl.tensor,
    out_strides: tl.tensor,
    vocab: tl.tensor,
    tiles: tl.tensor,
    rows: tl.tensor,
    scale: tl.tensor,
    tilt: tl.tensor,
    SQUARE: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """With d = x - max, p = 2^(d log2(e) - log_sum) and t = d * scale - tempered, base 2:
    cross * (p - [label]) + 2^t * (slope * t + offset), over the logits or beside them.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    listed = tl.load(order)
    masked = tl.load(counts)
    agreeing = tl.load(counts + 1)
    grad = tl.load(grad_loss)
    cross = grad / tl.maximum(masked, 1).to(tl.float32)
    tilt = grad * tilt / tl.maximum(agreeing, 1).to(tl.float32)
    lane = tl.arange(0, TILE)
    for item in range(tl.program_id(0), rows * tiles, tl.num_programs(0)):
        position = item // tiles
        row = tl.load(order + 1 + position)
        begin = item % tiles * TILE
        # Without a mask, which would keep the accesses from being wide, but at the end of a row.
        whole = begin + TILE <= vocab
        live = begin + lane < vocab
        valid = (row >= 0) & (row < rows)
        target = out + (offset_of(row, out_sizes, out_strides) + begin)
        if valid & (position >= listed):
            zeros = tl.zeros([TILE], out.dtype.element_ty)
            if whole:
                tl.store(target + lane, zeros)
            else:
                tl.store(target + lane, zeros, mask=live)
        if valid & (position < listed):
            source = logits + (offset_of(row, sizes, strides) + begin)
            if whole:
                x = tl.load(source + lane).to(tl.float32)
            else:
                x = tl.load(source + lane, mask=live, other=-float("inf")).to(tl.float32)
            fields = stats + row.to(tl.int64) * 4
            largest = tl.load(fields)
            log_sum = tl.load(fields + 1) * _LOG2E
            tempered = tl.load(fields + 2) * _LOG2E
            entropy = tl.load(fields + 3)
            label = tl.load(labels + row) - begin
            label = tl.where((label >= 0) & (label < TILE), label, -1).to(tl.int32)
            distance = x - largest
            s = _floored(distance * _LOG2E - log_sum)
            p = tl.exp2(s)
            result = tl.where(lane == label, p - 1.0, p) * cross
            if entropy >= 0:
                if SQUARE:
                    t = 2 * s - (tempered - 2 * log_sum)
                    v = p * p * tl.exp2(2 * log_sum - tempered)
                else:
                    t = _floored(distance * scale - tempered)
                    v = tl.exp2(t)
                result += v * (tilt * (t * _LN2 + entropy))
            rounded = narrow(result, out.dtype.element_ty)
            if whole:
                tl.store(target + lane, rounded)
            else:
                tl.store(target + lane, rounded, mask=live)


def _scale(temperature: float) -> float:
    # Beyond these every weight but the maximum's is 0, or every weight is 1.
    return min(max(1 / (temperature * math.log(2)), _FLOAT32.tiny), _FLOAT32.max)


def _check_logits(op: str, logits: torch.Tensor, device: torch.device) -> None:
    check_device(op, "logits", logits, device)
    check_floating(op, "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] < 1:
        fail(op, "logits", "shape [..., V] with V >= 1", f"shape {list(logits.shape)}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        fail(op, "logits", "unit stride in the last dimension", f"stride {logits.stride(-1)}")
    rows = math.prod(logits.shape[:-1])
    if rows > MAX_INT32:
        fail(op, "logits", "less than 2^31 rows", rows)


def _check_options(op: str, temperature: float, beta: float) -> None:
    if not 0 < temperature < math.inf:
        fail(op, "temperature", "a finite number > 0", f"{temperature:g}")
    if not math.isfinite(beta):
        fail(op, "beta", "a finite number", f"{beta:g}")


def _check_overlap(op: str, logits: torch.Tensor) -> None:
    if shares_memory(logits):
        fail(op, "logits", "elements that share no memory", f"strides {list(logits.stride())}")


def _tiles(op: str, logits: torch.Tensor) -> int:
    tiles = triton.cdiv(logits.shape[-1], TILE.value)
    rows = math.prod(logits.shape[:-1])
    if rows * tiles > MAX_INT32 or logits.shape[-1] > MAX_INT32 - TILE.value:
        expected = f"less than 2^31 rows times tiles of {TILE.value} tokens"
        fail(op, "logits", expected, f"shape {list(logits.shape)}")
    return tiles


def _bytes(masked: torch.Tensor) -> torch.Tensor:
    return masked.contiguous().view(torch.uint8)


@implements_triton("certainty_forcing_loss")
def _forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
    temperature: float = 0.5,
    beta: float = 2.0,
    inplace_backward: bool = False,
) -> tuple[torch.Tensor, ...]:
    op = "certainty_forcing_loss"
    device = logits.device
    _check_logits(op, logits, device)
    check_tensor(op, "labels", labels, torch.int64, logits.shape[:-1], device)
    check_tensor(op, "masked", masked, torch.bool, logits.shape[:-1], device)
    _check_options(op, temperature, beta)
    if inplace_backward:
        _check_overlap(op, logits)
    rows, vocab, tiles = labels.numel(), logits.shape[-1], _tiles(op, logits)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    loss, terms, stats = new(), new(2), new(rows, 4)
    order, counts = new(rows + 1, dtype=torch.int32), new(2, dtype=torch.int32)
    places = new(rows, tiles, dtype=torch.int32)
    maxima, plains, sums, weighted = (new(rows, tiles) for _ in range(4))
    partials = (maxima, places, plains, sums, weighted)
    cross_entropies = new(rows)
    labels = labels.contiguous()
    table = layout(logits.shape[:-1], logits.stride()[:-1])
    properties = device_of(device)
    common = {"DEPENDENT": properties.dependent}
    if properties.dependent:
        common["launch_pdl"] = True
    with on_device(logits):
        _order_kernel[(1,)](_bytes(masked), order, counts, stats, rows, BLOCK=_BLOCK, **common)
        if rows > 0:
            _tile_kernel[(min(rows * tiles, _TILE_PROGRAMS * properties.multiprocessors),)](
                logits,
                order,
                *partials,
                *table,
                vocab,
                tiles,
                _scale(temperature),
                SQUARE=temperature == _SQUARE_TEMPERATURE,
                num_warps=1,
                enable_fp_fusion=False,
                **common,
            )
            _row_kernel[(min(rows, _ROW_PROGRAMS * properties.multiprocessors),)](
                logits,
                labels,
                order,
                *partials,
                stats,
                cross_entropies,
                *table,
                vocab,
                tiles,
                _scale(temperature),
                TILES=max(16, triton.next_power_of_2(tiles)),
                num_warps=1,
                **common,
            )
        _means_kernel[(1,)](
            order, stats, cross_entropies, beta, loss, terms, counts, BLOCK=_BLOCK, **common
        )
    return loss, terms, stats, order, counts


def _check_backward(
    op: str,
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    stats: torch.Tensor,
    order: torch.Tensor,
    counts: torch.Tensor,
    temperature: float,
    beta: float,
) -> None:
    device = logits.device
    _check_logits(op, logits, device)
    check_tensor(op, "labels", labels, torch.int64, logits.shape[:-1], device)
    rows = labels.numel()
    check_tensor(op, "grad_loss", grad_loss, torch.float32, (), device)
    check_tensor(op, "stats", stats, torch.float32, (rows, 4), device)
    check_tensor(op, "order", order, torch.int32, (rows + 1,), device)
    check_tensor(op, "counts", counts, torch.int32, (2,), device)
    _check_options(op, temperature, beta)


def _run_backward(
    op: str,
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    stats: torch.Tensor,
    order: torch.Tensor,
    counts: torch.Tensor,
    temperature: float,
    beta: float,
    out: torch.Tensor,
) -> None:
    rows, tiles = labels.numel(), _tiles(op, logits)
    if rows == 0:
        return
    properties = device_of(logits.device)
    with on_device(logits):
        _gradient_kernel[(min(rows * tiles, _TILE_PROGRAMS * properties.multiprocessors),)](
            logits,
            labels.contiguous(),
            stats.contiguous(),
            order.contiguous(),
            counts.contiguous(),
            grad_loss,
            out,
            *layout(logits.shape[:-1], logits.stride()[:-1]),
            *layout(out.shape[:-1], out.stride()[:-1]),
            logits.shape[-1],
            tiles,
            rows,
            _scale(temperature),
            -beta / temperature,
            SQUARE=temperature == _SQUARE_TEMPERATURE,
            DEPENDENT=properties.dependent,
            num_warps=_GRADIENT_WARPS,
            **({"launch_pdl": True} if properties.dependent else {}),
        )


@implements_triton("certainty_forcing_loss_backward")
def _backward(
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    stats: torch.Tensor,
    order: torch.Tensor,
    counts: torch.Tensor,
    temperature: float = 0.5,
    beta: float = 2.0,
) -> torch.Tensor:
    op = "certainty_forcing_loss_backward"
    saved = (grad_loss, logits, labels, stats, order, counts, temperature, beta)
    _check_backward(op, *saved)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _run_backward(op, *saved, out)
    return out


@implements_triton("certainty_forcing_loss_backward_")
def _backward_(
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    stats: torch.Tensor,
    order: torch.Tensor,
    counts: torch.Tensor,
    temperature: float = 0.5,
    beta: float = 2.0,
) -> None:
    op = "certainty_forcing_loss_backward_"
    saved = (grad_loss, logits, labels, stats, order, counts, temperature, beta)
    _check_backward(op, *saved)
    _check_overlap(op, logits)
    _run_backward(op, *saved, logits)


differentiable("lopa_triton")
