"""token_confidence and softmax_stats: the reference against formulas, the kernels against it."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import VOCABULARIES, close, integer, random_logits

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
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_formulas(row: list[float], options: dict, backend: str) -> None:
    token, *floats = by_hand(row, **options)
    logits = torch.tensor([row])
    if options.get("temperature"):
        greedy = {**options, "seed": integer(0)}
        actual = softmax_stats(logits, **greedy, backend=backend)
    else:
        actual = softmax_stats(logits, **options, backend=backend)
        assert actual.token.item() == token
        assert actual.prob.item() == pytest.approx(floats[0], rel=1e-5)
    assert actual.margin.item() == pytest.approx(floats[1], rel=1e-5, abs=1e-7)
    assert actual.neg_entropy.item() == pytest.approx(floats[2], rel=1e-5, abs=1e-5)
    assert actual.lse.item() == pytest.approx(floats[3], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_shapes(vocab: int, dtype: torch.dtype) -> None:
    logits = random_logits(3, vocab, dtype=dtype, seed=vocab)
    check_stats(softmax_stats(logits), logits)
    options = {"temperature": 0.8, "seed": integer(-5), "step": integer(2**40 + 7)}
    check_stats(softmax_stats(logits, **options), logits, **options)
    for metric, column in zip(METRICS, (1, 2, 3), strict=True):
        stats = softmax_stats(logits)
        result = token_confidence(logits, metric=metric)
        assert torch.equal(result.token, stats.token)
        close(result.prob, stats.prob)
        close(result.score, stats[column], 1e-5)
        for tensor, kind in zip(result, (torch.int64, torch.float32, torch.float32), strict=True):
            assert tensor.dtype == kind
            assert tensor.shape == (3,)


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
def test_filters(options: dict, dtype: torch.dtype) -> None:
    for vocab, seed in ((17, 1), (1000, 2), (50257, 3)):
        logits = random_logits(3, vocab, dtype=dtype, seed=seed)
        check_stats(softmax_stats(logits, **options), logits, **options)
        sampled = {**options, "temperature": 1.3, "seed": integer(11)}
        check_stats(softmax_stats(logits, **sampled), logits, **sampled)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 5), (0.49, 4), (0.125, 2), (0.124, 1), (1, 8)])
def test_top_p_keeps_a_token_with_at_most_that_mass_before_it(
    top_p: float, kept: int, backend: str
) -> None:
    stats = softmax_stats(torch.full((1, 8), 3.0), top_p=top_p, backend=backend)
    assert stats.prob.item() == pytest.approx(1 / kept, rel=1e-6)
    assert stats.neg_entropy.item() == pytest.approx(-math.log(kept), abs=1e-6)
    assert stats.margin.item() == (1.0 if kept == 1 else 0.0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("vocab", [9, 100, 40000])
def test_ties_at_a_filter_boundary_go_to_the_lowest_index(vocab: int, backend: str) -> None:
    logits = torch.zeros(400, vocab)
    logits[:, vocab // 2] = 1.0
    options = {"temperature": 1e6, "seed": integer(3), "backend": backend}
    tokens = token_confidence(logits[:50] if backend == "reference" else logits, top_k=4, **options)
    assert set(tokens.token.tolist()) == {0, 1, 2, vocab // 2}
    close(tokens.prob, torch.full_like(tokens.prob, 0.25), 1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_everywhere(dtype: torch.dtype, metric: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for vocab in (2, 33, 130, 20000):
        logits = torch.randint(-2, 3, (6, vocab), generator=generator).to(dtype)
        logits[1] = 0.0
        logits[2, ::2] = -0.0
        result = token_confidence(logits, metric=metric)
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
def test_hostile_values(vocab: int, dtype: torch.dtype) -> None:
    logits = hostile_rows(vocab, dtype)
    sampling = {"temperature": 0.9, "seed": integer(1)}
    for options in (
        {},
        sampling,
        {"top_k": 3},
        {"top_p": 0.8151234567},
        {**sampling, "top_p": 0.8151234567},
    ):
        stats = softmax_stats(logits, **options)
        check_stats(stats, logits, **options)
        assert bool(((stats.token >= 0) & (stats.token < vocab)).all())
        assert not any(value.isnan().any() for value in stats[1:])
    for metric in METRICS:
        result = token_confidence(logits, metric=metric)
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
def test_any_order_of_the_values(name: str, dtype: torch.dtype) -> None:
    logits = orderings(152064)[name].to(dtype)
    for options in ({}, {"temperature": 0.3, "seed": integer(2)}):
        check_stats(softmax_stats(logits, **options), logits, **options)


def test_extreme_temperatures() -> None:
    logits = random_logits(4, 300)
    for temperature in (1e-40, 1e-6, 1e6, 1e30):
        options = {"temperature": temperature, "seed": integer(4)}
        stats = softmax_stats(logits, **options)
        token, prob, _, neg_entropy, _ = reference.statistics(
            logits, dtype=torch.float64, **options
        )
        assert torch.equal(stats.token, token)
        close(stats.prob, prob)
        close(stats.neg_entropy, neg_entropy, 1e-5)


def strided_views() -> list[torch.Tensor]:
    base = random_logits(4, 6, 3, 200, seed=21)
    return [
        base[..., :130],
        base[..., 7:137],
        base.transpose(0, 1),
        base.permute(2, 0, 1, 3)[:, 1:, ::2],
        base[:1].expand(5, 6, 3, 200),
        base[0, 0, 0],
        base[2:3, :, 1, :150],
        random_logits(6, 1, seed=2).expand(6, 4).t()[..., :1],
    ]


@pytest.mark.parametrize("case", range(len(strided_views())))
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(case: int, dtype: torch.dtype) -> None:
    view = strided_views()[case]
    logits = torch.empty_strided(view.size(), view.stride(), dtype=dtype)
    logits = logits.copy_(view) if 0 not in view.stride() else view.to(dtype)
    check_stats(softmax_stats(logits), logits)
    options = {"temperature": 1.0, "seed": integer(8), "step": integer(3)}
    sampled = token_confidence(logits, **options)
    assert torch.equal(sampled.token, token_confidence(logits.contiguous(), **options).token)


def test_no_rows() -> None:
    for shape in ((0, 10), (3, 0, 10)):
        result = token_confidence(torch.empty(shape))
        assert all(tensor.shape == shape[:-1] for tensor in result)
    nothing = token_confidence(torch.randn(4, 9), rows=torch.empty(0, 3, dtype=torch.int32))
    assert nothing.prob.shape == (0, 3)
    missing = token_confidence(torch.empty(0, 9), rows=torch.tensor([-1], dtype=torch.int32))
    assert missing.score.tolist() == [-INF]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": integer(2), "top_k": 20}])
def test_rows_map(options: dict) -> None:
    logits = random_logits(2, 5, 3000)
    rows = torch.tensor([[0, 9, -1, 4], [4, 4, 0, -1], [7, 1, 2, 3]], dtype=torch.int32)
    everything = softmax_stats(logits, **options)
    for index in (rows, rows.t(), rows[:, ::2], rows[1, 2], rows[:1].expand(4, 4)):
        picked = softmax_stats(logits, rows=index, **options)
        check_stats(picked, logits, rows=index, **options)
        live = index >= 0
        for part, whole, none in zip(picked, everything, (0, 0.0, 0.0, -INF, -INF), strict=True):
            assert part.shape == index.shape
            assert torch.equal(part[live], whole.flatten()[index[live].long()])
            assert bool((part[~live] == none).all())


def test_out_form_writes_every_element_and_nothing_on_error() -> None:
    logits = random_logits(4, 6, 100)
    expected = token_confidence(logits, metric="margin")
    buffers = (
        torch.full((6, 4), -7).t(),
        torch.full((4, 12), NAN)[:, ::2],
        torch.full((4, 6), NAN),
    )
    with pytest.raises(RuntimeError, match="top_k"):
        torch.ops.lopa.token_confidence_out(
            logits, top_k=0, token=buffers[0], prob=buffers[1], score=buffers[2]
        )
    rows = torch.arange(24, dtype=torch.int32).view(4, 6).clone()
    rows[3, 5] = 24
    with pytest.raises(RuntimeError, match=r"rows: .* R = 24, got 24 at flat index 23"):
        token_confidence_out(logits, TokenConfidence(*buffers), rows=rows)
    assert bool((buffers[0] == -7).all())
    assert bool(buffers[1].isnan().all())
    for backend in ("cpu", "reference"):
        token_confidence_out(logits, TokenConfidence(*buffers), metric="margin", backend=backend)
        assert torch.equal(buffers[0], expected.token)
        close(buffers[1], expected.prob)
        close(buffers[2], expected.score)


CONFIGURATIONS = [
    {"metric": "neg_entropy"},
    {"metric": "margin", "top_p": 0.9},
    {"temperature": 1.0, "seed": integer(6), "top_k": 1000},
    {"temperature": 0.3, "seed": integer(6)},
]


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_threads_do_not_change_a_bit(rows: int, restore_threads: None) -> None:
    logits = random_logits(rows, 120001, dtype=torch.bfloat16)
    for options in CONFIGURATIONS:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(token_confidence(logits, **options))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    logits = random_logits(3, 4, 50, dtype=dtype)
    strided = random_logits(4, 3, 60, dtype=dtype).transpose(0, 1)[..., 3:53]
    rows = torch.tensor([[3, -1], [0, 11]], dtype=torch.int32)
    sampling = {"temperature": 0.9, "seed": integer(3), "step": integer(4)}
    for tensor in (logits, strided):
        for options in ({}, {"rows": rows, **sampling}, {"rows": rows.t(), "top_k": 3}):
            torch.library.opcheck(
                torch.ops.lopa.token_confidence.default,
                (tensor,),
                {"metric": "margin", **options},
            )
            torch.library.opcheck(torch.ops.lopa.softmax_stats.default, (tensor,), options)
        out = {
            "token": torch.zeros(3, 4, dtype=torch.int64),
            "prob": torch.zeros(4, 3).t(),
            "score": torch.zeros(3, 4),
        }
        torch.library.opcheck(torch.ops.lopa.token_confidence_out.default, (tensor,), out)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_break(backend: str) -> None:
    def step(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        result = token_confidence(x * 2, metric="neg_entropy", top_k=7)
        prob = torch.empty_like(result.prob)
        token_confidence_out(x, TokenConfidence(out, prob, torch.empty_like(prob)))
        return result.score + prob

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((3, 40), (5, 40), (2, 90)):
        x = random_logits(*shape)
        ours, theirs = (torch.full(shape[:1], -1) for _ in range(2))
        torch.testing.assert_close(compiled(x, ours), step(x, theirs))
        assert torch.equal(ours, theirs)


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(token_confidence(x, temperature=0.5, seed=integer(1)))

    x = random_logits(3, 40)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Module(), (x,), dynamic_shapes=({0: batch},))
    y = random_logits(9, 40)
    for ours, theirs in zip(program.module()(y), Module()(y), strict=True):
        assert torch.equal(ours, theirs)


def test_numpy_arrays() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    result = token_confidence(logits)
    assert isinstance(result.token, np.ndarray)
    assert (result.token == logits.argmax(-1)).all()


X = torch.zeros(2, 8)
BAD_INPUT = [
    ({"logits": torch.zeros(2, 8, dtype=torch.int32)}, TypeError, "logits: expected dtype"),
    ({"logits": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "logits: expected dtype"),
    ({"logits": torch.zeros(())}, ValueError, r"logits: expected shape \[\.\.\., V\]"),
    ({"logits": torch.zeros(3, 0)}, ValueError, r"logits: .* got \[3, 0\]"),
    ({"logits": torch.zeros(8, 2).t()}, ValueError, "logits: expected unit stride"),
    ({"metric": "entropy"}, ValueError, "metric: expected one of prob, margin, neg_entropy"),
    ({"temperature": -0.5}, ValueError, r"temperature: .* got -0\.5"),
    ({"temperature": INF}, ValueError, "temperature: .* got inf"),
    ({"temperature": NAN}, ValueError, "temperature: .* got nan"),
    ({"temperature": 1.0}, ValueError, "seed: .* got None"),
    ({"top_k": 0}, ValueError, "top_k: expected at least 1, got 0"),
    ({"top_p": 0.0}, ValueError, r"top_p: .* got 0\.0"),
    ({"top_p": 1.5}, ValueError, r"top_p: .* got 1\.5"),
    ({"seed": 3}, TypeError, "seed: expected an int64 tensor, got int"),
    ({"seed": torch.zeros(1)}, TypeError, "seed: expected dtype torch.int64"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed: expected one element"),
    ({"step": torch.zeros(1, dtype=torch.int32)}, TypeError, "step: expected dtype"),
    ({"rows": torch.zeros(2, dtype=torch.int64)}, TypeError, "rows: expected dtype torch.int32"),
    ({"rows": torch.zeros(1, dtype=torch.int32, device="meta")}, ValueError, "rows: expected a"),
    ({"backend": "tpu"}, ValueError, "backend: expected one of"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD_INPUT)
def test_bad_input(options: dict, error: type[Exception], match: str) -> None:
    arguments = {"logits": X, **options}
    with pytest.raises(error, match=match):
        token_confidence(**arguments)
    if "metric" not in options:
        with pytest.raises(error, match=match):
            softmax_stats(**arguments)


NATIVE_BAD_INPUT = [
    ({"metric": "entropy"}, "metric: expected one of"),
    ({"temperature": NAN}, "temperature: expected a finite number"),
    ({"temperature": 1.0}, "seed: expected an int64 tensor"),
    ({"top_k": -1}, "top_k: expected at least 1, got -1"),
    ({"top_p": NAN}, "top_p: expected"),
    ({"step": torch.zeros(2, dtype=torch.int64)}, "step: expected one element"),
    ({"seed": torch.zeros(1)}, "seed: expected dtype Long, got Float"),
    ({"rows": torch.zeros(2)}, "rows: expected dtype Int, got Float"),
    ({"rows": torch.tensor([1, -2], dtype=torch.int32)}, "rows: .* got -2 at flat index 1"),
    ({"logits": torch.zeros(3, 8, dtype=torch.float64)}, "logits: expected dtype BFloat16"),
    ({"logits": torch.zeros(8, 2).t()}, "logits: expected unit stride"),
    (
        {"logits": torch.zeros((1, 2) * 9 + (8,)).expand((3, 2) * 9 + (8,))},
        "logits: expected at most 8 leading",
    ),
]


@pytest.mark.parametrize(("options", "match"), NATIVE_BAD_INPUT)
def test_bad_input_past_the_python_checks(options: dict, match: str) -> None:
    with pytest.raises(RuntimeError, match=f"token_confidence: {match}"):
        torch.ops.lopa.token_confidence(**{"logits": X, **options})


@pytest.mark.parametrize(
    ("position", "buffer", "error", "match"),
    [
        (0, torch.zeros(2, dtype=torch.int32), TypeError, "token: expected dtype"),
        (1, torch.zeros(3), ValueError, r"prob: expected shape \[2\], got \[3\]"),
        (2, torch.zeros(2, device="meta"), ValueError, "score: expected a tensor on cpu"),
    ],
)
def test_bad_outputs(
    position: int, buffer: torch.Tensor, error: type[Exception], match: str
) -> None:
    out = [torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.zeros(2)]
    out[position] = buffer
    with pytest.raises(error, match=match):
        token_confidence_out(X, TokenConfidence(*out))


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
