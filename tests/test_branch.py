"""branch_confidence, select_positions and spawn_branches."""

from __future__ import annotations

import math
import random

import pytest
import torch
from cases import moved, operator, run_on
from hypothesis import given, settings
from hypothesis import strategies as st
from states import MASK, assert_same, examples, random_config, random_state, random_stats
from targets import KERNELS, TARGETS, Target, over

from lopa_kernels import (
    LopaConfig,
    branch_confidence,
    branch_step,
    select_positions,
    spawn_branches,
)

INF = float("inf")


def confidence_of(scores: list[float], target: Target, **options: object) -> float:
    score = torch.tensor([[scores]])
    opened = torch.ones_like(score, dtype=torch.bool)
    creation = torch.tensor([[options.pop("creation", 0.0)]])
    return float(run_on(target, branch_confidence, score, opened, creation, **options))


@over(TARGETS)
class TestBranchConfidence:
    def test_reductions(self, target: Target) -> None:
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
            assert confidence_of(scores, target, **options) == pytest.approx(expected, rel=1e-6)

    def test_no_open_column_gives_one(self, target: Target) -> None:
        score = torch.full((1, 1, 2), -5.0)
        closed = torch.zeros(1, 1, 2, dtype=torch.bool)
        creation = torch.tensor([[-3.0]])
        for expected, alpha in ((1.0, 0.0), (-1.0, 0.5), (-3.0, 1.0)):
            got = run_on(target, branch_confidence, score, closed, creation, alpha=alpha)
            assert float(got) == expected
        assert confidence_of([], target, alpha=0.5, creation=-3.0) == 1.0  # no column at all

    def test_groups_run_over_open_columns_only(self, target: Target) -> None:
        score = torch.tensor([[[-1.0, -99.0, -2.0, -3.0]]])
        opened = torch.tensor([[[True, False, True, True]]])
        creation = torch.zeros(1, 1)
        options = {"reduction": "group", "group": 2}
        got = run_on(target, branch_confidence, score, opened, creation, **options)
        assert float(got) == -2.5

    def test_infinite_and_nan_scores(self, target: Target) -> None:
        for bad in (-INF, math.nan):
            for options in (
                {},
                {"reduction": "min"},
                {"reduction": "bottom", "fraction": 0.5},
                {"reduction": "group", "group": 1},
            ):
                assert confidence_of([0.5, bad, 0.25], target, **options) == -INF
        assert confidence_of([-INF], target, alpha=1.0, creation=0.5) == 0.5
        assert confidence_of([0.5], target, alpha=0.0, creation=-INF) == 0.5

    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
    def test_nan_creation_counts_as_minus_infinity(self, target: Target, alpha: float) -> None:
        expected = 0.5 if alpha == 0.0 else -INF
        for creation in (math.nan, -INF):
            assert confidence_of([0.5], target, alpha=alpha, creation=creation) == expected

    def test_dead_slots_and_empty_windows(self, target: Target) -> None:
        score = torch.full((1, 3, 2), 0.5)
        got = run_on(
            target,
            branch_confidence,
            score,
            torch.ones(1, 3, 2, dtype=torch.bool),
            torch.full((1, 3), 0.25),
            branches=torch.tensor([2], dtype=torch.int32),
            length=torch.tensor([[2, 0, 2]], dtype=torch.int32),
            alpha=0.5,
        )
        assert got.tolist() == [[0.375, 1.0, -INF]]


def check_branch_confidence(target: Target, seed: int) -> None:
    rng = random.Random(seed)
    longest = 65 if target.interpreted else 513
    shape = (rng.randint(0, 3), rng.randint(1, 5), rng.choice([0, 1, 7, 64, longest]))
    _, _, score = random_stats(rng, shape)
    generator = torch.Generator().manual_seed(seed)
    opened = torch.rand(shape, generator=generator) < rng.random()
    creation = torch.randn(shape[:2], generator=generator)
    if rng.random() < 0.3:
        creation[torch.rand(shape[:2], generator=generator) < 0.3] = math.nan
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
    strided = score.transpose(0, 2).contiguous().transpose(0, 2)
    for scores in (score, strided):
        got = run_on(target, branch_confidence, scores, opened, creation, **options)
        assert torch.equal(got, expected)


