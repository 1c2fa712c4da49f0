"""The vocabulary pass in plain PyTorch, written for reading: the oracle of every backend.

It runs on any device. The arithmetic is in `dtype`: float64 where the logits are float64 or where
it is asked for, float32 otherwise.
"""

from __future__ import annotations

import torch

from lopa_kernels._dispatch import implements

#: vocabulary indices of a tile of the two-stage draw
TILE = 2048

_WORD = 0xFFFFFFFF
_FLOAT32_MAX = torch.finfo(torch.float32).max


def philox4x32(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.

    Args:
        counter: four words, of shapes that broadcast.
        key: two words.

    Returns:
        Four words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two words can pass 2^63; its 64 bits are right all the same, and the mask
        # takes away the sign that the shift brings in.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, low0 = (product0 >> 32) & _WORD, product0 & _WORD
        high1, low1 = (product1 >> 32) & _WORD, product1 & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def _words(
    group: torch.Tensor, rows: torch.Tensor, seed: torch.Tensor, step: torch.Tensor | None
) -> torch.Tensor:
    """The four words of every group int64[1 or len(rows), n] in a row's stream, in order."""
    seed = seed.reshape(())
    step = torch.zeros_like(seed) if step is None else step.reshape(())
    row = rows.to(torch.int64)[:, None]
    counter = [
        (group & _WORD).expand(len(rows), -1),
        row & _WORD,
        step & _WORD,
        ((step >> 32) ^ (row >> 32)) & _WORD,
    ]
    words = philox4x32(counter, [seed & _WORD, (seed >> 32) & _WORD])
    return torch.stack(words, dim=-1).flatten(1)


def random_words(
    rows: torch.Tensor,
    vocab: int,
    seed: torch.Tensor,
    step: torch.Tensor | None,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """The 32-bit random integer of every (row, vocabulary index), as int64[len(rows), vocab].

    The key is `seed`; the counter is (index >> 2, row, step, high word of step ^ high word of
    row), and index & 3 names the word of the output. `start` (int64[len(rows)], multiples of 4)
    gives the index of the first column in each row; default 0.
    """
    group = torch.arange((vocab + 3) // 4, device=rows.device)[None]
    if start is not None:
        group = group + start[:, None] // 4
    return _words(group, rows, seed, step)[:, :vocab]


def tile_words(
    rows: torch.Tensor, vocab: int, seed: torch.Tensor, step: torch.Tensor | None
) -> torch.Tensor:
    """The 32-bit random integer of every (row, tile), as int64[len(rows), number of tiles].

    As :func:`random_words`, with 2^31 + (tile >> 2) as the counter's first word.
    """
    tiles = -(-vocab // TILE)
    group = torch.arange((tiles + 3) // 4, device=rows.device)[None]
    return _words(group + 2**31, rows, seed, step)[:, :tiles]


def gumbel_numbers(words: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel numbers, float64, of 32-bit random integers: -log(-log(1 - v)).

    v = (word + 1/2) / 2^32; in the upper half 1 - v comes from the complement of the word, so that
    both tails are exact.
    """
    v = (words.to(torch.float64) + 0.5) * 2.0**-32
    complement = ((_WORD - words).to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(torch.where(words < 2**31, -torch.log1p(-v), -torch.log(complement)))


def kept_tokens(
    scaled: torch.Tensor, values: torch.Tensor, top_k: int | None, top_p: float | None
) -> torch.Tensor:
    """Which tokens the filters leave, bool like `scaled` (log-weights; `values` give the order).

    In the order of descending value, then ascending index, a token passes top-p if the probability
    before it is at most `top_p`; of those, top-k leaves the first `top_k`.
    """
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    kept = torch.ones_like(order, dtype=torch.bool)
    if top_p is not None and top_p < 1:
        probability = torch.softmax(scaled.gather(-1, order), dim=-1)
        kept[:, 1:] &= probability.cumsum(-1)[:, :-1] <= top_p
    if top_k is not None:
        kept[:, top_k:] = False
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _tiles(scaled: torch.Tensor) -> torch.Tensor:
    """log-weights[n, V] as [n, number of tiles, TILE], filled up with -inf."""
    padding = -scaled.shape[-1] % TILE
    return torch.nn.functional.pad(scaled, (0, padding), value=-torch.inf).unflatten(1, (-1, TILE))


def tile_scores(
    scaled: torch.Tensor, rows: torch.Tensor, seed: torch.Tensor, step: torch.Tensor | None
) -> torch.Tensor:
    """First stage of the draw: the log-mass of every tile plus its Gumbel number."""
    noise = gumbel_numbers(tile_words(rows, scaled.shape[-1], seed, step))
    return _tiles(scaled).logsumexp(-1) + noise.to(scaled.dtype)


def token_scores(
    scaled: torch.Tensor,
    tile: torch.Tensor,
    rows: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor | None,
) -> torch.Tensor:
    """Second stage: the log-weight of every token of one tile a row, plus its Gumbel number."""
    inside = _tiles(scaled)[torch.arange(len(tile), device=tile.device), tile]
    noise = gumbel_numbers(random_words(rows, TILE, seed, step, start=tile * TILE))
    return inside + noise.to(scaled.dtype)


def draw(
    scaled: torch.Tensor, rows: torch.Tensor, seed: torch.Tensor, step: torch.Tensor | None
) -> torch.Tensor:
    """Tokens drawn by softmax(scaled[n, V]): the Gumbel-max rule in two exact stages.

    First a tile of TILE vocabulary indices by its mass, then a token of that tile by its weight.
    That takes a random number for each tile, and for each token of one tile. Ties go to the lowest
    index.
    """
    tile = tile_scores(scaled, rows, seed, step).argmax(-1)
    return tile * TILE + token_scores(scaled, tile, rows, seed, step).argmax(-1)


def statistics(
    logits: torch.Tensor,
    rows: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token int64, prob, margin, neg_entropy, lse) of rows of logits[..., V], in `dtype`.

    The arguments are those of :func:`lopa_kernels.softmax_stats`.
    """
    if dtype is None:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    vocab = logits.shape[-1]
    shape = logits.shape[:-1] if rows is None else rows.shape
    logits = logits.reshape(-1, vocab)
    if rows is None:
        index = torch.arange(len(logits), device=logits.device)
    else:
        index = rows.reshape(-1).to(torch.int64)
        wrong = (index < -1) | (index >= len(logits))
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise RuntimeError(
                f"rows: expected -1 or an index below R = {len(logits)}, "
                f"got {int(index[at])} at flat index {at}"
            )
        if len(logits) == 0:
            logits = logits.new_full((1, vocab), -torch.inf)
        logits = logits[index.clamp(min=0)]
    empty = ~logits.isfinite().any(-1) | (index < 0)

    values = logits.to(dtype)
    values = torch.where(values.isnan(), -torch.inf, values).clamp(max=_FLOAT32_MAX) + 0.0
    values = torch.where(empty[:, None], 0.0, values)
    largest = values.amax(-1, keepdim=True) if len(values) else values[:, :1]
    scaled = values - largest
    if temperature > 0:
        scaled = scaled / temperature
    if top_k is not None or top_p is not None:
        scaled = scaled.masked_fill(~kept_tokens(scaled, values, top_k, top_p), -torch.inf)
    log_sum = scaled.logsumexp(-1, keepdim=True)
    log_p = scaled - log_sum
    p = log_p.exp()

    token = scaled.argmax(-1)
    if temperature > 0:
        if seed is None:
            raise ValueError("seed: expected an int64 tensor, since temperature > 0, got None")
        token = draw(scaled, index, seed, step)
    prob = p.gather(-1, token[:, None])[:, 0]
    best = p.topk(min(2, vocab), dim=-1).values
    margin = best[:, 0] - best[:, 1] if vocab > 1 else best[:, 0]
    neg_entropy = torch.where(p > 0, p * log_p, 0.0).sum(-1)
    lse = (largest / (temperature if temperature > 0 else 1.0) + log_sum)[:, 0]
    lse = lse.clamp(-_FLOAT32_MAX, _FLOAT32_MAX)

    return (
        token.masked_fill(empty, 0).reshape(shape),
        prob.masked_fill(empty, 0.0).reshape(shape),
        margin.masked_fill(empty, 0.0).reshape(shape),
        neg_entropy.masked_fill(empty, -torch.inf).reshape(shape),
        lse.masked_fill(empty, -torch.inf).reshape(shape),
    )


def token_confidence(
    logits: torch.Tensor,
    rows: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    metric: str = "prob",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token int64, prob, score), the last two in `dtype`."""
    token, prob, margin, neg_entropy, lse = statistics(
        logits, rows, seed, step, temperature, top_k, top_p, dtype
    )
    score = {"prob": prob, "margin": margin, "neg_entropy": neg_entropy}[metric]
    return token, prob, torch.where(lse == -torch.inf, -torch.inf, score)


@implements("token_confidence", "reference")
def _token_confidence(
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    seed: torch.Tensor | None,
    step: torch.Tensor | None,
    metric: str,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    token, prob, score = token_confidence(
        logits, rows, seed, step, metric, temperature, top_k, top_p
    )
    return token, prob.to(torch.float32), score.to(torch.float32)


@implements("token_confidence_out", "reference")
def _token_confidence_out(
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    seed: torch.Tensor | None,
    step: torch.Tensor | None,
    metric: str,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    *,
    token: torch.Tensor,
    prob: torch.Tensor,
    score: torch.Tensor,
) -> None:
    results = token_confidence(logits, rows, seed, step, metric, temperature, top_k, top_p)
    for out, result in zip((token, prob, score), results, strict=True):
        out.copy_(result)


@implements("softmax_stats", "reference")
def _softmax_stats(
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    seed: torch.Tensor | None,
    step: torch.Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> tuple[torch.Tensor, ...]:
    token, *floats = statistics(logits, rows, seed, step, temperature, top_k, top_p)
    return (token, *(value.to(torch.float32) for value in floats))
