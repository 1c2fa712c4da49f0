"""The draws of token_confidence: the generator, the numbers, the rule, the distribution."""

from __future__ import annotations

import decimal
import itertools
import math

import pytest
import torch
from cases import (
    DRAW_VOCABULARIES,
    chi_square_limit,
    close,
    integer,
    random_logits,
    run_on,
    skip_where_slow,
)
from targets import KERNELS, TARGETS, Target, over

from lopa_kernels.ops.confidence import reference, softmax_stats, token_confidence

TILE = reference.TILE


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


def philox_words(first: int, row: int, seed: int, step: int) -> list[int]:
    """The four words of one counter, in Python integers."""
    word = 0xFFFFFFFF
    c = [first, row & word, step & word, (step >> 32 ^ row >> 32) & word]
    k0, k1 = seed & word, seed >> 32 & word
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k0, b & word, a >> 32 ^ c[3] ^ k1, a & word]
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c


SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 2**32 + 5)
STEPS = (0, 3, 2**32 - 1, 2**35 + 9, -4)


@pytest.mark.parametrize(("seed", "step"), list(itertools.product(SEEDS[1::2], STEPS[1::2])))
def test_words_of_tokens_and_tiles(seed: int, step: int) -> None:
    """Which counter, which key, which word of the four."""
    vocab, rows = 5 * TILE + 3, [0, 7, 2**33 + 1]
    key = (torch.tensor(rows), vocab, integer(seed), integer(step))
    tokens, tiles = reference.random_words(*key), reference.tile_words(*key)
    assert tokens.shape == (3, vocab)
    assert tiles.shape == (3, 6)
    for i, row in enumerate(rows):
        for token in (0, 1, 2, 3, 4, 2047, 2049, vocab - 1):
            words = philox_words(token >> 2, row, seed, step)
            assert tokens[i, token] == words[token & 3]
        for tile in range(6):
            words = philox_words(0x80000000 | tile >> 2, row, seed, step)
            assert tiles[i, tile] == words[tile & 3]
    start = torch.tensor([0, 4096, 8])
    moved = reference.random_words(key[0], 100, *key[2:], start=start)
    for i in range(3):
        assert torch.equal(moved[i], tokens[i, start[i] : start[i] + 100])


