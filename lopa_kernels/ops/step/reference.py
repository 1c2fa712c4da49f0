"""One round of LoPA's Algorithm 1 (arXiv 2512.16229), written for reading.

Sequence by sequence, in Python lists; the numbered comments are the steps of docs/operators.md.
The oracle of every other backend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lopa_kernels._dispatch import implements
from lopa_kernels.ops.branch.reference import blend, rankable, reduce_scores, select_columns
from lopa_kernels.ops.confidence.reference import token_confidence
from lopa_kernels.state import LopaState, LopaStep
from lopa_kernels.status import Status


@dataclass
class Settings:
    """The arguments of the schema from `out_branches` on, in its order."""

    branches: int
    window: int
    tau_conf: float
    tau_add: float
    tau_act: float
    block_size: int
    max_new_tokens: int
    mask_id: int
    eos_id: int
    accept: str
    fallback: str
    reduction: str
    fraction: float
    group: int | None
    alpha: float
    shift: bool
    force_anchor: bool


@dataclass
class Stats:
    """Statistics of the logits rows of one branch."""

    token: list[int]
    prob: list[float]
    score: list[float]

    def by_column(self, carry: tuple[int, float, float]) -> Stats:
        """Moved one column on, for models whose row c predicts column c + 1."""
        token, prob, score = carry
        return Stats([token, *self.token[:-1]], [prob, *self.prob[:-1]], [score, *self.score[:-1]])


@dataclass
class Sequence:
    """One sequence's slice of a LopaState; dead slots are left out."""

    tokens: list[list[int]]  # live branches, each cut to its length
    creation: list[float]
    eos: list[bool]
    cache_len: int
    commit_len: int
    prompt_len: int
    carry: tuple[int, float, float]

    def open_columns(self, branch: int, mask_id: int) -> list[int]:
        first = max(0, self.prompt_len - self.cache_len)
        window = self.tokens[branch]
        return [c for c in range(first, len(window)) if window[c] == mask_id]


@dataclass
class Round:
    """What a round makes of a Sequence."""

    next: Sequence
    done: bool
    winner: int
    filled: int
    confidence: list[float]
    committed: list[int]
    status: Status


def read_sequence(state: LopaState, b: int, mask_id: int) -> Sequence | None:
    """None where a field is out of range: such a sequence is never worked on."""
    _, slots, window = state.tokens.shape
    branches = int(state.branches[b])
    cache_len = int(state.cache_len[b])
    commit_len = int(state.commit_len[b])
    prompt_len = int(state.prompt_len[b])
    if not 1 <= branches <= slots or min(cache_len, commit_len, prompt_len) < 0:
        return None
    if cache_len + window > torch.iinfo(torch.int32).max:
        return None
    lengths = state.length[b, :branches].tolist()
    if any(not commit_len <= n <= window or n < 0 or cache_len + n < prompt_len for n in lengths):
        return None
    sequence = Sequence(
        tokens=[state.tokens[b, k, :n].tolist() for k, n in enumerate(lengths)],
        creation=state.creation[b, :branches].tolist(),
        eos=state.eos[b, :branches].tolist(),
        cache_len=cache_len,
        commit_len=commit_len,
        prompt_len=prompt_len,
        carry=(
            int(state.carry_token[b]),
            float(state.carry_prob[b]),
            float(state.carry_score[b]),
        ),
    )
    for k in range(branches):
        if any(c < commit_len for c in sequence.open_columns(k, mask_id)):
            return None
    return sequence


def needed_columns(sequence: Sequence, branch: int, mask_id: int, shift: bool) -> list[int]:
    """Window columns whose logits row the round reads, for one branch."""
    columns = sequence.open_columns(branch, mask_id)
    if not shift:
        return columns
    rows = {c - 1 for c in columns if c > 0}
    if sequence.commit_len > 0:
        rows.add(sequence.commit_len - 1)  # becomes the carry
    return sorted(rows)


