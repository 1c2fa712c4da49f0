"""branch_confidence, select_positions and spawn_branches."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import MASK, assert_same, random_config, random_state, random_stats

from lopa_kernels import (
    LopaConfig,
    branch_confidence,
    branch_step,
    select_positions,
    spawn_branches,
)

BACKENDS = ["reference", "cpu"]
INF = float("inf")


def confidence_of(scores: list[float], backend: str, **options: object) -> float:
    score = torch.tensor([[scores]])
    opened = torch.ones_like(score, dtype=torch.bool)
    creation = torch.tensor([[options.pop("creation", 0.0)]])
    return float(branch_confidence(score, opened, creation, backend=backend, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
class TestBranchConfidence:
    def test_reductions(self, backend: str) -> None:
        scores = [-1.0, -4.0, -2.0, -8.0, -3.0]
        for expected, options in (
            (-3.6, {}),
            (-3.6, {"reduction": "bottom", "fraction": 1.0}),
            (-6.0, {"reduction": "bottom", "fraction": 0.5}),
            (-8.0, {"reduction": "bottom", "fraction": 0.01}),
            (-8.0, {"reduction": "min"}),
            (-5.5, {"reduction": "group", "group": 2}),
            (-14 / 3, {"reduction": "group", "group": 3}),
            (-3.6, {"reduction": "group", "group": 6}),
            (-3.6 * 0.75 + 0.25 * -2, {"alpha": 0.25, "creation": -2.0}),
            (-2.0, {"alpha": 1.0, "creation": -2.0}),
        ):
            assert confidence_of(scores, backend, **options) == pytest.approx(expected, rel=1e-6)

    def test_no_open_column_gives_one(self, backend: str) -> None:
        score = torch.full((1, 1, 2), -5.0)
        closed = torch.zeros(1, 1, 2, dtype=torch.bool)
        creation = torch.tensor([[-3.0]])
        for expected, alpha in ((1.0, 0.0), (-1.0, 0.5), (-3.0, 1.0)):
            got = branch_confidence(score, closed, creation, alpha=alpha, backend=backend)
            assert float(got) == expected
        assert confidence_of([], backend, alpha=0.5, creation=-3.0) == 1.0  # no column at all

    def test_groups_run_over_open_columns_only(self, backend: str) -> None:
        score = torch.tensor([[[-1.0, -99.0, -2.0, -3.0]]])
        opened = torch.tensor([[[True, False, True, True]]])
        got = branch_confidence(
            score, opened, torch.zeros(1, 1), reduction="group", group=2, backend=backend
        )
        assert float(got) == -2.5

    def test_infinite_and_nan_scores(self, backend: str) -> None:
        for bad in (-INF, math.nan):
            for options in (
                {},
                {"reduction": "min"},
                {"reduction": "bottom", "fraction": 0.5},
                {"reduction": "group", "group": 1},
            ):
                assert confidence_of([0.5, bad, 0.25], backend, **options) == -INF
        assert confidence_of([-INF], backend, alpha=1.0, creation=0.5) == 0.5
        assert confidence_of([0.5], backend, alpha=0.0, creation=-INF) == 0.5

    def test_dead_slots_and_empty_windows(self, backend: str) -> None:
        score = torch.full((1, 3, 2), 0.5)
        got = branch_confidence(
            score,
            torch.ones(1, 3, 2, dtype=torch.bool),
            torch.full((1, 3), 0.25),
            branches=torch.tensor([2], dtype=torch.int32),
            length=torch.tensor([[2, 0, 2]], dtype=torch.int32),
            alpha=0.5,
            backend=backend,
        )
        assert got.tolist() == [[0.375, 1.0, -INF]]


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32 - 1))
def test_branch_confidence_equals_reference(seed: int) -> None:
    rng = random.Random(seed)
    shape = (rng.randint(0, 3), rng.randint(1, 5), rng.choice([0, 1, 7, 64, 513]))
    _, _, score = random_stats(rng, shape)
    generator = torch.Generator().manual_seed(seed)
    opened = torch.rand(shape, generator=generator) < rng.random()
    creation = torch.randn(shape[:2], generator=generator)
    options = {
        "branches": torch.randint(0, shape[1] + 1, shape[:1], dtype=torch.int32),
        "length": torch.randint(0, shape[2] + 1, shape[:2], dtype=torch.int32),
        "reduction": rng.choice(["mean", "bottom", "group", "min"]),
        "fraction": rng.choice([0.01, 0.3, 1.0]),
        "group": rng.randint(1, 9),
        "alpha": rng.choice([0.0, 0.5, 1.0]),
    }
    if rng.random() < 0.5:
        options["branches"] = options["length"] = None
    expected = branch_confidence(score, opened, creation, backend="reference", **options)
    assert torch.equal(branch_confidence(score, opened, creation, **options), expected)
    strided = score.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(branch_confidence(strided, opened, creation, **options), expected)


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32 - 1))
def test_parts_make_the_round(seed: int) -> None:
    """select_positions and spawn_branches give the fills and branches of branch_step."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 3, 8])
    window = block_size * rng.randint(1, 6)
    batch, slots = rng.randint(1, 3), rng.randint(1, 6)
    state = random_state(rng, batch, 1, window, block_size)
    state = state._replace(
        commit_len=torch.zeros_like(state.commit_len), done=torch.zeros_like(state.done)
    )
    config = random_config(rng, block_size, branches=slots, shift=False, max_new_tokens=block_size)
    token, prob, score = random_stats(rng, (batch, 1, window))
    for backend in BACKENDS:
        out = branch_step(token, prob, score, state, config, backend=backend)
        chosen = select_positions(
            token[:, 0],
            prob[:, 0],
            score[:, 0],
            state.tokens[:, 0],
            state.length[:, 0],
            state.cache_len,
            state.prompt_len,
            config,
            backend=backend,
        )
        assert torch.equal(chosen.filled, out.filled)
        anchor = torch.where(chosen.fill, token[:, 0], state.tokens[:, 0])
        eos = state.eos[:, 0]
        if config.eos_id is not None:
            eos = eos | (chosen.fill & (token[:, 0] == config.eos_id)).any(1)
        spawned = spawn_branches(
            anchor,
            eos,
            token[:, 0],
            score[:, 0],
            chosen.columns,
            eos_id=config.eos_id,
            backend=backend,
        )
        assert torch.equal(spawned.branches, out.state.branches)
        for b in range(batch):
            live = int(spawned.branches[b])
            assert torch.equal(spawned.tokens[b, :live], out.state.tokens[b, :live])
            assert torch.equal(spawned.eos[b, :live], out.state.eos[b, :live])
            creation = spawned.creation[b, :live].nan_to_num(nan=-INF, neginf=-INF)
            assert torch.equal(creation, out.state.creation[b, :live].nan_to_num(neginf=-INF))
    assert_same(branch_step(token, prob, score, state, config), out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_spawning_stops_at_the_first_missing_column(backend: str) -> None:
    tokens = torch.tensor([[1, MASK, MASK]])
    spawned = spawn_branches(
        tokens,
        torch.tensor([False]),
        torch.tensor([[4, 5, 6]]),
        torch.tensor([[0.1, 0.2, 0.3]]),
        torch.tensor([[2, -1, 1]], dtype=torch.int32),
        eos_id=6,
        backend=backend,
    )
    assert spawned.branches.tolist() == [2]
    anchor = [1, MASK, MASK]
    assert spawned.tokens[0].tolist() == [anchor, [1, MASK, 6], anchor, anchor]
    assert spawned.eos[0].tolist() == [False, True, False, False]


def test_opcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(2, 3, 8, generator=generator)
    opened = score > 0.5
    creation = torch.rand(2, 3, generator=generator)
    ops = torch.ops.lopa
    for value in (score, score.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.library.opcheck(ops.branch_confidence, (value, opened, creation))
    rng = random.Random(0)
    state = random_state(rng, 2, 1, 8, 4)
    token, prob, score = (t[:, 0] for t in random_stats(rng, (2, 1, 8)))
    window = (state.tokens[:, 0], state.length[:, 0], state.cache_len, state.prompt_len)
    torch.library.opcheck(
        ops.select_positions,
        (token, prob, score, *window, 3, 0.5, 0.9, 4, MASK, "prob", "block"),
    )
    columns = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
    torch.library.opcheck(
        ops.spawn_branches, (state.tokens[:, 0], state.eos[:, 0], token, score, columns, 3)
    )


def test_fullgraph() -> None:
    config = LopaConfig(mask_id=MASK, max_new_tokens=8, block_size=4, branches=3)

    @torch.compile(fullgraph=True, dynamic=True)
    def select(token, prob, score, tokens, length, cache_len, prompt_len):  # type: ignore[no-untyped-def]
        return select_positions(
            token, prob, score + 0.0, tokens, length, cache_len, prompt_len, config
        )

    for window in (8, 12):
        rng = random.Random(window)
        state = random_state(rng, 2, 1, window, 4)
        args = (
            *(t[:, 0] for t in random_stats(rng, (2, 1, window))),
            state.tokens[:, 0],
            state.length[:, 0],
            state.cache_len,
            state.prompt_len,
        )
        for a, b in zip(select(*args), select_positions(*args, config), strict=True):
            assert torch.equal(a, b)


class TestBadInput:
    def setup_method(self) -> None:
        self.score = torch.zeros(2, 3, 4)
        self.open = torch.ones(2, 3, 4, dtype=torch.bool)
        self.creation = torch.zeros(2, 3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"reduction": "max"}, "reduction: expected one of mean"),
            ({"reduction": "group"}, "group: expected a number of columns"),
            ({"group": 0}, "group: expected at least 1, got 0"),
            ({"fraction": 0.0}, r"fraction: expected a number in \(0, 1\]"),
            ({"fraction": math.nan}, "fraction: expected a number"),
            ({"alpha": 1.5}, r"alpha: expected a number in \[0, 1\], got 1.5"),
        ],
    )
    def test_ranges(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=f"branch_confidence: {message}"):
            branch_confidence(self.score, self.open, self.creation, **options)  # type: ignore[arg-type]
        arguments = {"branches": None, "length": None, **options}
        with pytest.raises(RuntimeError, match="branch_confidence: "):
            torch.ops.lopa.branch_confidence(self.score, self.open, self.creation, **arguments)

    def test_tensors(self) -> None:
        with pytest.raises(TypeError, match="score: expected dtype torch.float32, got torch.float"):
            branch_confidence(self.score.double(), self.open, self.creation)
        with pytest.raises(ValueError, match="score: expected 3 dimensions"):
            branch_confidence(self.score[0], self.open, self.creation)
        with pytest.raises(TypeError, match="open: expected dtype torch.bool"):
            branch_confidence(self.score, self.open.int(), self.creation)
        with pytest.raises(ValueError, match=r"creation: expected shape \[2, 3\], got \[3\]"):
            branch_confidence(self.score, self.open, self.creation[0])
        branches = torch.zeros(2, dtype=torch.int32, device="meta")
        with pytest.raises(ValueError, match="branches: expected a tensor on cpu"):
            branch_confidence(self.score, self.open, self.creation, branches=branches)
        with pytest.raises(RuntimeError, match=r"open: expected shape \[2, 3, 4\], got shape"):
            torch.ops.lopa.branch_confidence(self.score, self.open[:1], self.creation)

    def test_values_that_only_the_kernel_sees(self) -> None:
        tokens = torch.zeros(1, 4, dtype=torch.int64)
        score = torch.zeros(1, 4)
        number = torch.zeros(1, dtype=torch.int32)
        config = LopaConfig(mask_id=0, max_new_tokens=4, block_size=4, branches=2)
        with pytest.raises(RuntimeError, match=r"length of sequence 0: .* in \[0, 4\], got 5"):
            select_positions(tokens, score, score, tokens, number + 5, number, number, config)
        with pytest.raises(ValueError, match="lookahead: expected at least 0"):
            select_positions(
                tokens, score, score, tokens, number, number, number, config, lookahead=-1
            )
        with pytest.raises(RuntimeError, match=r"columns of sequence 0: .* got 4"):
            spawn_branches(tokens, torch.tensor([False]), tokens, score, torch.tensor([[4]]).int())