@pytest.mark.parametrize("stage", ["tile", "token"])
def test_each_stage_is_exact(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two candidates of masses a and b, with uniform numbers u and v of their words.

    The race -log(1 - u) / a < -log(1 - v) / b is won where v is above 1 - (1 - u)^(b / a); over a
    uniform v that has the probability (1 - u)^(b / a), and over a uniform u it is a / (a + b). So
    the rule is exact if the choice changes at that v, for every u.
    """
    b = 0.37  # a = 1
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(300, generator=generator, dtype=torch.float64)
    u[:3] = torch.tensor([1e-6, 1e-3, 1 - 1e-6])
    first = (u * 2**32).long()
    u = (first.double() + 0.5) * 2.0**-32
    # v, and 1 - v where that is what a word can resolve.
    v, complement = -torch.expm1(b * torch.log1p(-u)), (1 - u) ** b
    boundary = torch.where(v < 0.5, v * 2**32 - 0.5, 2**32 - complement * 2**32 - 0.5)
    keep = (boundary > 100) & (boundary < 2**32 - 100)
    assert keep.sum() > 290
    first, boundary = first[keep], boundary[keep]

    vocab = TILE + 100
    indices = [5, 2100] if stage == "tile" else [3, 77]
    scaled = torch.full((len(first), vocab), -torch.inf, dtype=torch.float64)
    scaled[:, indices[0]], scaled[:, indices[1]] = 0.0, math.log(b)
    if stage == "tile":  # many tokens make up the mass
        scaled[:, 2048:2148] = math.log(b / 100)
    for side, winner in ((-1, 1), (1, 0)):
        second = (boundary + side * torch.maximum(boundary * 1e-9, torch.tensor(2.0))).round()
        words = torch.full((len(first), TILE), 2**31)
        places = [0, 1] if stage == "tile" else indices
        words[:, places[0]], words[:, places[1]] = first, second.long()

        def given(*arguments: object, words: torch.Tensor = words, **_: object) -> torch.Tensor:
            return words[:, : 2 if stage == "tile" else None]

        with monkeypatch.context() as patch:
            patch.setattr(reference, "tile_words" if stage == "tile" else "random_words", given)
            token = reference.draw(scaled, torch.arange(len(first)), integer(1), None)
        assert bool((token // TILE == winner if stage == "tile" else token == places[winner]).all())


def drawn_by_hand(row: list[float], index: int, temperature: float, seed: int, step: int) -> int:
    """The rule with nothing but loops and math."""

    def gumbel(word: int) -> float:
        return -math.log(-math.log1p(-((word + 0.5) / 2**32)))

    top = max(row)
    scores = []
    for tile in range(-(-len(row) // TILE)):
        mass = math.fsum(
            math.exp((x - top) / temperature) for x in row[tile * TILE : (tile + 1) * TILE]
        )
        word = philox_words(0x80000000 | tile >> 2, index, seed, step)[tile & 3]
        scores.append(math.log(mass) + gumbel(word) if mass > 0 else -math.inf)
    start = scores.index(max(scores)) * TILE
    scores = [
        (x - top) / temperature + gumbel(philox_words(i >> 2, index, seed, step)[i & 3])
        for i, x in enumerate(row[start : start + TILE], start)
    ]
    return start + scores.index(max(scores))


@over(TARGETS)
def test_draws_by_hand(target: Target) -> None:
    for vocab, temperature in ((3, 1.0), (2048, 0.5), (2050, 2.0), (9000, 1.5)):
        logits = random_logits(5, vocab, seed=vocab)
        logits[1, : vocab // 2] = -torch.inf
        rows = torch.tensor([4, 1, 0], dtype=torch.int32)
        seed, step = -77 + vocab, 2**33 + vocab
        options = {"temperature": temperature, "seed": integer(seed), "step": integer(step)}
        token = run_on(target, token_confidence, logits, rows=rows, **options).token
        expected = [
            drawn_by_hand(logits[r].tolist(), r, temperature, seed, step) for r in rows.tolist()
        ]
        assert token.tolist() == expected


@pytest.mark.parametrize("seed", SEEDS)
@over(KERNELS)
def test_kernel_draws_with_the_same_numbers(seed: int, target: Target) -> None:
    """Equal logits: in the tile drawn, the index of the smallest random integer."""
    rows = torch.tensor([0, 5, 2, 5], dtype=torch.int32)
    steps, vocabularies = STEPS, (1, 4, 67, 1025, 5000)
    if target.interpreted:
        steps, vocabularies = STEPS[1:4:2], (67, 5000)
    for step, vocab in itertools.product(steps, vocabularies):
        key = {"seed": integer(seed), "step": integer(step)}
        options = {"temperature": 1.0, "rows": rows, **key}
        token = run_on(target, token_confidence, torch.zeros(6, vocab), **options).token
        sizes = torch.tensor([len(part) for part in torch.arange(vocab).split(TILE)])
        noise = reference.gumbel_numbers(reference.tile_words(rows, vocab, **key))
        tile = (sizes.double().log() + noise).argmax(-1)
        words = reference.random_words(rows, vocab, **key)
        outside = torch.arange(vocab) // TILE != tile[:, None]
        assert torch.equal(token, words.masked_fill(outside, 2**32).argmin(-1))


def expected_draws(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The float64 reference's tokens and probabilities, and how near each was to another: the gap
    between the two best of either stage, or that of top-p's boundary to a token."""
    token, prob, *_ = reference.statistics(
        logits, rows, seed, step, temperature, top_k, top_p, dtype=torch.float64
    )
    values = logits[rows.long()].double()
    scaled = (values - values.amax(-1, keepdim=True)) / temperature
    gap = torch.full(token.shape, torch.inf, dtype=torch.float64)
    if top_p is not None:
        before = scaled.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
        gap = (before - top_p).abs().amin(-1)
    kept = reference.kept_tokens(scaled, values, top_k, top_p)
    scaled = scaled.masked_fill(~kept, -torch.inf)
    for scores in (
        reference.tile_scores(scaled, rows, seed, step),
        reference.token_scores(scaled, token // TILE, rows, seed, step),
    ):
        if scores.shape[-1] > 1:
            best = scores.topk(2).values
            gap = torch.minimum(gap, best[:, 0] - best[:, 1])
    return token, prob, gap


DRAW_OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 0.7, "top_k": 50},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 2.0, "top_k": 3000, "top_p": 0.95},
]