def run_round(sequence: Sequence, stats: list[Stats], s: Settings, status: Status) -> Round:
    T = s.block_size
    # 1. Statistics by column.
    by_column = [branch.by_column(sequence.carry) for branch in stats] if s.shift else stats

    # 2. Branch confidence.
    confidence = []
    for k, window in enumerate(sequence.tokens):
        scores = [by_column[k].score[c] for c in sequence.open_columns(k, s.mask_id)]
        if not all(math.isfinite(score) for score in scores):
            status |= Status.NONFINITE
        reduced = reduce_scores([rankable(x) for x in scores], s.reduction, s.fraction, s.group)
        value = blend(rankable(sequence.creation[k]), reduced, s.alpha) if window else 1.0
        confidence.append(float(torch.tensor(value, dtype=torch.float32)))

    # 3. Winner: equal confidence goes to the lowest lookahead slot, and to the anchor last.
    order = [*range(1, len(sequence.tokens)), 0]
    winner = 0 if s.force_anchor else max(order, key=lambda k: confidence[k])
    own = by_column[winner]

    # 4. Commit.
    U = sequence.commit_len
    committed = sequence.tokens[winner][:U]
    carry = sequence.carry
    if s.shift and U > 0:
        row = stats[winner]
        carry = (row.token[U - 1], row.prob[U - 1], row.score[U - 1])

    # 5. Fill the winner, and 6. rank what stays open.
    fill, lookahead = select_columns(
        own.token,
        own.prob,
        own.score,
        sequence.tokens[winner],
        sequence.cache_len,
        sequence.prompt_len,
        s.branches - 1,
        float(torch.tensor(s.tau_conf, dtype=torch.float32)),
        s.tau_act,
        T,
        s.mask_id,
        s.accept,
        s.fallback,
    )
    had_open = bool(sequence.open_columns(winner, s.mask_id))
    anchor = list(sequence.tokens[winner])
    anchor_eos = sequence.eos[winner]
    for c in fill:
        anchor[c] = own.token[c]
        anchor_eos |= anchor[c] == s.eos_id

    # 8. Slide by U (first, so that the steps below speak of the next window).
    cache_len = sequence.cache_len + U
    anchor = anchor[U:]
    first = max(0, sequence.prompt_len - cache_len)

    # 7. The leading complete blocks of the next anchor are committed by the next round.
    commit_len = first
    while True:
        end = (cache_len + commit_len - sequence.prompt_len) // T * T + T
        end += sequence.prompt_len - cache_len
        if end > len(anchor) or s.mask_id in anchor[commit_len:end]:
            break
        commit_len = end

    if len(anchor) > s.window:
        status |= Status.WINDOW_FULL
        anchor = anchor[: s.window]
        commit_len = min(commit_len, s.window)
        lookahead = []

    # 6. Spawn.
    branches = [anchor]
    creation = [1.0]
    eos = [anchor_eos]
    for c in lookahead:
        window = list(anchor)
        window[c - U] = own.token[c]
        branches.append(window)
        creation.append(rankable(own.score[c]))
        eos.append(anchor_eos or own.token[c] == s.eos_id)

    # 9. Open blocks.
    opened = waiting = False
    for k, window in enumerate(branches):
        generated = cache_len + len(window) - sequence.prompt_len
        if Status.WINDOW_FULL in status or eos[k]:
            continue
        if math.ceil(generated / T) >= s.max_new_tokens // T:
            continue
        if generated > 0 and window:
            start = (generated - 1) // T * T + sequence.prompt_len - cache_len
            masks = window[max(start, 0) :].count(s.mask_id)
            if (len(window) - start - masks) / T < s.tau_add:
                continue
        fits = len(window) + T <= s.window
        if fits:
            window.extend([s.mask_id] * T)
        if k == 0:
            opened, waiting = fits, not fits

    # 10. Done.
    still_open = s.mask_id in branches[0][first:]
    stalled = (
        had_open and not fill and len(branches) == 1 and U == 0 and commit_len == 0 and not opened
    )
    if stalled:
        status |= Status.STALLED
    done = (not still_open and not waiting) or stalled or Status.WINDOW_FULL in status
    following = Sequence(branches, creation, eos, cache_len, commit_len, sequence.prompt_len, carry)
    return Round(following, done, winner, len(fill), confidence, committed, status)


