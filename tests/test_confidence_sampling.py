"""The draws of token_confidence: the generator, the numbers, the distribution."""

from __future__ import annotations

import decimal

import pytest
import torch
from cases import close, integer, random_logits

from lopa_kernels.ops.confidence import reference, token_confidence


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    """The vectors of philox4x32-10 in Random123's tests/kat_vectors."""
    words = reference.philox4x32([integer(c) for c in counter], [integer(k) for k in key])
    assert tuple(word.item() for word in words) == expected


def test_gumbel_numbers_against_exact_logarithms() -> None:
    context = decimal.Context(prec=60)
    for word in (0, 1, 255, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1):
        u = 1 - (decimal.Decimal(word) + decimal.Decimal("0.5")) / 2**32
        exact = -context.ln(-context.ln(context.plus(u)))
        ours = reference.gumbel_numbers(integer(word)).item()
        assert ours == pytest.approx(float(exact), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**32 + 5])
@pytest.mark.parametrize("step", [0, 3, 2**32 - 1, 2**35 + 9, -4])
def test_kernel_draws_with_the_same_numbers(seed: int, step: int) -> None:
    """Equal logits: the draw is the index of the smallest random integer."""
    for vocab in (1, 4, 67, 1025, 40000):
        rows = torch.tensor([0, 5, 2, 5], dtype=torch.int32)
        logits = torch.zeros(6, vocab)
        words = reference.random_words(rows, vocab, integer(seed), integer(step))
        result = token_confidence(
            logits, temperature=1.0, seed=integer(seed), step=integer(step), rows=rows
        )
        assert torch.equal(result.token, words.argmin(-1))


def test_default_step_is_zero() -> None:
    logits = random_logits(8, 500)
    with_step = token_confidence(logits, temperature=1.0, seed=integer(9), step=integer(0))
    without = token_confidence(logits, temperature=1.0, seed=integer(9))
    assert torch.equal(with_step.token, without.token)
    other = token_confidence(logits, temperature=1.0, seed=integer(9), step=integer(1))
    assert not torch.equal(other.token, without.token)


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_draws_follow_the_distribution(spread: float) -> None:
    """Chi-square over 40,000 draws from 16 tokens among 500 impossible ones."""
    vocab, draws, likely = 516, 40000, torch.arange(7, 503, 31)
    row = torch.full((vocab,), -200.0)
    row[likely] = torch.linspace(-spread, spread, len(likely))
    result = token_confidence(
        row.expand(draws, vocab), temperature=0.8, seed=integer(1234), step=integer(5)
    )
    p = torch.softmax(row.double() / 0.8, -1)
    counts = torch.bincount(result.token, minlength=vocab).double()
    assert counts[p < 1e-12].sum() == 0
    expected = p[likely] * draws
    statistic = ((counts[likely] - expected) ** 2 / expected).sum().item()
    # 99.9999 % of the chi-square distribution with 15 degrees of freedom lies below 57.6.
    assert statistic < 57.6
    close(result.prob, p[result.token])


def test_passing_over_hopeless_vectors_changes_nothing() -> None:
    """A peaked row passes over most vectors; the reference passes over none."""
    logits = random_logits(64, 4000, seed=3)
    logits[:, 1234] += 40.0
    logits[::2, 77] += 41.0
    options = {"temperature": 1.0, "seed": integer(99)}
    token, *_ = reference.statistics(logits, dtype=torch.float64, **options)
    assert torch.equal(token_confidence(logits, **options).token, token)
    assert len(set(token.tolist())) > 1