@pytest.mark.parametrize("options", DRAW_OPTIONS)
@pytest.mark.parametrize("vocab", DRAW_VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@over(KERNELS)
def test_the_same_key_draws_the_same_token(
    vocab: int, dtype: torch.dtype, options: dict, target: Target
) -> None:
    """Equal to the float64 reference, where that is not within 1e-5 of another token."""
    skip_where_slow(target, vocab > 10000 or dtype != torch.float32)
    keys = 2 if target.interpreted or vocab > 100000 else 8
    logits = random_logits(9, vocab, seed=vocab).to(dtype)
    logits[::3] *= 0.2  # hundreds of tokens are likely
    generator = torch.Generator().manual_seed(vocab)
    draws = different = 0
    for key in range(keys):
        rows = torch.randint(9, (2 if target.interpreted else 11,), generator=generator)
        rows = rows.to(torch.int32)
        step = int(torch.randint(-(2**62), 2**62, (), generator=generator))
        call = {"rows": rows, "seed": integer(1000003 * key - 5), "step": integer(step), **options}
        token, prob, gap = expected_draws(logits, **call)
        result = run_on(target, softmax_stats, logits, **call)
        wrong, clear = result.token != token, gap > 1e-5
        assert not bool((wrong & clear).any())
        close(result.prob[clear], prob[clear])
        draws, different = draws + len(rows), different + int(wrong.sum())
    assert different <= draws // 100


@over(KERNELS)
def test_default_step_is_zero(target: Target) -> None:
    logits, key = random_logits(8, 500), {"temperature": 1.0, "seed": integer(9)}
    with_step = run_on(target, token_confidence, logits, step=integer(0), **key)
    without = run_on(target, token_confidence, logits, **key)
    assert torch.equal(with_step.token, without.token)
    other = run_on(target, token_confidence, logits, step=integer(1), **key)
    assert not torch.equal(other.token, without.token)


# The distribution itself: where draws are equal to the reference's it is the reference's.
STATISTICAL = [target for target in TARGETS if not target.interpreted]


def check_counts(counts: torch.Tensor, probability: torch.Tensor) -> None:
    """Chi-square of counts against probabilities that add up to one."""
    assert probability.sum().item() == pytest.approx(1, abs=1e-6)
    expected = probability.double() * counts.sum()
    assert expected.min() >= 5
    statistic = ((counts.double() - expected) ** 2 / expected).sum().item()
    assert statistic < chi_square_limit(counts.numel() - 1)


@pytest.mark.parametrize("spread", [0.5, 3.0])
@over([target for target in STATISTICAL if target.backend != "reference"])
def test_draws_follow_the_distribution(spread: float, target: Target) -> None:
    """Draws from 16 tokens among 500 impossible ones."""
    vocab, draws, likely = 516, 40000, torch.arange(7, 503, 31)
    row = torch.full((vocab,), -200.0)
    row[likely] = torch.linspace(-spread, spread, len(likely))
    options = {"temperature": 0.8, "seed": integer(1234), "step": integer(5)}
    result = run_on(target, token_confidence, row.expand(draws, vocab), **options)
    p = torch.softmax(row.double() / 0.8, -1)
    counts = torch.bincount(result.token, minlength=vocab)
    assert counts[p < 1e-12].sum() == 0
    check_counts(counts[likely], p[likely])
    close(result.prob, p[result.token])


@pytest.mark.parametrize("filters", [{}, {"top_k": 4 * TILE}, {"top_p": 0.8749}])
@pytest.mark.parametrize("vocab", [5 * TILE, 4 * TILE + 700])
@over(STATISTICAL)
def test_draws_over_tiles(vocab: int, filters: dict, target: Target) -> None:
    """Five tiles of known mass, in each four classes of tokens of known weight.

    Either filter takes away one tile: the least likely, and of its equals the last. The table of
    tiles and classes shows the draw of a tile, that of a token inside it, and that the two have
    nothing to do with one another.
    """
    pairs, rows = (2, 800) if target.backend == "reference" else (8 if filters else 20, 2000)
    masses = torch.tensor([2.0, 3.0, 1.0, 1.0, 1.0]) / 8
    classes = torch.tensor([1.0, 1.0, 2.0, 4.0]) / 8
    row = torch.empty(vocab, dtype=torch.float64)
    for part, mass in zip(row.split(TILE), masses, strict=True):
        part[:] = (
            (mass * classes.double() * 4 / len(part)).log().repeat(-(-len(part) // 4))[: len(part)]
        )
    row = 0.5 * row.float()
    counts = torch.zeros(5, 4, dtype=torch.long)
    for pair in range(pairs):
        key = {"seed": integer(31 * pair), "step": integer(pair**5), "temperature": 0.5}
        logits = row.expand(rows, vocab)
        token = run_on(target, token_confidence, logits, **key, **filters).token
        cells = 4 * (token // TILE) + token % TILE % 4
        counts += torch.bincount(cells, minlength=20).view(5, 4)
    scaled = (row / 0.5).double()[None]
    kept = reference.kept_tokens(scaled, scaled, filters.get("top_k"), filters.get("top_p"))
    p = scaled.masked_fill(~kept, -torch.inf).softmax(-1)[0]
    table = torch.zeros(20, dtype=torch.float64)
    table.index_add_(0, 4 * (torch.arange(vocab) // TILE) + torch.arange(vocab) % TILE % 4, p)
    possible = table.view(5, 4) > 0
    assert counts[~possible].sum() == 0
    check_counts(counts[possible], table.view(5, 4)[possible])


@over(KERNELS)
def test_passing_over_hopeless_vectors_changes_nothing(target: Target) -> None:
    """A peaked row passes over most vectors; the reference passes over none."""
    logits = random_logits(16 if target.interpreted else 64, 4000, seed=3)
    logits[:, 1234] += 40.0
    logits[::2, 77] += 41.0
    logits[1::2, 3500] += 41.0
    options = {"temperature": 1.0, "seed": integer(99)}
    token, *_ = reference.statistics(logits, dtype=torch.float64, **options)
    assert torch.equal(run_on(target, token_confidence, logits, **options).token, token)
    assert len(set(token.tolist())) > 1
