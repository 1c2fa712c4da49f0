"""One pass over the vocabulary: the token of every row and how sure the model is of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lopa_kernels._checks import (
    FLOATING,
    check_choice,
    check_device,
    check_dtype,
    check_shape,
    check_unit_stride,
)
from lopa_kernels._dispatch import eager, implementation, native, plain_call
from lopa_kernels._interop import accepts_dlpack
from lopa_kernels.ops.confidence import fake, reference

__all__ = [
    "METRICS",
    "SoftmaxStats",
    "TokenConfidence",
    "fake",
    "reference",
    "softmax_stats",
    "token_confidence",
    "token_confidence_out",
]

METRICS = ("prob", "margin", "neg_entropy")

native("token_confidence", "token_confidence_out", "softmax_stats")
eager("token_confidence", "token_confidence_out", "softmax_stats")


class TokenConfidence(NamedTuple):
    """Of each row: `token` int64, `prob` and `score` fp32."""

    token: torch.Tensor
    prob: torch.Tensor
    score: torch.Tensor


class SoftmaxStats(NamedTuple):
    """Of each row: `token` int64; `prob`, `margin`, `neg_entropy` and `lse` fp32."""

    token: torch.Tensor
    prob: torch.Tensor
    margin: torch.Tensor
    neg_entropy: torch.Tensor
    lse: torch.Tensor


def _check_counter(op: str, name: str, value: torch.Tensor | None, logits: torch.Tensor) -> None:
    if value is None:
        return
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name}: expected an int64 tensor, got {type(value).__name__}")
    check_dtype(op, name, value, torch.int64)
    check_device(op, name, value, logits.device)
    if value.numel() != 1:
        raise ValueError(f"{op}: {name}: expected one element, got shape {list(value.shape)}")


def check_vocabulary_options(
    op: str, metric: str, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Raises ValueError for an option out of its range."""
    check_choice(op, "metric", metric, METRICS)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{op}: temperature: expected a finite number >= 0, got {temperature!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{op}: top_k: expected at least 1, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p: expected a number in (0, 1], got {top_p!r}")


def check_logits(op: str, logits: torch.Tensor) -> None:
    """Raises TypeError or ValueError if `logits` is no tensor [..., V] that the kernels read."""
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"{op}: logits: expected a tensor, got {type(logits).__name__}")
    check_dtype(op, "logits", logits, FLOATING)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{op}: logits: expected shape [..., V] with V >= 1, got {list(logits.shape)}"
        )
    check_unit_stride(op, "logits", logits)


