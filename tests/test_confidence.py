"""token_confidence and softmax_stats: the reference against formulas, the kernels against it."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import (
    VOCABULARIES,
    VOCABULARY_OPTIONS,
    close,
    integer,
    moved,
    operator,
    random_logits,
    run_on,
    skip_where_slow,
)
from targets import KERNELS, TARGETS, Target, cpu, over

from lopa_kernels.ops.confidence import (
    METRICS,
    SoftmaxStats,
    TokenConfidence,
    reference,
    softmax_stats,
    token_confidence,
    token_confidence_out,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INF, NAN = math.inf, math.nan
FLOAT32_MAX = torch.finfo(torch.float32).max


def check_stats(actual: SoftmaxStats, logits: torch.Tensor, **options: object) -> None:
    token, prob, margin, neg_entropy, lse = reference.statistics(
        logits, dtype=torch.float64, **options
    )
    assert torch.equal(actual.token, token)
    close(actual.prob, prob)
    close(actual.margin, margin)
    close(actual.neg_entropy, neg_entropy, 1e-5)
    close(actual.lse, lse, 1e-5)


def by_hand(
    row: list[float], temperature: float = 0.0, top_k: int | None = None, top_p: float = 1.0
) -> tuple[int, float, float, float, float]:
    """(argmax, prob, margin, neg_entropy, lse) with nothing but loops and math."""
    values = [-INF if math.isnan(x) else min(x, FLOAT32_MAX) for x in row]
    scaled = [x / (temperature or 1.0) for x in values]
    top = max(scaled)
    weights = [math.exp(x - top) for x in scaled]
    order = sorted(range(len(row)), key=lambda i: (-values[i], i))
    kept, before = [], 0.0
    for i in order:
        if before <= top_p and len(kept) < (top_k or len(row)):
            kept.append(i)
        before += weights[i] / math.fsum(weights)
    total = math.fsum(weights[i] for i in kept)
    p = [weights[i] / total for i in kept]
    second = p[1] if len(p) > 1 else 0.0
    neg_entropy = math.fsum(q * math.log(q) for q in p if q > 0)
    lse = max(-FLOAT32_MAX, min(FLOAT32_MAX, top + math.log(total)))
    return order[0], p[0], p[0] - second, neg_entropy, lse


HAND_ROWS = [
    [0.5],
    [1.0, 1.0],
    [0.0, -0.0, -1.0],
    [-3.0, 2.0, 2.0, 1.5, -7.0],
    [NAN, 1.0, -INF, 0.5],
    [1.0, INF, 2.0],
    [3e38, -3e38, 1.0],
    [1e-30, 2e-30, -1e-30, 0.0],
    [-80.0, -81.0, -INF, NAN, -80.0],
    [float(i % 7) for i in range(40)],
]
HAND_OPTIONS = [
    {},
    {"temperature": 0.7},
    {"top_k": 2},
    {"top_p": 0.6},
    {"temperature": 1.7, "top_k": 3, "top_p": 0.8},
]


@pytest.mark.parametrize("options", HAND_OPTIONS)
@pytest.mark.parametrize("row", HAND_ROWS)
@over(TARGETS)
def test_formulas(row: list[float], options: dict, target: Target) -> None:
    token, *floats = by_hand(row, **options)
    logits = torch.tensor([row])
    if options.get("temperature"):
        greedy = {**options, "seed": integer(0)}
        actual = run_on(target, softmax_stats, logits, **greedy)
    else:
        actual = run_on(target, softmax_stats, logits, **options)
        assert actual.token.item() == token
        assert actual.prob.item() == pytest.approx(floats[0], rel=1e-5)
    assert actual.margin.item() == pytest.approx(floats[1], rel=1e-5, abs=1e-7)
    assert actual.neg_entropy.item() == pytest.approx(floats[2], rel=1e-5, abs=1e-5)
    assert actual.lse.item() == pytest.approx(floats[3], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@over(KERNELS)
def test_shapes(vocab: int, dtype: torch.dtype, target: Target) -> None:
    skip_where_slow(target, vocab > 10000 or (dtype != torch.float32 and vocab < 1000))
    logits = random_logits(2 if target.interpreted else 3, vocab, dtype=dtype, seed=vocab)
    stats = run_on(target, softmax_stats, logits)
    check_stats(stats, logits)
    options = {"temperature": 0.8, "seed": integer(-5), "step": integer(2**40 + 7)}
    check_stats(run_on(target, softmax_stats, logits, **options), logits, **options)
    for metric, column in zip(METRICS, (1, 2, 3), strict=True):
        result = run_on(target, token_confidence, logits, metric=metric)
        assert torch.equal(result.token, stats.token)
        close(result.prob, stats.prob)
        close(result.score, stats[column], 1e-5)
        for tensor, kind in zip(result, (torch.int64, torch.float32, torch.float32), strict=True):
            assert tensor.dtype == kind
            assert tensor.shape == logits.shape[:1]


FILTERS = [
    {"top_k": 1},
    {"top_k": 50},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 0.999999},
    {"top_k": 200, "top_p": 0.6},
    {"top_k": 5, "top_p": 0.99},
    {"top_k": 10**9, "top_p": 1.0},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize(("vocab", "seed"), [(17, 1), (1000, 2), (4099, 4), (50257, 3)])
@over(KERNELS)
def test_filters(options: dict, dtype: torch.dtype, vocab: int, seed: int, target: Target) -> None:
    one_dtype = {17: torch.float32, 1000: torch.bfloat16, 4099: torch.float16}.get(vocab)
    skip_where_slow(target, dtype != one_dtype)
    logits = random_logits(2 if target.interpreted else 3, vocab, dtype=dtype, seed=seed)
    check_stats(run_on(target, softmax_stats, logits, **options), logits, **options)
    sampled = {**options, "temperature": 1.3, "seed": integer(11)}
    check_stats(run_on(target, softmax_stats, logits, **sampled), logits, **sampled)


@over(TARGETS)
@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 5), (0.49, 4), (0.125, 2), (0.124, 1), (1, 8)])
def test_top_p_keeps_a_token_with_at_most_that_mass_before_it(
    top_p: float, kept: int, target: Target
) -> None:
    stats = run_on(target, softmax_stats, torch.full((1, 8), 3.0), top_p=top_p)
    assert stats.prob.item() == pytest.approx(1 / kept, rel=1e-6)
    assert stats.neg_entropy.item() == pytest.approx(-math.log(kept), abs=1e-6)
    assert stats.margin.item() == (1.0 if kept == 1 else 0.0)


@over(TARGETS)
@pytest.mark.parametrize("vocab", [9, 100, 40000])
def test_ties_at_a_filter_boundary_go_to_the_lowest_index(vocab: int, target: Target) -> None:
    skip_where_slow(target, vocab > 10000)
    logits = torch.zeros(
        20 if target.interpreted else 50 if str(target) == "reference" else 400, vocab
    )
    logits[:, vocab // 2] = 1.0
    options = {"temperature": 1e6, "seed": integer(3)}
    tokens = run_on(target, token_confidence, logits, top_k=4, **options)
    assert set(tokens.token.tolist()) == {0, 1, 2, vocab // 2}
    close(tokens.prob, torch.full_like(tokens.prob, 0.25), 1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@over(KERNELS)
def test_ties_everywhere(dtype: torch.dtype, metric: str, target: Target) -> None:
    generator = torch.Generator().manual_seed(5)
    for vocab in (33, 5000) if target.interpreted else (2, 33, 130, 20000):
        logits = torch.randint(-2, 3, (6, vocab), generator=generator).to(dtype)
        logits[1] = 0.0
        logits[2, ::2] = -0.0
        result = run_on(target, token_confidence, logits, metric=metric)
        token, prob, score = reference.token_confidence(logits, metric=metric, dtype=torch.float64)
        assert torch.equal(result.token, token)
        close(result.prob, prob)
        close(result.score, score, 1e-5)
        first = (logits.float() == logits.float().amax(-1, keepdim=True)).int().argmax(-1)
        assert torch.equal(result.token, first)


def hostile_rows(vocab: int, dtype: torch.dtype) -> torch.Tensor:
    largest = torch.finfo(dtype).max
    rows = random_logits(16, vocab, dtype=dtype, seed=9)
    rows[0] = -INF
    rows[1] = NAN
    rows[2, ::3] = NAN
    rows[3, ::2] = -INF
    rows[4, vocab // 2] = INF
    rows[5] = largest
    rows[6] = -largest
    rows[7, vocab // 3] = largest
    rows[8, -1] = -largest
    rows[9] *= 1e-6
    rows[10, :] = -INF
    rows[10, -1] = -100.0
    rows[11, :-1] = NAN
    rows[12] = INF
    rows[13, ::2] = INF
    rows[13, 1::2] = -INF
    rows[14, : vocab // 2] = -largest
    rows[15, -1] = NAN
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 16, 17, 100, 9000])
@over(KERNELS)
def test_hostile_values(vocab: int, dtype: torch.dtype, target: Target) -> None:
    skip_where_slow(target, (vocab, dtype) not in ((17, torch.bfloat16), (9000, torch.float32)))
    logits = hostile_rows(vocab, dtype)
    sampling = {"temperature": 0.9, "seed": integer(1)}
    for options in (
        {},
        sampling,
        {"top_k": 3},
        {"top_p": 0.8151234567},
        {**sampling, "top_p": 0.8151234567},
    ):
        stats = run_on(target, softmax_stats, logits, **options)
        check_stats(stats, logits, **options)
        assert bool(((stats.token >= 0) & (stats.token < vocab)).all())
        assert not any(value.isnan().any() for value in stats[1:])
    for metric in METRICS:
        result = run_on(target, token_confidence, logits, metric=metric)
        for row in (0, 1, 12, 13):
            assert [t[row].item() for t in result] == [0, 0.0, -INF]


def orderings(vocab: int) -> dict[str, torch.Tensor]:
    """Rows whose first elements tell nothing, or the wrong thing, about the maximum."""
    rows = {name: random_logits(2, vocab, seed=5) for name in ("late peak", "jump", "offset")}
    rows["late peak"][:, -7] = 60.0
    rows["jump"][:, vocab // 17] = 21.0
    rows["offset"] += 1000.0
    rows["ascending"] = random_logits(2, vocab).sort(-1).values
    rows["descending"] = random_logits(2, vocab).sort(-1, descending=True).values
    rows["plateau"] = torch.full((2, vocab), -12.0)
    rows["plateau"][:, vocab // 2] = 0.0
    rows["far apart"] = torch.linspace(-9e4, 9e4, vocab).repeat(2, 1)
    rows["masked start"] = random_logits(2, vocab)
    rows["masked start"][:, : vocab // 3] = -INF
    return rows


@pytest.mark.parametrize("name", orderings(100))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@over(KERNELS)
def test_any_order_of_the_values(name: str, dtype: torch.dtype, target: Target) -> None:
    logits = orderings(9001 if target.interpreted else 152064)[name].to(dtype)
    for options in ({}, {"temperature": 0.3, "seed": integer(2)}):
        check_stats(run_on(target, softmax_stats, logits, **options), logits, **options)


@over(KERNELS)
def test_extreme_temperatures(target: Target) -> None:
    logits = random_logits(4, 300)
    for temperature in (1e-40, 1e-6, 1e6, 1e30):
        options = {"temperature": temperature, "seed": integer(4)}
        stats = run_on(target, softmax_stats, logits, **options)
        token, prob, _, neg_entropy, _ = reference.statistics(
            logits, dtype=torch.float64, **options
        )
        assert torch.equal(stats.token, token)
        close(stats.prob, prob)
        close(stats.neg_entropy, neg_entropy, 1e-5)


def strided_views(a: int, b: int, c: int) -> list[torch.Tensor]:
    base = random_logits(a, b, c, 200, seed=21)
    return [
        base[..., :130],
        base[..., 7:137],
        base.transpose(0, 1),
        base.permute(2, 0, 1, 3)[:, 1:, ::2],
        base[:1].expand(a + 1, b, c, 200),
        base[0, 0, 0],
        base[1:2, :, 1, :150],
        random_logits(b, 1, seed=2).expand(b, a).t()[..., :1],
    ]


@pytest.mark.parametrize("case", range(8))
@pytest.mark.parametrize("dtype", DTYPES)
@over(KERNELS)
def test_strides(case: int, dtype: torch.dtype, target: Target) -> None:
    skip_where_slow(target, dtype != DTYPES[case % 3])
    shape = (2, 2, 2) if target.interpreted else (4, 6, 3)
    logits = moved(strided_views(*shape)[case], "cpu", dtype)
    check_stats(run_on(target, softmax_stats, logits), logits)
    options = {"temperature": 1.0, "seed": integer(8), "step": integer(3)}
    sampled = run_on(target, token_confidence, logits, **options)
    assert torch.equal(
        sampled.token, run_on(target, token_confidence, logits.contiguous(), **options).token
    )


@over(KERNELS)
def test_no_rows(target: Target) -> None:
    for shape in ((0, 10), (3, 0, 10)):
        result = run_on(target, token_confidence, torch.empty(shape))
        assert all(tensor.shape == shape[:-1] for tensor in result)
    none = torch.empty(0, 3, dtype=torch.int32)
    assert run_on(target, token_confidence, torch.randn(4, 9), rows=none).prob.shape == (0, 3)
    for options in ({}, {"temperature": 1.0, "seed": integer(1)}, {"top_k": 2}):
        rows = torch.tensor([-1], dtype=torch.int32)
        missing = run_on(target, token_confidence, torch.empty(0, 9), rows=rows, **options)
        assert [tensor.tolist() for tensor in missing] == [[0], [0.0], [-INF]]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": integer(2), "top_k": 20}])
@over(KERNELS)
def test_rows_map(options: dict, target: Target) -> None:
    logits = random_logits(2, 5, 3000)
    rows = torch.tensor([[0, 9, -1, 4], [4, 4, 0, -1], [7, 1, 2, 3]], dtype=torch.int32)
    everything = run_on(target, softmax_stats, logits, **options)
    indices = (rows, rows.t(), rows[:, ::2], rows[1, 2], rows[:1].expand(4, 4))
    for index in indices[1:4] if target.interpreted else indices:
        picked = run_on(target, softmax_stats, logits, rows=index, **options)
        check_stats(picked, logits, rows=index, **options)
        live = index >= 0
        for part, whole, none in zip(picked, everything, (0, 0.0, 0.0, -INF, -INF), strict=True):
            assert part.shape == index.shape
            assert torch.equal(part[live], whole.flatten()[index[live].long()])
            assert bool((part[~live] == none).all())


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": integer(2)}, {"top_p": 0.5}])
@over([target for target in KERNELS if target.backend != "cpu"])
def test_rows_out_of_range_are_missing(options: dict, target: Target) -> None:
    """Only values tell, which the host does not read: such an index names no row, like -1."""
    logits = random_logits(7, 300)
    rows = torch.tensor([3, 7, -2, 2**31 - 1, 6, -(2**31), 2**24], dtype=torch.int32)
    wrong = run_on(target, softmax_stats, logits, rows=rows, **options)
    rows = torch.where((rows >= 0) & (rows < 7), rows, -1)
    right = run_on(target, softmax_stats, logits, rows=rows, **options)
    assert all(torch.equal(a, b) for a, b in zip(wrong, right, strict=True))


def poisoned_outputs(target: Target, *shape: int) -> tuple[torch.Tensor, TokenConfidence]:
    """Outputs of three layouts, and the wider tensor that one of them is every second column of."""
    wide = torch.full((*shape[:-1], 2 * shape[-1]), NAN, device=target.device)
    token = torch.full(shape[::-1], -7, device=target.device).permute(
        *range(len(shape) - 1, -1, -1)
    )
    score = torch.full(shape, NAN, device=target.device)
    return wide, TokenConfidence(token, wide[..., ::2], score)


@pytest.mark.parametrize("vocab", [1, 100, 4100])
@over(TARGETS)
def test_out_form_writes_every_element(vocab: int, target: Target) -> None:
    sampling = {"temperature": 0.7, "seed": integer(4)}
    everything = random_logits(*((2, 3) if target.interpreted else (4, 6)), vocab)
    everything[0, 2] = NAN
    everything[-1, -1] = -INF
    rows = torch.tensor([[5, -1, 0], [-1, -1, 3]], dtype=torch.int32)
    for options in ({}, sampling, {"top_k": 3}, {**sampling, "top_p": 0.8}, {"rows": rows}):
        shape = options.get("rows", everything[..., 0]).shape
        expected = token_confidence(everything, metric="margin", **options)
        wide, out = poisoned_outputs(target, *shape)
        arguments = target.to({"logits": everything, **options})
        token_confidence_out(**arguments, out=out, metric="margin", backend=target.backend)
        token, prob, score = cpu(out)
        assert torch.equal(token, expected.token)
        close(prob, expected.prob)
        close(score, expected.score)
        assert bool(wide[..., 1::2].isnan().all())


@over(TARGETS)
def test_out_form_writes_nothing_on_error(target: Target) -> None:
    logits = target.to(random_logits(4, 6, 100))
    wide, out = poisoned_outputs(target, 4, 6)
    if target.backend != "reference":
        with pytest.raises(RuntimeError, match="top_k"):
            operator(target, "token_confidence_out")(logits, top_k=0, **out._asdict())
    if target.backend in ("reference", "cpu"):
        rows = torch.arange(24, dtype=torch.int32).view(4, 6).clone()
        rows[3, 5] = 24
        with pytest.raises(RuntimeError, match=r"rows: .* R = 24, got 24 at flat index 23"):
            token_confidence_out(logits, out, rows=rows, backend=target.backend)
    assert bool((out.token == -7).all())
    assert bool(wide.isnan().all())
    assert bool(out.score.isnan().all())


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_threads_do_not_change_a_bit(rows: int, restore_threads: None) -> None:
    logits = random_logits(rows, 120001, dtype=torch.bfloat16)
    for options in VOCABULARY_OPTIONS:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(token_confidence(logits, **options))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("options", VOCABULARY_OPTIONS)
@over(KERNELS)
def test_a_row_does_not_depend_on_its_neighbours(options: dict, target: Target) -> None:
    """Alone, in a batch, in another place of it: the same bits."""
    rows, vocab = (5, 4500) if target.interpreted else (300, 50257)
    logits = target.to(random_logits(rows, vocab, dtype=torch.bfloat16))
    options = {**target.to(options), "backend": target.backend}
    everything = cpu(token_confidence(logits, **options))
    generator = torch.Generator().manual_seed(1)
    for count in (1, 2, 3, 64):
        index = torch.randint(rows, (min(count, rows),), generator=generator, dtype=torch.int32)
        part = cpu(token_confidence(logits, rows=target.to(index), **options))
        for a, b in zip(part, everything, strict=True):
            assert torch.equal(a, b[index.long()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", VOCABULARY_OPTIONS)
@over(KERNELS)
def test_a_row_does_not_depend_on_its_address(
    options: dict, dtype: torch.dtype, target: Target
) -> None:
    """Views shifted element by element, rows of odd strides: the same bits."""
    skip_where_slow(target, dtype == torch.float16)
    rows, vocab = (2, 2500) if target.interpreted else (3, 20011)
    values = target.to(random_logits(rows, vocab, dtype=dtype))
    options = {**target.to(options), "backend": target.backend}
    expected = token_confidence(values, **options)
    for shift in (1, 2) if target.interpreted else range(1, 9):
        buffer = torch.full((rows, vocab + 2 * shift + 1), NAN, dtype=dtype, device=target.device)
        view = buffer[:, shift : shift + vocab].copy_(values)
        shifted = token_confidence(view, **options)
        assert all(torch.equal(a, b) for a, b in zip(expected, shifted, strict=True))


RUN_ISA = """
import sys, torch
import lopa_kernels.ops.confidence as confidence
assert torch.ops.lopa.cpu_isa() == sys.argv[3]
inputs = torch.load(sys.argv[1])
out = []
for logits in inputs:
    sampling = dict(temperature=0.8, seed=torch.tensor([12]), step=torch.tensor([5]))
    for options in ({}, sampling, dict(top_p=0.7), dict(sampling, top_k=9)):
        out.append(tuple(confidence.softmax_stats(logits, **options)))
