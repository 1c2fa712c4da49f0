"""The loss and its gradient in plain PyTorch, written for reading: the oracle of every backend.

The arithmetic is float64 where the logits are float64, and float32 otherwise.
"""

from __future__ import annotations

from typing import Any

import torch

from lopa_kernels._dispatch import implements


def arithmetic(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
    temperature: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, its two means, and what the backward pass needs.

    Returns:
        loss []: terms[0] + beta * terms[1].
        terms [2]: mean cross entropy of the masked rows, mean entropy of the agreeing ones.
        stats [N, 4], of each row: its largest logit m, log sum exp(x - m), log sum
            exp((x - m) / temperature), and the entropy, or -1 where the row does not agree; NaN
            throughout for a row that makes the loss NaN; (0, 0, 0, -1) for one not masked.
        order int32 [N + 1]: how many rows are masked; then these, then the others, ascending.
        counts int32 [2]: masked rows, agreeing rows.
    """
    dtype = arithmetic(logits)
    vocab = logits.shape[-1]
    rows = logits.reshape(-1, vocab)
    labels, masked = labels.reshape(-1), masked.reshape(-1)
    wrong = masked & ((labels < 0) | (labels >= vocab))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise RuntimeError(
            f"certainty_forcing_loss: labels: expected an index below V = {vocab} where masked, "
            f"got {int(labels[at])} at flat index {at}"
        )
    listed, rest = masked.nonzero()[:, 0], (~masked).nonzero()[:, 0]
    x, label = rows[listed].to(dtype), labels[listed]

    m = x.amax(-1)
    x = x - m[:, None]
    log_sum = x.logsumexp(-1)
    q_log = torch.log_softmax(x / temperature, -1)
    # 0 log 0 = 0.
    entropy = -torch.where(q_log > -torch.inf, q_log.exp() * q_log, 0.0).sum(-1)
    tempered = (x / temperature).logsumexp(-1)
    # A NaN, a +inf, or no finite logit.
    spoiled = ~log_sum.isfinite()
    agrees = (x.argmax(-1) == label) & ~spoiled
    cross_entropy = log_sum - x.gather(-1, label[:, None])[:, 0]

    zero = torch.zeros((), dtype=dtype, device=logits.device)
    terms = torch.stack(
        [
            cross_entropy.mean() if len(listed) else zero,
            entropy[agrees].mean() if bool(agrees.any()) else zero,
        ]
    )
    row_stats = torch.stack([m, log_sum, tempered, torch.where(agrees, entropy, -1.0)], -1)
    row_stats[spoiled] = torch.nan
    stats = torch.tensor([0.0, 0.0, 0.0, -1.0], dtype=dtype, device=logits.device)
    stats = stats.repeat(len(rows), 1)
    stats[listed] = row_stats
    order = torch.cat([listed.new_tensor([len(listed)]), listed, rest]).to(torch.int32)
    counts = torch.stack([masked.sum(), agrees.sum()]).to(torch.int32)
    return terms[0] + beta * terms[1], terms, stats, order, counts


def gradient(
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    stats: torch.Tensor,
    order: torch.Tensor,
    counts: torch.Tensor,
    temperature: float,
    beta: float,
) -> torch.Tensor:
    """The gradient in the logits, like them; these may be some columns of the rows whose `stats`
    there are, with labels counted from the first of them: one outside is none of theirs.

    With p = softmax(x), q = softmax(x / temperature) and H the entropy of q,

        d CE / d x_i = p_i - [i = label],   d H / d x_i = -q_i (log q_i + H) / temperature.
    """
    dtype = arithmetic(logits)
    vocab = logits.shape[-1]
    listed = order[1 : 1 + int(order[0])].long()
    x, label = logits.reshape(-1, vocab)[listed].to(dtype), labels.reshape(-1)[listed]
    m, log_sum, tempered, entropy = (column[:, None] for column in stats[listed].unbind(-1))
    masked, agreeing = counts.clamp(min=1).to(dtype)

    x = x - m
    cross = (x - log_sum).exp()
    inside = ((label >= 0) & (label < vocab)).to(dtype)
    cross = cross.scatter_add(-1, label.clamp(0, vocab - 1)[:, None], -inside[:, None])
    q_log = x / temperature - tempered
    q = q_log.exp()
    tilt = torch.where(q > 0, -q * (q_log + entropy) / temperature, 0.0)
    both = cross / masked + torch.where(entropy >= 0, beta * tilt / agreeing, 0.0)
    out = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    out.view(-1, vocab)[listed] = (grad_loss.to(dtype) * both).to(logits.dtype)
    return out


@implements("certainty_forcing_loss", "reference")
def _forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
    temperature: float,
    beta: float,
    inplace_backward: bool,
) -> tuple[torch.Tensor, ...]:
    outputs: tuple[torch.Tensor, ...] = _Reference.apply(
        logits, labels, masked, temperature, beta, inplace_backward
    )
    return outputs


implements("certainty_forcing_loss_backward", "reference")(gradient)


@implements("certainty_forcing_loss_backward_", "reference")
def _gradient_(grad_loss: torch.Tensor, logits: torch.Tensor, *saved: Any) -> None:
    logits.copy_(gradient(grad_loss, logits, *saved))


class _Reference(torch.autograd.Function):
    """The two passes as one differentiable function."""

    @staticmethod
    def forward(
        logits: torch.Tensor,
        labels: torch.Tensor,
        masked: torch.Tensor,
        temperature: float,
        beta: float,
        inplace_backward: bool,
    ) -> tuple[torch.Tensor, ...]:
        return forward(logits, labels, masked, temperature, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        logits, labels, _, *ctx.options, ctx.inplace = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(logits, labels, *output[2:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: object) -> tuple[Any, ...]:
        logits, *saved = ctx.saved_tensors
        grad = gradient(grad_loss, logits, *saved, *ctx.options)
        if ctx.inplace:
            with torch.no_grad():
                grad = logits.copy_(grad)
        return grad, None, None, None, None, None