def _check(
    op: str,
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    seed: torch.Tensor | None,
    step: torch.Tensor | None,
    metric: str,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    check_logits(op, logits)
    check_vocabulary_options(op, metric, temperature, top_k, top_p)
    if temperature > 0 and seed is None:
        raise ValueError(
            f"{op}: seed: expected an int64 tensor with one element, since temperature > 0, "
            "got None"
        )
    _check_counter(op, "seed", seed, logits)
    _check_counter(op, "step", step, logits)
    if rows is not None:
        check_dtype(op, "rows", rows, torch.int32)
        check_device(op, "rows", rows, logits.device)


@accepts_dlpack
def token_confidence(
    logits: torch.Tensor,
    *,
    metric: str = "prob",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    backend: str | None = None,
) -> TokenConfidence:
    """The token of every row of logits, its probability, and the confidence score of the row.

    With p = softmax(logits / temperature) after the filters (at temperature 0, softmax(logits)):
    `prob` is p[token] and `score` is, by `metric`,

    * ``"prob"``: p[token] (LoPA, arXiv 2512.16229, Eq. 2);
    * ``"margin"``: p1 - p2, the two largest of p (p2 = 0 where one token is left);
    * ``"neg_entropy"``: sum p log p, in [-log V, 0] nats.

    The filters apply in the order temperature, top-p, top-k. In the order of descending
    probability, then ascending index, a token passes top-p if the probability before it is at most
    `top_p`; of those, the first `top_k` remain. Ties go to the lowest index; -0 equals +0; NaN
    counts as -inf and +inf as the largest finite float32. A row with no finite logit gives token 0,
    prob 0, score -inf.

    At temperature > 0 the token is drawn from p by the Gumbel-max rule in two exact stages: a tile
    of 2048 vocabulary indices by its mass, then a token of that tile. The numbers come from
    Philox4x32-10 keyed by (`seed`, `step`, row, vocabulary index or tile), so that equal keys draw
    equal tokens on every backend (except where the two best candidates of a stage, or a top-p
    boundary, lie within 1e-5 of each other). docs/operators.md states the rule in full.

    Args:
        logits: [..., V] bf16, fp16 or fp32; unit stride on V, any other strides. Read in place.
        metric: what `score` is.
        temperature: 0 takes the most likely token; > 0 samples. Finite.
        top_k: at least 1; None or >= V: no limit.
        top_p: in (0, 1]; None or 1: no limit.
        seed: int64, one element, on the device of `logits`; needed at temperature > 0.
        step: int64, one element, likewise; None is 0.
        rows: int32, any shape: the rows of logits, seen as [R, V], to evaluate. -1 names no row and
            gives (0, 0, -inf). Any other value outside [0, R) is a RuntimeError on the CPU; a GPU
            takes it for -1.
        backend: "cpu", "cuda", "triton", "reference" or "auto"; None is the process's default.

    Returns:
        Tensors of shape logits.shape[:-1], or rows.shape: token int64, prob fp32, score fp32.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride, device or option is wrong; the message names the argument.
    """
    op = "token_confidence"
    plain = plain_call(op, logits, backend)
    if plain is not None:
        try:
            made = plain(logits, rows, seed, step, metric, temperature, top_k, top_p)
            return tuple.__new__(TokenConfidence, made)
        except RuntimeError:
            pass  # worded below
    _check(op, logits, rows, seed, step, metric, temperature, top_k, top_p)
    run = implementation(op, logits.device.type, backend)
    return TokenConfidence(*run(logits, rows, seed, step, metric, float(temperature), top_k, top_p))


def token_confidence_out(
    logits: torch.Tensor,
    out: TokenConfidence,
    *,
    metric: str = "prob",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """:func:`token_confidence` into the tensors of `out`, of any strides.

    Args:
        out: token int64, prob fp32 and score fp32, of shape logits.shape[:-1] or rows.shape.

    Raises:
        TypeError, ValueError: as :func:`token_confidence`, for the tensors of `out` too.
    """
    op = "token_confidence_out"
    plain = plain_call(op, logits, backend)
    if plain is not None:
        try:
            plain(logits, rows, seed, step, metric, temperature, top_k, top_p, *out)
            return
        except RuntimeError:
            pass  # worded below
    _check(op, logits, rows, seed, step, metric, temperature, top_k, top_p)
    shape = logits.shape[:-1] if rows is None else rows.shape
    for name, tensor in zip(TokenConfidence._fields, out, strict=True):
        check_dtype(op, name, tensor, torch.int64 if name == "token" else torch.float32)
        check_device(op, name, tensor, logits.device)
        check_shape(op, name, tensor, shape)
    token, prob, score = out
    run: Callable[..., Any] = implementation(op, logits.device.type, backend)
    run(
        logits,
        rows,
        seed,
        step,
        metric,
        float(temperature),
        top_k,
        top_p,
        token=token,
        prob=prob,
        score=score,
    )


@accepts_dlpack
def softmax_stats(
    logits: torch.Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    backend: str | None = None,
) -> SoftmaxStats:
    """Every statistic of :func:`token_confidence` from one pass, and the log-sum-exp.

    `lse` is log sum exp(logits / temperature) over what the filters leave (at temperature 0,
    log sum exp(logits)); it saturates at the largest finite float32. A row with no finite logit,
    and rows = -1, give token 0, prob 0, margin 0, neg_entropy -inf, lse -inf. The arguments and
    errors are those of :func:`token_confidence`.

    Returns:
        Tensors of shape logits.shape[:-1], or rows.shape: token int64, the others fp32.
    """
    op = "softmax_stats"
    plain = plain_call(op, logits, backend)
    if plain is not None:
        try:
            made = plain(logits, rows, seed, step, temperature, top_k, top_p)
            return tuple.__new__(SoftmaxStats, made)
        except RuntimeError:
            pass  # worded below
    _check(op, logits, rows, seed, step, "prob", temperature, top_k, top_p)
    run = implementation(op, logits.device.type, backend)
    return SoftmaxStats(*run(logits, rows, seed, step, float(temperature), top_k, top_p))
