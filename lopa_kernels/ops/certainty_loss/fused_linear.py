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

#: of a chunk's logits, where nobody says how many
CHUNK_BYTES = 256 << 20
_CHUNK_MULTIPLE = 128


def chunk_size(chunk_bytes: int, bytes_each: int) -> int:
    """Rows, or columns, of so many bytes each: a multiple of 128 where there are as many."""
    count = chunk_bytes // max(bytes_each, 1)
    return max(count // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE or count, 1)


def fused_linear_certainty_forcing_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
    *,
    temperature: float = 0.5,
    beta: float = 2.0,
    chunk_bytes: int = CHUNK_BYTES,
    return_terms: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`certainty_forcing_loss` of ``hidden @ weight.T``, never all of it in memory.

    The forward pass makes the logits of some rows at a time and keeps four numbers of each row. How
    many rows agree with their labels, which every gradient of the entropy is divided by, is known
    after the last chunk only; so the backward pass makes logits again, of all rows and some columns
    at a time, writes their gradient over them, and multiplies. That costs one product more than a
    fused linear cross entropy, which takes its gradients in the forward pass; but each slice of the
    weight's gradient is one product, with nothing to add up, and nothing is approximated. (A
    product of another shape may round a logit to its other neighbour.)
    Rows that are not masked are multiplied all the same: leave them out where they are many.

    Args:
        hidden: [N, H] bf16, fp16 or fp32 (with backend "reference" also float64).
        weight: [V, H], of the same dtype: the LM head's.
        labels, masked, temperature, beta, return_terms, backend: as
            :func:`certainty_forcing_loss`.
        chunk_bytes: of the logits that are in memory at a time, at least one row or column; 256 MiB
            by default. The backward pass has beside them an fp32 (or float64) sum of the size of
            `hidden`.

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
    if chunk_bytes < 1:
        raise ValueError(f"{op}: chunk_bytes: expected at least 1, got {chunk_bytes}")
    loss, terms = _FusedLinear.apply(
        hidden,
        weight,
        labels,
        masked,
        float(temperature),
        float(beta),
        chunk_bytes,
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
        chunk_bytes: int,
        backend: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        run = implementation(OP, hidden.device.type, backend)
        dtype = reference.arithmetic(hidden)
        totals = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        counts = torch.zeros(2, dtype=torch.int32, device=hidden.device)
        stats = []
        chunk_rows = chunk_size(chunk_bytes, len(weight) * weight.element_size())
        for begin in range(0, len(hidden), chunk_rows):
            rows = slice(begin, begin + chunk_rows)
            with torch.autocast(hidden.device.type, enabled=False):
                logits = hidden[rows] @ weight.t()
            _, means, chunk_stats, _, chunk_counts = run(
                logits, labels[rows], masked[rows], temperature, beta, False
            )
            # The means of no rows are 0.
            totals = totals + means.double() * chunk_counts
            counts = counts + chunk_counts
            stats.append(chunk_stats)
            # Before the next chunk is made.
            del logits
        means = totals / counts.clamp(min=1)
        # As of all rows at once: how many are masked, these in order, then the others.
        order = torch.cat([counts[:1], (~masked).byte().argsort(stable=True).to(torch.int32)])
        row_stats = torch.cat(stats) if stats else totals.new_zeros(0, 4, dtype=dtype)
        ctx.temperature, ctx.beta = temperature, beta
        ctx.chunk_bytes, ctx.backend = chunk_bytes, backend
        ctx.save_for_backward(hidden, weight, labels, row_stats, order, counts)
        terms = means.to(dtype)
        ctx.mark_non_differentiable(terms)
        return (means[0] + beta * means[1]).to(dtype), terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: object) -> tuple[Any, ...]:
        hidden, weight, labels, *saved = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        if len(hidden) == 0:
            return torch.zeros_like(hidden), torch.zeros_like(weight), *(None,) * 6
        grad_hidden = grad_weight = None
        if need_hidden:
            grad_hidden = torch.zeros_like(hidden, dtype=reference.arithmetic(hidden))
        if need_weight:
            grad_weight = torch.empty_like(weight)
        columns = chunk_size(ctx.chunk_bytes, len(hidden) * hidden.element_size())
        for begin in range(0, len(weight), columns):
            part = weight[begin : begin + columns]
            logits = hidden @ part.t()
            # A label outside the slice is none of its columns.
            gradient(
                grad_loss,
                logits,
                labels - begin,
                *saved,
                temperature=ctx.temperature,
                beta=ctx.beta,
                inplace=True,
                backend=ctx.backend,
            )
            if grad_hidden is not None:
                _add_product(grad_hidden, logits, part)
            if grad_weight is not None:
                _put_product(grad_weight[begin : begin + columns], logits.t(), hidden)
            # Before the next slice is made.
            del logits
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, *(None,) * 6


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, which is not rounded to the dtype of its factors where a GPU can."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and not torch.compiler.is_compiling():
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.add_(a @ b)


def _put_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out = a @ b."""
    if torch.compiler.is_compiling():
        out.copy_(a @ b)
    else:
        torch.mm(a, b, out=out)
