"""The rules of a round, and its status words, each on a state small enough to follow by eye."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import run_on
from small_states import CONFIG, M, make_state, stats
from states import MASK, VOCAB
from targets import TARGETS, Target, over

from lopa_kernels import Status, branch_step, initial_state, lopa_step, needed_rows


@over(TARGETS)
class TestRules:
    """The rules of a round, each on a state small enough to follow by eye."""

    def test_accepts_above_threshold_strictly(self, target: Target) -> None:
        state = make_state([[M, M, M, M]], columns=8)
        out = run_on(target, branch_step, *stats([[0.5, 0.6, 0.7, 0.1] + [0.0] * 4]), state, CONFIG)
        assert out.state.tokens[0, 0, :4].tolist() == [M, 1, 1, M]
        assert int(out.filled) == 2

    def test_activated_block_forces_its_best_and_ties_go_left(self, target: Target) -> None:
        state = make_state([[M, M, M, M, M, M, M, M]])
        out = run_on(
            target, branch_step, *stats([[0.1, 0.4, 0.4, 0.2, 0.5, 0.5, 0.1, 0.1]]), state, CONFIG
        )
        # The second block is not activated: the first is not filled to tau_act.
        assert out.state.tokens[0, 0].tolist() == [M, 1, M, M, M, M, M, M]

    def test_unactivated_block_accepts_by_confidence(self, target: Target) -> None:
        state = make_state([[M, M, M, M, M, M, M, M]])
        out = run_on(
            target, branch_step, *stats([[0.1, 0.4, 0.3, 0.2, 0.9, 0.5, 0.1, 0.1]]), state, CONFIG
        )
        assert out.state.tokens[0, 0].tolist() == [M, 1, M, M, 1, M, M, M]

    def test_window_fallback_fills_one_column_of_all(self, target: Target) -> None:
        state = make_state([[M, M, M, M, M, M, M, M]])
        config = replace(CONFIG, fallback="window")
        out = run_on(
            target, branch_step, *stats([[0.1, 0.4, 0.3, 0.2, 0.45, 0.5, 0.1, 0.1]]), state, config
        )
        assert out.state.tokens[0, 0].tolist() == [M, M, M, M, M, 1, M, M]

    def test_winner_ties_prefer_lookahead_and_the_lowest_slot(self, target: Target) -> None:
        state = make_state([[M, M, M, M], [2, M, M, M], [3, M, M, M]])
        out = run_on(target, branch_step, *stats([[0.4] * 4] * 3), state, CONFIG)
        assert int(out.winner) == 1
        assert out.confidence.tolist() == [[pytest.approx(0.4)] * 3]

    def test_anchor_wins_when_better_or_forced(self, target: Target) -> None:
        state = make_state([[M, M, M, M], [2, M, M, M]])
        better = stats([[0.4] * 4, [0.3] * 4])
        assert int(run_on(target, branch_step, *better, state, CONFIG).winner) == 0
        forced = replace(CONFIG, force_anchor=True)
        worse = stats([[0.3] * 4, [0.4] * 4])
        assert int(run_on(target, branch_step, *worse, state, forced).winner) == 0

    def test_spawns_the_best_open_columns(self, target: Target) -> None:
        state = make_state([[M, M, M, M], [2, M, M, M], [3, M, M, M]], columns=8)
        scores = [0.2, 0.3, 0.1, 0.3] + [0.0] * 4
        out = run_on(target, branch_step, *stats([scores, [0.0] * 8, [0.0] * 8]), state, CONFIG)
        # Column 1 is forced; 3, then 0, make lookahead branches.
        assert out.state.tokens[0, :, :4].tolist() == [[M, 1, M, M], [M, 1, M, 1], [1, 1, M, M]]
        assert out.state.creation[0].tolist() == [1.0, pytest.approx(0.3), pytest.approx(0.2)]
        assert int(out.state.branches) == 3

    def test_opens_blocks_branch_by_branch(self, target: Target) -> None:
        state = make_state([[M, M, M, M], [M, M, M, M]], columns=8)
        scores = [0.9, 0.3, 0.1, 0.2] + [0.0] * 4
        out = run_on(target, branch_step, *stats([scores, scores]), state, CONFIG)
        # tau_add = 0.5 of 4: the anchor has one token, the lookahead two.
        assert out.state.length[0].tolist() == [4, 8]

    def test_commits_slides_and_opens(self, target: Target) -> None:
        state = make_state(
            [[1, 2, 3, 4, M, 5, 6, 7]], cache_len=4, commit_len=4, prompt_len=4, columns=8
        )
        out = run_on(target, branch_step, *stats([[0.0] * 4 + [0.9] + [0.0] * 3]), state, CONFIG)
        assert out.committed.tolist() == [[1, 2, 3, 4, -1, -1, -1, -1]]
        assert int(out.state.cache_len) == 8
        assert int(out.state.commit_len) == 4
        assert out.state.tokens[0, 0].tolist() == [1, 5, 6, 7, M, M, M, M]
        assert int(out.state.length) == 8

    def test_a_block_waits_for_room_and_the_sequence_is_not_done(self, target: Target) -> None:
        state = make_state([[1, 1, 1, M]], columns=4)
        config = replace(CONFIG, tau_add=1.0, max_new_tokens=8)
        out = run_on(target, branch_step, *stats([[0.0, 0.0, 0.0, 0.9]]), state, config)
        assert (int(out.state.length), bool(out.state.done)) == (4, False)
        out = run_on(target, branch_step, *stats([[0.0] * 4]), out.state, config)
        assert out.committed.tolist() == [[1, 1, 1, 1]]
        assert (int(out.filled), int(out.state.length), bool(out.state.done)) == (0, 4, False)

    def test_eos_stops_opening_but_not_filling(self, target: Target) -> None:
        config = replace(CONFIG, eos_id=1)
        state = make_state([[2, 2, M, M]], columns=8)
        out = run_on(target, branch_step, *stats([[0.0, 0.0, 0.9, 0.2] + [0.0] * 4]), state, config)
        assert bool(out.state.eos[0, 0])
        assert (int(out.state.length[0, 0]), bool(out.state.done)) == (4, False)
        out = run_on(target, branch_step, *stats([[0.9] * 8]), out.state, config)
        assert bool(out.state.done)

    def test_block_completed_by_lookahead_only_is_not_committed(self, target: Target) -> None:
        config = replace(CONFIG, branches=2, tau_conf=0.95)
        state = make_state([[1, 1, M, M]], columns=8)
        out = run_on(target, branch_step, *stats([[0, 0, 0.9, 0.8, 0, 0, 0, 0.0]]), state, config)
        assert out.state.tokens[0, 1, :4].tolist() == [1, 1, 1, 1]
        assert int(out.state.commit_len) == 0

    def test_shift_moves_statistics_and_the_carry(self, target: Target) -> None:
        config = replace(CONFIG, shift=True, tau_conf=0.2)
        state = make_state([[M, M, M, M]], columns=8)
        token = torch.arange(8).view(1, 1, 8)
        score = torch.tensor([[[0.3, 0.1, 0.6] + [0.0] * 5]])
        out = run_on(target, branch_step, token, score, score, state, config)
        # Column 0 takes the carried token (0.25 > 0.2), column 1 row 0's, column 3 row 2's.
        assert out.state.tokens[0, 0, :4].tolist() == [7, 0, M, 2]
        assert int(out.state.carry_token) == 7  # no commit: the carry stays

    def test_carry_is_the_last_committed_row(self, target: Target) -> None:
        config = replace(CONFIG, shift=True)
        state = make_state([[1, 2, 3, 4, M, M, M, M]], commit_len=4, columns=8)
        token = torch.arange(8).view(1, 1, 8)
        score = torch.linspace(0.1, 0.8, 8).view(1, 1, 8)
        out = run_on(target, branch_step, token, score, score, state, config)
        assert int(out.state.carry_token) == 3
        assert float(out.state.carry_score) == pytest.approx(0.4)

    def test_a_prediction_of_the_mask_fills_nothing(self, target: Target) -> None:
        state = make_state([[M, M, M, M]], columns=8)
        out = run_on(target, branch_step, *stats([[0.9] * 8], token=MASK), state, CONFIG)
        assert (int(out.filled), bool(out.state.done)) == (0, True)
        assert int(out.status) == Status.STALLED

    def test_prompt_may_hold_the_mask_id(self, target: Target) -> None:
        prompt = torch.tensor([[1, MASK, 2]])
        config = replace(CONFIG, branches=2, window=8)
        state = initial_state(prompt, config)
        out = run_on(target, branch_step, *stats([[0.9] * 7]), state, config)
        assert out.committed[0, :3].tolist() == [1, MASK, 2]
        assert (int(out.filled), int(out.state.cache_len)) == (4, 3)

    def test_next_window_too_small(self, target: Target) -> None:
        config = replace(CONFIG, window=4)
        state = make_state([[M] * 8])
        out = run_on(target, branch_step, *stats([[0.3] * 8]), state, config)
        assert (int(out.status), bool(out.state.done)) == (Status.WINDOW_FULL, True)
        assert out.state.length.tolist() == [[4]]

    def test_done_sequences_pass_through(self, target: Target) -> None:
        state = make_state([[1, 2, 3, 4]], columns=8)._replace(done=torch.tensor([True]))
        out = run_on(target, branch_step, *stats([[0.9] * 8]), state, CONFIG)
        assert int(out.filled) == 0
        for name, tensor in state._asdict().items():
            assert torch.equal(getattr(out.state, name), tensor), name


@over(TARGETS)
class TestStatus:
    def test_nan_in_a_needed_row_is_reported(self, target: Target) -> None:
        state = make_state([[M, 1, M, M]], columns=4)
        logits = torch.zeros(1, 1, 4, VOCAB)
        logits[..., 2] = 5.0
        clean = run_on(target, lopa_step, logits, state, CONFIG)
        assert int(clean.status) == 0
        logits[0, 0, 1] = float("nan")  # column 1 is not open
        assert int(run_on(target, lopa_step, logits, state, CONFIG).status) == 0
        logits[0, 0, 2, 4] = float("nan")
        out = run_on(target, lopa_step, logits, state, CONFIG)
        assert int(out.status) == Status.NONFINITE
        assert torch.equal(out.state.tokens, clean.state.tokens)

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_rows_without_finite_logits_still_decode(self, target: Target, value: float) -> None:
        state = make_state([[M, M, M, M]], columns=4)
        config = replace(CONFIG, max_new_tokens=4)
        logits = torch.full((1, 1, 4, VOCAB), value)
        for filled in range(1, 5):
            out = run_on(target, lopa_step, logits, state, config)
            assert int(out.status) == Status.NONFINITE
            state = out.state
            assert int((state.tokens != MASK).sum()) == filled
        assert bool(state.done)
        assert state.tokens.tolist() == [[[0, 0, 0, 0]]]

    def test_rows_missing_or_out_of_range(self, target: Target) -> None:
        state = make_state([[M, M, 1, M]], columns=4)
        logits = torch.zeros(2, VOCAB)
        logits[:, 2] = 5.0
        for bad in (-1, 2, 2**31 - 1):
            rows = torch.tensor([[[0, bad, -1, 1]]], dtype=torch.int32)
            out = run_on(target, lopa_step, logits, state, CONFIG, rows)
            assert int(out.status) == Status.MISSING_ROW | Status.NONFINITE
            assert out.state.tokens.tolist() == [[[2, M, 1, 2]]]

    @pytest.mark.parametrize("live", [0, -1, 3, 2**31 - 1])
    def test_more_branches_than_slots(self, target: Target, live: int) -> None:
        state = make_state([[M, M, 1, M], [M, 2, 1, M]], columns=4)
        bad = state._replace(branches=torch.tensor([live], dtype=torch.int32))
        out = run_on(target, lopa_step, torch.zeros(1, 2, 4, VOCAB), bad, CONFIG)
        assert (int(out.status), bool(out.state.done)) == (Status.BAD_STATE, True)
        assert (int(out.winner), int(out.filled)) == (0, 0)
        assert torch.equal(out.state.tokens, state.tokens)
        assert int(run_on(target, needed_rows, bad, CONFIG).count) == 0

    def test_capacity_of_needed_rows(self, target: Target) -> None:
        state = make_state([[M, M, 1, M]], columns=4)
        needed = run_on(target, needed_rows, state, CONFIG, capacity=2)
        assert (needed.index.tolist(), int(needed.count)) == ([0, 1], 3)
        assert needed.rows.tolist() == [[[0, 1, -1, -1]]]
        wide = run_on(target, needed_rows, state, CONFIG, capacity=6)
        assert wide.index.tolist() == [0, 1, 3, 0, 0, 0]
