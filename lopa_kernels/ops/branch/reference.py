"""The branch room written for reading: Python loops over sequences, branches and blocks.

The oracle of every other backend. Scores are compared as they come (fp32 in a round), thresholds
in the same precision, shares of a block as Python floats; sums are formed in double.
"""

from __future__ import annotations

import math

import torch

from lopa_kernels._dispatch import implements


def rankable(score: float) -> float:
    """NaN ranks below every number."""
    return -math.inf if math.isnan(score) else score


def reduce_scores(scores: list[float], reduction: str, fraction: float, group: int | None) -> float:
    """F of :func:`lopa_kernels.branch_confidence`, over the open columns' scores in order."""
    n = len(scores)
    if n == 0:
        return 1.0
    if -math.inf in scores:
        return -math.inf
    if reduction == "bottom":
        lowest = sorted(scores)[: max(1, math.floor(n * fraction))]
        return math.fsum(lowest) / len(lowest)
    if reduction == "group" and group is not None and n >= group:
        windows = (scores[i : i + group] for i in range(n - group + 1))
        return min(math.fsum(window) for window in windows) / group
    if reduction == "min":
        return min(scores)
    return math.fsum(scores) / n


def blend(creation: float, reduced: float, alpha: float) -> float:
    """A term of weight zero is left out, infinite or not."""
    if alpha == 0:
        return reduced
    if alpha == 1:
        return creation
    return alpha * creation + (1 - alpha) * reduced


@implements("branch_confidence", "reference")
def branch_confidence(
    score: torch.Tensor,
    open: torch.Tensor,
    creation: torch.Tensor,
    branches: torch.Tensor | None,
    length: torch.Tensor | None,
    reduction: str,
    fraction: float,
    group: int | None,
    alpha: float,
) -> torch.Tensor:
    batch, slots, window = score.shape
    out = torch.empty_like(creation)
    for b in range(batch):
        for k in range(slots):
            if branches is not None and k >= branches[b]:
                out[b, k] = -math.inf
                continue
            columns = window if length is None else int(length[b, k])
            if columns <= 0:
                out[b, k] = 1.0
                continue
            is_open = open[b, k, :columns]
            scores = [rankable(x) for x in score[b, k, :columns][is_open].tolist()]
            reduced = reduce_scores(scores, reduction, fraction, group)
            out[b, k] = blend(rankable(float(creation[b, k])), reduced, alpha)
    return out


def select_columns(
    token: list[int],
    prob: list[float],
    score: list[float],
    tokens: list[int],
    cache_len: int,
    prompt_len: int,
    lookahead: int,
    tau_conf: float,
    tau_act: float,
    block_size: int,
    mask_id: int,
    accept: str,
    fallback: str,
) -> tuple[list[int], list[int]]:
    """Steps 5 and 6 for one window: columns to fill (ascending), and the others by score."""
    first = max(0, prompt_len - cache_len)
    open_columns = [c for c in range(first, len(tokens)) if tokens[c] == mask_id]
    fillable = [c for c in open_columns if token[c] >= 0 and token[c] != mask_id]

    def block_of(column: int) -> int:
        return (cache_len + column - prompt_len) // block_size

    def best(columns: list[int]) -> int:
        # The lowest column among equals: max keeps the first.
        return max(columns, key=lambda c: rankable(score[c]))

    def is_activated(block: int) -> bool:
        if block == 0:
            return True  # the prompt counts as complete
        masks = sum(block_of(c) == block - 1 for c in open_columns)
        return (block_size - masks) / block_size >= tau_act

    value = prob if accept == "prob" else score
    fill: list[int] = []
    for block in sorted({block_of(c) for c in fillable}):
        candidates = [c for c in fillable if block_of(c) == block]
        accepted = [c for c in candidates if value[c] > tau_conf]
        if not accepted and fallback == "block" and is_activated(block):
            accepted = [best(candidates)]
        fill += accepted
    if not fill and fallback == "window" and fillable:
        fill = [best(fillable)]
    rest = sorted((c for c in fillable if c not in fill), key=lambda c: (-rankable(score[c]), c))
    return fill, rest[:lookahead]


@implements("select_positions", "reference")
def select_positions(
    token: torch.Tensor,
    prob: torch.Tensor,
    score: torch.Tensor,
    tokens: torch.Tensor,
    length: torch.Tensor,
    cache_len: torch.Tensor,
    prompt_len: torch.Tensor,
    lookahead: int,
    tau_conf: float,
    *config: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = tokens.shape[0]
    fill = torch.zeros_like(tokens, dtype=torch.bool)
    columns = torch.full((batch, lookahead), -1, dtype=torch.int32, device=tokens.device)
    filled = torch.zeros_like(length)
    tau = float(torch.tensor(tau_conf, dtype=prob.dtype))
    for b in range(batch):
        chosen, rest = select_columns(
            token[b].tolist(),
            prob[b].tolist(),
            score[b].tolist(),
            tokens[b, : int(length[b])].tolist(),
            int(cache_len[b]),
            int(prompt_len[b]),
            lookahead,
            tau,
            *config,  # type: ignore[arg-type]
        )
        fill[b, chosen] = True
        columns[b, : len(rest)] = torch.tensor(rest, dtype=torch.int32)
        filled[b] = len(chosen)
    return fill, columns, filled


@implements("spawn_branches", "reference")
def spawn_branches(
    tokens: torch.Tensor,
    eos: torch.Tensor,
    token: torch.Tensor,
    score: torch.Tensor,
    columns: torch.Tensor,
    eos_id: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, _ = tokens.shape
    slots = columns.shape[1] + 1
    out = tokens[:, None].repeat(1, slots, 1)
    creation = torch.zeros(batch, slots, dtype=score.dtype, device=score.device)
    creation[:, 0] = 1.0
    out_eos = torch.zeros(batch, slots, dtype=torch.bool, device=eos.device)
    out_eos[:, 0] = eos
    branches = torch.ones(batch, dtype=torch.int32, device=tokens.device)
    for b in range(batch):
        for k, column in enumerate(columns[b].tolist(), start=1):
            if column < 0:
                break
            out[b, k, column] = token[b, column]
            creation[b, k] = score[b, column]
            out_eos[b, k] = eos[b] | bool(eos_id >= 0 and token[b, column] == eos_id)
            branches[b] += 1
    return out, creation, out_eos, branches
