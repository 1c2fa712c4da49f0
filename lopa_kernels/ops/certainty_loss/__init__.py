"""dParallel's certainty-forcing loss: cross entropy, and the entropy of what is already right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from lopa_kernels._checks import (
    FLOATING,
    check_device,
    check_dtype,
    check_shape,
    check_unit_stride,
    shares_memory,
)
from lopa_kernels._dispatch import implementation, native
from lopa_kernels._interop import accepts_dlpack
from lopa_kernels.ops.certainty_loss import fake, reference
from lopa_kernels.ops.certainty_loss.autograd import differentiable

__all__ = ["certainty_forcing_loss", "fake", "gradient", "reference"]

OP = "certainty_forcing_loss"

native(OP, f"{OP}_backward", f"{OP}_backward_")
differentiable("lopa")


def check_options(op: str, temperature: float, beta: float) -> None:
    """Raises ValueError for an option out of its range."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature: expected a finite number > 0, got {temperature!r}")
    if not math.isfinite(beta):
        raise ValueError(f"{op}: beta: expected a finite number, got {beta!r}")


def check_floating(op: str, name: str, tensor: torch.Tensor, backend: str | None) -> None:
    """bf16, fp16 or fp32; with backend "reference" float64 too."""
    allowed = (*FLOATING, torch.float64) if backend == "reference" else FLOATING
    check_dtype(op, name, tensor, allowed)


def check_rows(
    op: str, labels: torch.Tensor, masked: torch.Tensor, shape: torch.Size, device: torch.device
) -> None:
    """Raises TypeError or ValueError unless `labels` and `masked` have one value a row."""
    for name, tensor, dtype in (
        ("labels", labels, torch.int64),
        ("masked", masked, torch.bool),
    ):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name}: expected a tensor, got {type(tensor).__name__}")
        check_dtype(op, name, tensor, dtype)
        check_device(op, name, tensor, device)
        check_shape(op, name, tensor, shape)


@accepts_dlpack
def certainty_forcing_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
    *,
    temperature: float = 0.5,
    beta: float = 2.0,
    inplace_backward: bool = False,
    return_terms: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """dParallel's distillation loss (arXiv 2509.26488, section 3.3).

    The mean over the masked rows of the cross entropy CE(logits, label), plus `beta` times the mean
    over the masked rows whose argmax is their label of the entropy H(softmax(logits /
    `temperature`)), in nats. A mean over no rows is 0. Ties of the argmax go to the lowest index.

    Forward and backward each read the logits of the masked rows once, and of the others nothing.
    All arithmetic is fp32 and sums of rows are in double, in a fixed order. No tensor of the size
    of the logits is made but the gradient, whose rows that are not masked are 0. The labels'
    values are read where a row is masked, and there only. A logit of -inf has probability 0 and
    gradient 0; a masked row with a NaN, with +inf or with no finite logit makes the loss and its
    own gradient NaN.

    Args:
        logits: [..., V] bf16, fp16 or fp32 (with backend "reference" also float64); unit stride
            on V, any other strides.
        labels: int64 [...]. Where masked, one outside [0, V) is a RuntimeError on the CPU that
            names it; on a GPU, whose values the host does not read, it makes the loss and the
            row's gradient NaN.
        masked: bool [...]: the rows that the loss is of.
        temperature: of the entropy's distribution; finite, > 0. At 0.5, the published one, the
            kernels need one exponential a logit instead of two.
        beta: weight of the entropy; finite.
        inplace_backward: the backward pass writes the gradient over the logits, so that it takes
            no memory at all. They must then not be needed afterwards, nor any two of them share
            memory. (Autograd refuses what would use the overwritten values. Under a compiler,
            which plans memory itself, the gradient has memory of its own.)
        return_terms: also returns the two means.
        backend: "cpu", "cuda", "triton", "reference" or "auto"; None is the process's default.

    Returns:
        The loss, fp32 [], differentiable once in `logits`; with `return_terms` (loss, terms
        fp32 [2]): the mean cross entropy and the mean entropy, without gradients.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride, device or option is wrong; the message names the argument.
    """
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"{OP}: logits: expected a tensor, got {type(logits).__name__}")
    check_floating(OP, "logits", logits, backend)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{OP}: logits: expected shape [..., V] with V >= 1, got {list(logits.shape)}"
        )
    check_unit_stride(OP, "logits", logits)
    check_rows(OP, labels, masked, logits.shape[:-1], logits.device)
    check_options(OP, temperature, beta)
    if inplace_backward and shares_memory(logits):
        raise ValueError(
            f"{OP}: logits: expected elements that share no memory, since inplace_backward, "
            f"got strides {list(logits.stride())}"
        )
    run = implementation(OP, logits.device.type, backend)
    loss, terms, *_ = run(
        logits, labels, masked, float(temperature), float(beta), bool(inplace_backward)
    )
    return (loss, terms) if return_terms else loss


def gradient(
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    stats: torch.Tensor,
    order: torch.Tensor,
    counts: torch.Tensor,
    *,
    temperature: float = 0.5,
    beta: float = 2.0,
    inplace: bool = False,
    backend: str | None = None,
) -> torch.Tensor | None:
    """The backward pass alone, from what ``torch.ops.lopa.certainty_forcing_loss`` returned.

    Args:
        grad_loss: fp32 [], the gradient in the loss.
        logits: those of the forward pass, or some columns of them.
        labels: counted from the first of these columns; one outside them is none of theirs.
        stats, order, counts: the operator's third to fifth results; reference.forward says what
            they hold. `counts` may be those of a larger batch, of which these rows are a part.
        inplace: writes the gradient over the logits.

    Returns:
        The gradient, like the logits and contiguous; None where it is in them.
    """
    name = f"{OP}_backward_" if inplace else f"{OP}_backward"
    run: Callable[..., Any] = implementation(name, logits.device.type, backend)
    return run(grad_loss, logits, labels, stats, order, counts, float(temperature), float(beta))