def pass_through(state: LopaState, b: int, out: LopaStep, s: Settings) -> None:
    """A sequence that is done, or cannot be worked on, keeps its state."""
    _, slots, window = state.tokens.shape
    k, w = min(slots, s.branches), min(window, s.window)
    out.state.tokens[b] = s.mask_id
    out.state.tokens[b, :k, :w] = state.tokens[b, :k, :w]
    out.state.length[b] = 0
    out.state.length[b, :k] = state.length[b, :k].clamp(0, w)
    out.state.creation[b] = 0.0
    out.state.creation[b, :k] = state.creation[b, :k]
    out.state.eos[b] = False
    out.state.eos[b, :k] = state.eos[b, :k]
    out.state.branches[b] = state.branches[b].clamp(1, k)
    for name in ("cache_len", "commit_len", "prompt_len"):
        getattr(out.state, name)[b] = getattr(state, name)[b]
    for name in ("carry_token", "carry_prob", "carry_score"):
        getattr(out.state, name)[b] = getattr(state, name)[b]
    out.state.done[b] = True
    out.winner[b] = 0
    out.filled[b] = 0
    out.confidence[b] = -math.inf
    out.committed[b] = -1


def write_round(result: Round, b: int, out: LopaStep, s: Settings) -> None:
    state = out.state
    state.tokens[b] = s.mask_id
    state.length[b] = 0
    state.creation[b] = 0.0
    state.eos[b] = False
    for k, window in enumerate(result.next.tokens):
        state.tokens[b, k, : len(window)] = torch.tensor(window, dtype=torch.int64)
        state.length[b, k] = len(window)
        state.creation[b, k] = result.next.creation[k]
        state.eos[b, k] = result.next.eos[k]
    state.branches[b] = len(result.next.tokens)
    state.cache_len[b] = result.next.cache_len
    state.commit_len[b] = result.next.commit_len
    state.prompt_len[b] = result.next.prompt_len
    state.carry_token[b], state.carry_prob[b], state.carry_score[b] = result.next.carry
    state.done[b] = result.done
    out.winner[b] = result.winner
    out.filled[b] = result.filled
    out.confidence[b] = -math.inf
    out.confidence[b, : len(result.confidence)] = torch.tensor(result.confidence)
    out.committed[b] = -1
    out.committed[b, : len(result.committed)] = torch.tensor(result.committed, dtype=torch.int64)
    out.status[b] = int(result.status)


def step_from_stats(
    token: torch.Tensor,
    prob: torch.Tensor,
    score: torch.Tensor,
    state: LopaState,
    s: Settings,
    status: torch.Tensor,
) -> LopaStep:
    """`token`, `prob`, `score` [B, K, W] by logits row, in float32; `status` int32 [B] so far."""
    batch, slots, window = state.tokens.shape
    new = state.tokens.new_empty
    out = LopaStep(
        LopaState(
            new(batch, s.branches, s.window),
            new(batch, s.branches, dtype=torch.int32),
            new(batch, s.branches, dtype=torch.float32),
            new(batch, s.branches, dtype=torch.bool),
            *(new(batch, dtype=tensor.dtype) for tensor in state[4:]),
        ),
        winner=new(batch, dtype=torch.int32),
        filled=new(batch, dtype=torch.int32),
        confidence=new(batch, slots, dtype=torch.float32),
        committed=new(batch, window),
        status=status.clone(),
    )
    for b in range(batch):
        sequence = None if state.done[b] else read_sequence(state, b, s.mask_id)
        if sequence is None:
            pass_through(state, b, out, s)
            if not state.done[b]:
                out.status[b] |= int(Status.BAD_STATE)
            continue
        stats = [
            Stats(token[b, k].tolist(), prob[b, k].tolist(), score[b, k].tolist())
            for k in range(len(sequence.tokens))
        ]
        write_round(run_round(sequence, stats, s, Status(int(status[b]))), b, out, s)
    return out


def flat(step: LopaStep) -> tuple[torch.Tensor, ...]:
    return (*step.state, *step[1:])