torch.save(out, sys.argv[2])
"""


def test_every_instruction_set(tmp_path: Path) -> None:
    available = ["portable", "avx2", "avx512"]
    available = available[: available.index(torch.ops.lopa.cpu_isa()) + 1]
    inputs = [
        rows
        for dtype in DTYPES
        for rows in (
            random_logits(5, 70001, dtype=dtype),
            random_logits(5, 37, dtype=dtype),
            hostile_rows(100, dtype),
        )
    ]
    subnormal = torch.arange(-60, 60, dtype=torch.int16).abs().view(1, -1).view(torch.float16)
    inputs.append(subnormal)
    torch.save(inputs, tmp_path / "inputs.pt")
    package_root = str(Path(reference.__file__).parents[3])
    results = {}
    for isa in available:
        environment = {**os.environ, "LOPA_CPU_ISA": isa, "PYTHONPATH": package_root}
        output = tmp_path / f"{isa}.pt"
        command = [sys.executable, "-c", RUN_ISA, str(tmp_path / "inputs.pt"), str(output), isa]
        subprocess.run(command, env=environment, check=True, timeout=120)
        results[isa] = torch.load(output)
    for isa, result in results.items():
        for ours, portable in zip(result, results["portable"], strict=True):
            assert torch.equal(ours[0], portable[0]), isa
            for a, b in zip(ours[1:], portable[1:], strict=True):
                close(a, b, 2e-5)
    for isa in available[2:]:
        for ours, narrow in zip(results[isa], results["avx2"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, narrow, strict=True))


MEASURE_MEMORY = """
import itertools, torch
from lopa_kernels.ops.confidence import token_confidence

def peak_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

logits = torch.randn(64, 152064).bfloat16()
seed = torch.tensor([1])
cases = [dict(metric="neg_entropy"), dict(temperature=1.0, seed=seed), dict(top_p=0.9)]
for options in cases:
    token_confidence(logits[:, :70000][:3], **options)
for options in cases:
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = peak_kib()
    token_confidence(logits, **options)
    print(peak_kib() - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_extra_memory_is_below_a_megabyte() -> None:
    root = str(Path(reference.__file__).parents[3])
    run = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    growth = [int(line) for line in run.stdout.split()]
    assert len(growth) == 3
    assert max(growth) < 1024, f"KiB: {growth}"


def test_fp32_reference_agrees_with_float64() -> None:
    logits = random_logits(4, 5000)
    for options in ({}, {"top_p": 0.9}, {"temperature": 0.7, "seed": integer(1), "top_k": 100}):
        single = reference.statistics(logits, **options)
        double = reference.statistics(logits.double(), **options)
        assert double[1].dtype == torch.float64
        assert torch.equal(single[0], double[0])
        for a, b in itertools.islice(zip(single, double, strict=True), 1, None):
            close(a, b, 1e-5)