@over(KERNELS)
def test_branch_confidence_equals_reference(target: Target) -> None:
    @settings(max_examples=examples(target, 200))
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        check_branch_confidence(target, seed)

    check()


def check_parts(target: Target, seed: int) -> None:
    # Of what Triton compiles for there is little: shapes and reduction.
    form = random.Random(seed % 12)
    rng = random.Random(seed)
    block_size = form.choice([1, 3, 8])
    window = block_size * form.randint(1, 6)
    batch, slots = rng.randint(1, 3), form.randint(1, 6)
    state = random_state(rng, batch, 1, window, block_size)
    state = state._replace(
        commit_len=torch.zeros_like(state.commit_len), done=torch.zeros_like(state.done)
    )
    config = random_config(
        rng,
        block_size,
        branches=slots,
        shift=False,
        max_new_tokens=block_size,
        reduction=form.choice(["mean", "bottom", "group", "min"]),
    )
    token, prob, score = random_stats(rng, (batch, 1, window))
    out = run_on(target, branch_step, token, prob, score, state, config)
    chosen = run_on(
        target,
        select_positions,
        token[:, 0],
        prob[:, 0],
        score[:, 0],
        state.tokens[:, 0],
        state.length[:, 0],
        state.cache_len,
        state.prompt_len,
        config,
    )
    assert torch.equal(chosen.filled, out.filled)
    anchor = torch.where(chosen.fill, token[:, 0], state.tokens[:, 0])
    eos = state.eos[:, 0]
    if config.eos_id is not None:
        eos = eos | (chosen.fill & (token[:, 0] == config.eos_id)).any(1)
    spawned = run_on(
        target,
        spawn_branches,
        anchor,
        eos,
        token[:, 0],
        score[:, 0],
        chosen.columns,
        eos_id=config.eos_id,
    )
    assert torch.equal(spawned.branches, out.state.branches)
    for b in range(batch):
        live = int(spawned.branches[b])
        assert torch.equal(spawned.tokens[b, :live], out.state.tokens[b, :live])
        assert torch.equal(spawned.eos[b, :live], out.state.eos[b, :live])
        creation = spawned.creation[b, :live].nan_to_num(nan=-INF, neginf=-INF)
        assert torch.equal(creation, out.state.creation[b, :live].nan_to_num(neginf=-INF))
    assert_same(out, branch_step(token, prob, score, state, config, backend="reference"))


@over(TARGETS)
def test_parts_make_the_round(target: Target) -> None:
    """select_positions and spawn_branches give the fills and branches of branch_step."""

    @settings(max_examples=examples(target, 200))
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        check_parts(target, seed)

    check()