@implements("branch_step", "reference")
def branch_step(
    token: torch.Tensor, prob: torch.Tensor, score: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, ...]:
    state, settings = LopaState(*args[:12]), Settings(*args[12:29])
    status = torch.zeros_like(state.branches)
    return flat(step_from_stats(token, prob, score, state, settings, status))


@implements("lopa_step", "reference")
def lopa_step(
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    seed: torch.Tensor | None,
    step: torch.Tensor | None,
    *args: Any,
) -> tuple[torch.Tensor, ...]:
    state, settings = LopaState(*args[:12]), Settings(*args[12:29])
    metric, temperature, top_k, top_p = args[29:]
    batch, slots, window = state.tokens.shape
    table = logits.reshape(-1, logits.shape[-1])
    if rows is None:
        rows = torch.arange(len(table), dtype=torch.int32, device=logits.device)
        rows = rows.view(batch, slots, window)
    status = torch.zeros_like(state.branches)
    wanted = torch.full_like(rows, -1)
    for b in range(batch):
        sequence = None if state.done[b] else read_sequence(state, b, settings.mask_id)
        if sequence is None:
            continue
        for k in range(len(sequence.tokens)):
            for c in needed_columns(sequence, k, settings.mask_id, settings.shift):
                if 0 <= rows[b, k, c] < len(table):
                    wanted[b, k, c] = rows[b, k, c]
                else:
                    status[b] |= int(Status.MISSING_ROW)
    token, prob, score = token_confidence(
        table, wanted, seed, step, metric, temperature, top_k, top_p
    )
    unusable = table.isnan().any(-1) | ~table.isfinite().any(-1)
    if len(table) == 0:
        unusable = unusable.new_zeros(1)
    flagged = (unusable[wanted.clamp(min=0).long()] & (wanted >= 0)).flatten(1).any(1)
    status |= int(Status.NONFINITE) * flagged.to(torch.int32)
    return flat(step_from_stats(token, prob.float(), score.float(), state, settings, status))


def _copy_to(outputs: tuple[torch.Tensor, ...], results: tuple[torch.Tensor, ...]) -> None:
    for output, result in zip(outputs, results, strict=True):
        output.copy_(result)


@implements("branch_step_out", "reference")
def branch_step_out(*args: Any) -> None:
    _copy_to(args[32:], branch_step(*args[:32]))


@implements("branch_step_", "reference")
def branch_step_(*args: Any) -> None:
    _copy_to((*args[3:15], *args[32:]), branch_step(*args[:32]))


@implements("lopa_step_out", "reference")
def lopa_step_out(*args: Any) -> None:
    _copy_to(args[37:], lopa_step(*args[:37]))


@implements("lopa_step_", "reference")
def lopa_step_(*args: Any) -> None:
    _copy_to((*args[4:16], *args[37:]), lopa_step(*args[:37]))


@implements("needed_rows", "reference")
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, slots, window = tokens.shape
    floats = torch.zeros_like(cache_len, dtype=torch.float32)
    state = LopaState(
        tokens=tokens,
        length=length,
        creation=torch.zeros_like(length, dtype=torch.float32),
        eos=torch.zeros_like(length, dtype=torch.bool),
        branches=branches,
        cache_len=cache_len,
        commit_len=commit_len,
        prompt_len=prompt_len,
        carry_token=torch.zeros_like(cache_len, dtype=torch.int64),
        carry_prob=floats,
        carry_score=floats,
        done=done,
    )
    index = tokens.new_zeros(capacity)
    rows = torch.full_like(tokens, -1, dtype=torch.int32)
    count = 0
    for b in range(batch):
        sequence = None if done[b] else read_sequence(state, b, mask_id)
        if sequence is None:
            continue
        for k in range(len(sequence.tokens)):
            for c in needed_columns(sequence, k, mask_id, shift):
                if count < capacity:
                    index[count] = (b * slots + k) * window + c
                    rows[b, k, c] = count
                count += 1
    return index, rows, torch.tensor([count], dtype=torch.int32, device=tokens.device)
