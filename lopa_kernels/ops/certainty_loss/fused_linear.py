"""The loss from hidden states and the LM head's weight, a chunk of logits at a time."""

from __future__ import annotations

from typing import Any

import torch

from lopa_kernels._checks import check_device, check_rank
from lopa_kernels._dispatch import implementation
from lopa_kernels.ops.certainty_loss import (
    OP,
    check_floating,
    check_options,
    check_rows,
    gradient,
    reference,
)

#: of the logits of a chunk, where nobody says how many rows it has
_CHUNK_BYTES = 256 << 20
_CHUNK_MULTIPLE = 128


def default_chunk_rows(vocab: int, itemsize: int) -> int:
    """Rows whose logits take 256 MiB at most, a multiple of 128."""
    rows = _CHUNK_BYTES // (vocab * itemsize)
    return max(rows // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE, _CHUNK_MULTIPLE)


def fused_linear_certainty_forcing_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
    *,
    temperature: float = 0.5,
    beta: float = 2.0,
    chunk_rows: int | None = None,
    accumulate_dtype: torch.dtype | None = None,
    return_terms: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`certainty_forcing_loss` of ``hidden @ weight.T``, never all of it in memory.

    The forward pass makes the logits of `chunk_rows` rows at a time and keeps four numbers of each
    row. How many rows agree with their labels, which every gradient of the entropy is divided by,
    is known after the last chunk only; so the backward pass makes each chunk's logits again,
    overwrites them with their gradient, and multiplies. That costs one product more than a fused
    linear cross entropy, which takes its gradients in the forward pass, and it is exact: each
    chunk's gradient is the very one that :func:`certainty_forcing_loss` gives of these logits.
    Rows that are not masked are multiplied all the same: leave them out where they are many.

    Args:
        hidden: [N, H] bf16, fp16 or fp32 (with backend "reference" also float64).
        weight: [V, H], of the same dtype: the LM head's.
        labels, masked, temperature, beta, return_terms, backend: as
            :func:`certainty_forcing_loss`.
        chunk_rows: at least 1; None takes as many as have 256 MiB of logits.
        accumulate_dtype: in which the chunks' gradients of `weight` are added up; None is fp32 (or
            float64), which takes memory of the size of `weight` in that dtype where there are
            several chunks.

    Returns:
        As :func:`certainty_forcing_loss`; differentiable once in `hidden` and `weight`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, device or option is wrong; the message names the argument.
    """
    op = "fused_linear_certainty_forcing_loss"
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name}: expected a tensor, got {type(tensor).__name__}")
        check_floating(op, name, tensor, backend)
        check_rank(op, name, tensor, 2)
    check_device(op, "weight", weight, hidden.device)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{op}: weight: expected dtype {hidden.dtype}, got {weight.dtype}")
    if weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: weight: expected shape [V, {hidden.shape[1]}] with V >= 1, "
            f"got {list(weight.shape)}"
        )
    check_rows(op, labels, masked, hidden.shape[:1], hidden.device)
    check_options(op, temperature, beta)
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(len(weight), hidden.element_size())
    if chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows: expected at least 1, got {chunk_rows}")
    if accumulate_dtype is None:
        accumulate_dtype = reference.arithmetic(hidden)
    elif not accumulate_dtype.is_floating_point:
        raise TypeError(
            f"{op}: accumulate_dtype: expected a floating-point dtype, got {accumulate_dtype}"
        )
    loss, terms = _FusedLinear.apply(
        hidden,
        weight,
        labels,
        masked,
        float(temperature),
        float(beta),
        chunk_rows,
        accumulate_dtype,
        backend,
    )
    return (loss, terms) if return_terms else loss


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        masked: torch.Tensor,
        temperature: float,
        beta: float,
        chunk_rows: int,
        accumulate_dtype: torch.dtype,
        backend: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        run = implementation(OP, hidden.device.type, backend)
        dtype = reference.arithmetic(hidden)
        totals = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        counts = torch.zeros(2, dtype=torch.int32, device=hidden.device)
        stats, orders = [], []
        for begin in range(0, len(hidden), chunk_rows):
            rows = slice(begin, begin + chunk_rows)
            with torch.autocast(hidden.device.type, enabled=False):
                logits = hidden[rows] @ weight.t()
            _, means, chunk_stats, order, chunk_counts = run(
                logits, labels[rows], masked[rows], temperature, beta, False
            )
            # The means of no rows are 0.
            totals = totals + means.double() * chunk_counts
            counts = counts + chunk_counts
            stats.append(chunk_stats)
            orders.append(order)
            # Before the next chunk is made.
            del logits
        means = totals / counts.clamp(min=1)
        ctx.temperature, ctx.beta = temperature, beta
        ctx.chunk_rows, ctx.accumulate_dtype, ctx.backend = chunk_rows, accumulate_dtype, backend
        ctx.save_for_backward(hidden, weight, labels, counts, *stats, *orders)
        terms = means.to(dtype)
        ctx.mark_non_differentiable(terms)
        return (means[0] + beta * means[1]).to(dtype), terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: object) -> tuple[Any, ...]:
        hidden, weight, labels, counts, *saved = ctx.saved_tensors
        stats, orders = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grads_hidden = []
        grad_weight = torch.zeros_like(weight) if need_weight and not stats else None
        for index, (chunk_stats, order) in enumerate(zip(stats, orders, strict=True)):
            rows = slice(index * ctx.chunk_rows, (index + 1) * ctx.chunk_rows)
            logits = hidden[rows] @ weight.t()
            gradient(
                grad_loss,
                logits,
                labels[rows],
                chunk_stats,
                order,
                counts,
                temperature=ctx.temperature,
                beta=ctx.beta,
                inplace=True,
                backend=ctx.backend,
            )
            if need_hidden:
                grads_hidden.append(logits @ weight)
            if need_weight:
                part = logits.t() @ hidden[rows]
                if grad_weight is not None:
                    grad_weight.add_(part)
                else:
                    grad_weight = part.to(ctx.accumulate_dtype) if len(stats) > 1 else part
                del part
            del logits
        grad_hidden = None
        if need_hidden:
            grad_hidden = torch.cat(grads_hidden) if grads_hidden else torch.zeros_like(hidden)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *(None,) * 7