def check_selection(target: Target, seed: int) -> None:
    form = random.Random(seed % 24)
    rng = random.Random(seed)
    block_size = form.choice([1, 2, 3, 5, 8, 32, 1000])
    window = form.choice([1, 5, 16, 40, 130])
    columns = -(-window // block_size) * block_size
    state = random_state(rng, rng.randint(0, 3), 1, columns, block_size)
    statistics = random_stats(rng, state.tokens.shape)
    length = state.length[:, 0].clamp(max=window)
    arguments = (
        *(tensor[:, 0, :window] for tensor in (*statistics, state.tokens)),
        length,
        state.cache_len + rng.choice([0, 0, 2**31 - 1 - 2 * columns]),
        state.prompt_len + rng.choice([0, 0, window]),
        random_config(rng, block_size),
    )
    options = {"lookahead": form.randint(0, 9)}
    expected = select_positions(*arguments, backend="reference", **options)
    got = run_on(target, select_positions, *arguments, **options)
    for name, a, b in zip(expected._fields, got, expected, strict=True):
        assert torch.equal(a, b), name


@over(KERNELS)
def test_selection_equals_reference(target: Target) -> None:
    """Windows cut anywhere, within a block too, and narrower than one."""

    @settings(max_examples=examples(target, 200))
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        check_selection(target, seed)

    check()


@over(TARGETS)
def test_spawning_stops_at_the_first_missing_column(target: Target) -> None:
    tokens = torch.tensor([[1, MASK, MASK]])
    spawned = run_on(
        target,
        spawn_branches,
        tokens,
        torch.tensor([False]),
        torch.tensor([[4, 5, 6]]),
        torch.tensor([[0.1, 0.2, 0.3]]),
        torch.tensor([[2, -1, 1]], dtype=torch.int32),
        eos_id=6,
    )
    assert spawned.branches.tolist() == [2]
    anchor = [1, MASK, MASK]
    assert spawned.tokens[0].tolist() == [anchor, [1, MASK, 6], anchor, anchor]
    assert spawned.eos[0].tolist() == [False, True, False, False]


@over([target for target in KERNELS if target.backend != "cpu"])
def test_values_out_of_range_select_and_spawn_nothing(target: Target) -> None:
    """What the CPU refuses, a device that nobody waits for leaves out."""
    tokens = torch.full((3, 4), MASK)
    token = torch.tensor([[1, 2, 3, 4]] * 3)
    score = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3)
    zero = torch.zeros(3, dtype=torch.int32)
    length = torch.tensor([4, 5, -1], dtype=torch.int32)
    config = LopaConfig(mask_id=MASK, max_new_tokens=4, block_size=4, branches=2)
    statistics = (token, score, score, tokens)
    chosen = run_on(target, select_positions, *statistics, length, zero, zero, config)
    assert chosen.filled.tolist() == [1, 0, 0]
    assert chosen.fill.tolist() == [[False, False, False, True], [False] * 4, [False] * 4]
    assert chosen.columns.tolist() == [[2], [-1], [-1]]

    columns = torch.tensor([[0, 4], [-7, 1], [2**31 - 1, 0]], dtype=torch.int32)
    eos = torch.tensor([True, False, False])
    spawned = run_on(target, spawn_branches, tokens, eos, token, score, columns, eos_id=4)
    assert spawned.branches.tolist() == [2, 1, 1]
    assert spawned.tokens[0, 1].tolist() == [1, MASK, MASK, MASK]
    assert spawned.tokens.flatten(0, 1)[[0, 2, 3, 4, 5, 6, 7, 8]].eq(MASK).all()
    assert spawned.eos.tolist() == [[True, True, False], [False] * 3, [False] * 3]
    torch.testing.assert_close(
        spawned.creation, torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    )


@over(KERNELS)
def test_opcheck(target: Target) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(2, 3, 8, generator=generator)
    opened = score > 0.5
    creation = torch.rand(2, 3, generator=generator)

    def check(name: str, *arguments: object) -> None:
        torch.library.opcheck(operator(target, name), moved(arguments, target.device))

    for value in (score, score.transpose(0, 1).contiguous().transpose(0, 1)):
        check("branch_confidence", value, opened, creation)
    rng = random.Random(0)
    state = random_state(rng, 2, 1, 8, 4)
    token, prob, score = (t[:, 0] for t in random_stats(rng, (2, 1, 8)))
    window = (state.tokens[:, 0], state.length[:, 0], state.cache_len, state.prompt_len)
    settings = (3, 0.5, 0.9, 4, MASK, "prob", "block")
    check("select_positions", token, prob, score, *window, *settings)
    columns = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
    check("spawn_branches", state.tokens[:, 0], state.eos[:, 0], token, score, columns, 3)


@over(KERNELS)
def test_fullgraph(target: Target) -> None:
    torch._dynamo.reset()
    config = LopaConfig(mask_id=MASK, max_new_tokens=8, block_size=4, branches=3)
    backend = target.backend

    @torch.compile(fullgraph=True, dynamic=True)
    def select(token, prob, score, *window):  # type: ignore[no-untyped-def]
        return select_positions(token, prob, score + 0.0, *window, config, backend=backend)

    for window in (8, 12):
        rng = random.Random(window)
        state = random_state(rng, 2, 1, window, 4)
        args = target.to(
            (
                *(t[:, 0] for t in random_stats(rng, (2, 1, window))),
                state.tokens[:, 0],
                state.length[:, 0],
                state.cache_len,
                state.prompt_len,
            )
        )
        expected = select_positions(*args, config, backend=backend)
        for a, b in zip(select(*args), expected, strict=True):
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
