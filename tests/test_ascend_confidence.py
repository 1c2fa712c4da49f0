"""token_confidence and softmax_stats as AscendC kernels, in the emulator, against the reference."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import DRAW_VOCABULARIES, VOCABULARIES, close, random_logits
from test_confidence import DTYPES, INF, NAN, check_stats, hostile_rows, orderings

from ascend_ops.emulator import confidence as kernels
from lopa_kernels import SoftmaxStats
from lopa_kernels.ops.confidence import reference

#: vector cores of a launch
CORES = (1, 2, 7, 20, 40)


def stats(logits: torch.Tensor, rows: torch.Tensor | None = None, **options: Any) -> SoftmaxStats:
    return SoftmaxStats(*kernels.softmax_stats(logits, rows, **options))


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(vocab: int, dtype: torch.dtype) -> None:
    logits = random_logits(3, vocab, dtype=dtype)
    check_stats(stats(logits), logits)


@pytest.mark.parametrize("vocab", [152064, 126464])
@pytest.mark.parametrize("rows", [1, 3, 45])
def test_full_vocabularies_on_any_number_of_cores(vocab: int, rows: int) -> None:
    """Fewer rows than cores, and more; the same bits on every number of them."""
    logits = random_logits(rows, vocab, dtype=torch.bfloat16, seed=rows)
    results = [stats(logits, cores=cores) for cores in CORES]
    check_stats(results[0], logits)
    for a, b in pairwise(results):
        for x, y in zip(a, b, strict=True):
            assert x.equal(y)


@pytest.mark.parametrize("vocab", [1, 2, 16, 17, 100, 9000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hostile_values(vocab: int, dtype: torch.dtype) -> None:
    logits = hostile_rows(vocab, dtype)
    check_stats(stats(logits), logits)
    nan = logits.isnan().any(-1) | ~logits.isfinite().any(-1)
    for metric in kernels.METRICS:
        token, prob, score, unusable = kernels.token_confidence(logits, metric=metric, cores=3)
        expected = reference.token_confidence(logits, metric=metric)
        assert token.equal(expected[0])
        torch.testing.assert_close(prob, expected[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(score, expected[2], rtol=1e-5, atol=1e-5)
        assert unusable.tolist() == nan.int().tolist()
        for row in (0, 1, 12, 13):
            assert [t[row].item() for t in (token, prob, score)] == [0, 0.0, -INF]


@pytest.mark.parametrize("name", orderings(100))
def test_any_order_of_the_values(name: str) -> None:
    logits = orderings(20011)[name].to(torch.bfloat16)
    check_stats(stats(logits), logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(dtype: torch.dtype) -> None:
    """Within a repeat of 64, within a tile of 8192, and across tiles; zeros of both signs."""
    logits = torch.full((6, 20000), -5.0, dtype=dtype)
    for row, places in enumerate([(3, 5), (70, 8000), (8191, 8192), (100, 19999), (8192, 16384)]):
        logits[row, list(places)] = 3.0
        assert int(stats(logits)[0][row]) == places[0]
    logits[5, [9000, 400, 12]] = torch.tensor([0.0, 0.0, -0.0], dtype=dtype)
    result = stats(logits)
    assert int(result.token[5]) == 12
    check_stats(result, logits)
    assert result.margin.tolist() == [0.0] * 6


def test_rows_name_the_rows() -> None:
    logits = random_logits(5, 1000, dtype=torch.bfloat16)
    rows = torch.tensor([[4, -1, 0], [5, -7, 4]], dtype=torch.int32)
    for metric in kernels.METRICS:
        token, prob, score, unusable = kernels.token_confidence(logits, rows, metric=metric)
        known = torch.tensor([[4, -1, 0], [-1, -1, 4]], dtype=torch.int32)
        expected = reference.token_confidence(logits, known, metric=metric)
        assert token.equal(expected[0])
        torch.testing.assert_close(prob, expected[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(score, expected[2], rtol=1e-5, atol=1e-6)
        assert unusable.tolist() == [[0, 2, 0], [2, 2, 0]]


@pytest.mark.parametrize("metric", kernels.METRICS)
def test_a_metric_alone_equals_all_statistics(metric: str) -> None:
    logits = random_logits(3, 9000, dtype=torch.float16)
    logits[1, 17] = NAN
    everything = dict(zip(SoftmaxStats._fields, stats(logits), strict=True))
    token, prob, score, unusable = kernels.token_confidence(logits, metric=metric)
    assert token.equal(everything["token"])
    assert prob.equal(everything["prob"])
    assert score.equal(everything[metric])
    assert unusable.tolist() == [0, 1, 0]


def test_every_logit_is_read_once() -> None:
    logits = random_logits(4, 152064, dtype=torch.bfloat16)
    reports: list[Any] = []
    kernels.token_confidence(logits, cores=20, reports=reports)
    (report,) = reports
    partials = 4 * 19 * 32
    assert report["gm_to_local"] == 2 * logits.numel() + partials
    assert report["local_to_gm"] == partials + 4 * (8 + 4 + 4 + 4)
    assert report["peak_ub"] <= 188160


@pytest.mark.parametrize("vocab", DRAW_VOCABULARIES)
@pytest.mark.parametrize("temperature", [1e-40, 0.3, 1.0, 50.0])
def test_draws(vocab: int, temperature: float) -> None:
    """The words of Philox, tile and token: the reference's tokens, on any number of cores."""
    logits = random_logits(16 if vocab < 20000 else 4, vocab, dtype=torch.bfloat16, seed=vocab)
    key = {"seed": torch.tensor([2**40 + 7]), "step": torch.tensor([2**35 + 9])}
    options = {"temperature": temperature, **key}
    result = stats(logits, **options)
    check_stats(result, logits, **options)
    for a, b in zip(stats(logits, cores=3, **options), result, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e6, 1e30, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    logits = random_logits(4, 300)
    options = {"temperature": temperature, "seed": torch.tensor([4])}
    result = stats(logits, **options)
    expected = reference.statistics(logits, dtype=torch.float64, **options)
    assert result.token.equal(expected[0])
    close(result.prob, expected[1])
    close(result.neg_entropy, expected[3], 1e-5)
    close(result.lse, expected[4], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 17, 9000])
def test_draws_from_hostile_values(vocab: int, dtype: torch.dtype) -> None:
    logits = hostile_rows(vocab, dtype)
    options = {"temperature": 0.9, "seed": torch.tensor([1])}
    check_stats(stats(logits, **options), logits, **options)


def test_draws_are_those_of_the_named_rows() -> None:
    """The row's index in the logits is part of the key, its place among `rows` is not."""
    logits = random_logits(1, 5000, dtype=torch.float32).repeat(9, 1)
    rows = torch.tensor([8, -1, 2, 8], dtype=torch.int32)
    options = {"temperature": 1.5, "seed": torch.tensor([5]), "step": torch.tensor([2])}
    token = kernels.token_confidence(logits, rows, **options)[0]
    expected = reference.token_confidence(logits, rows, **options)[0]
    assert token.equal(expected)
    every = kernels.token_confidence(logits, **options)[0]
    assert token.tolist() == [every[8], 0, every[2], every[8]]
    assert len(set(every.tolist())) > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.7}, "seed: expected a tensor"),
        ({"temperature": -0.5}, "temperature: expected a finite number of at least 0"),
        ({"temperature": INF}, "temperature: expected a finite number of at least 0"),
        ({"top_k": 3}, "top_k: expected none"),
        ({"top_p": 0.9}, "top_p: expected none"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.token_confidence(torch.zeros(1, 8), **options)
