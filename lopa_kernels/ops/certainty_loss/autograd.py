"""The loss's operators as one differentiable function, for autograd and compilers."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake


def differentiable(namespace: str) -> None:
    """Registers the backward pass of ``torch.ops.<namespace>.certainty_forcing_loss``."""
    ops = getattr(torch.ops, namespace)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        logits, labels, _, *ctx.options, ctx.inplace = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, *output[2:])

    def backward(ctx: Any, grad_loss: torch.Tensor | None, *_: object) -> tuple[Any, ...]:
        nothing = (None,) * 5
        if grad_loss is None:
            return None, *nothing
        logits, *saved = ctx.saved_tensors
        # A compiler plans the memory itself: of the functional form it can make an in-place one.
        if not ctx.inplace or is_fake(logits):
            grad = ops.certainty_forcing_loss_backward(grad_loss, logits, *saved, *ctx.options)
            return grad, *nothing
        with torch.no_grad():
            grad = logits.detach()
            ops.certainty_forcing_loss_backward_(grad_loss, grad, *saved, *ctx.options)
            # What has saved the logits, this function included, finds them changed.
            torch.autograd.graph.increment_version(grad)
        return grad, *nothing

    torch.library.register_autograd(
        f"{namespace}::certainty_forcing_loss", backward, setup_context=setup_context
    )
