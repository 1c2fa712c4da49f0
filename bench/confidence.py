"""token_confidence against the decoders' own PyTorch code, eager and compiled, and FlashInfer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench import peers
from bench.case import Case
from lopa_kernels.ops.confidence import reference, token_confidence

#: one exponential, counted as ten, and the additions, comparisons and products beside it
FLOPS_PER_LOGIT = 18

#: Dream and LLaDA-2: 152,064 and 126,464 tokens
DREAM, LLADA = 152064, 126464

#: of logits in a GPU's cases, from one branch's block to the windows of many branches
GPU_ROWS = (32, 128, 512, 1024)

#: standard deviations by which a right generator's draws do not miss their distribution
MOST_DEVIATIONS = 6.0


def filtered(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> torch.Tensor:
    """fp32 logits after the published decoders' filters: what they take out is -inf."""
    logits = logits.float()
    if temperature > 0:
        logits = logits / temperature
    if top_p is not None:
        ordered, indices = torch.sort(logits, descending=True)
        cumulative = torch.softmax(ordered, dim=-1).cumsum(-1)
        removed = torch.zeros_like(cumulative, dtype=torch.bool)
        removed[..., 1:] = cumulative[..., :-1] > top_p
        logits = logits.masked_fill(removed.scatter(-1, indices, removed), -torch.inf)
    if top_k is not None:
        least = torch.topk(logits, top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def eager(
    logits: torch.Tensor,
    metric: str,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token, prob, score) by the operations of the published decoders (Dream, LoPA).

    They upcast the logits and make the whole softmax; the margin sorts it, the entropy takes the
    logarithm of it, top-p sorts the logits, and a draw is a multinomial over it.
    """
    probs = torch.softmax(filtered(logits, temperature, top_k, top_p), dim=-1)
    if temperature > 0:
        token = torch.multinomial(probs, 1).squeeze(-1)
        prob = probs.gather(-1, token[:, None]).squeeze(-1)
    else:
        prob, token = probs.max(-1)
    if metric == "margin":
        best = torch.sort(probs, dim=-1, descending=True).values
        score = best[..., 0] - best[..., 1]
    elif metric == "neg_entropy":
        score = (probs * torch.log(probs + 1e-10)).sum(-1)
    else:
        score = prob
    return token, prob, score


def read(logits: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """The memory of the logits, read once: the floor."""
    return logits.view(torch.int64).amax()


def argmax(logits: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def check(result: Any, expected: Any) -> None:
    """Equal tokens, and floats within the tolerance that the peers' float32 sums allow.

    Where a peer gives no score (None) there is none to compare.
    """
    assert torch.equal(result[0], expected[0]), "tokens differ"
    torch.testing.assert_close(result[1], expected[1], rtol=1e-4, atol=1e-7)
    if result[2] is not None:
        torch.testing.assert_close(result[2], expected[2], rtol=1e-4, atol=1e-4)


def distributions(
    logits: torch.Tensor,
    *_: torch.Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What draws follow: by the contract, and as published, where ties of the k-th all stay."""
    published = torch.softmax(filtered(logits, temperature, top_k, top_p), dim=-1)
    if top_k is None and top_p is None:
        return published, published
    values = logits.float()
    scaled = values / temperature
    kept = reference.kept_tokens(scaled, values, top_k, top_p)
    return torch.softmax(scaled.masked_fill(~kept, -torch.inf), dim=-1), published


def deviations(token: torch.Tensor, p: torch.Tensor) -> float:
    """By how many standard deviations the surprise of all rows' tokens misses its expectation."""
    log_p = p.clamp(min=torch.finfo(p.dtype).tiny).log()
    entropy = -(p * log_p).sum(-1)
    variance = ((p * log_p**2).sum(-1) - entropy**2).double().sum().item()
    excess = (-log_p.gather(-1, token[:, None])[:, 0] - entropy).double().sum().item()
    return excess / max(variance, 1e-9) ** 0.5


def check_drawn(metric: str, which: int, narrower: bool, result: Any, expected: Any) -> None:
    """Tokens that the filters leave, as likely as they are said to be, and no others.

    Draws of different generators differ, so that their surprise is held to the distribution.

    Args:
        metric: of the score.
        which: of :func:`distributions`.
        narrower: the provider's filters leave fewer tokens; only membership is checked.
        result: token, and prob and score or None.
        expected: distributions.
    """
    p = expected[which]
    token, prob, score = result
    token = token.long()
    assert token.shape == p.shape[:1]
    assert bool(((token >= 0) & (token < p.shape[1])).all()), "a token outside the vocabulary"
    chosen = p.gather(-1, token[:, None])[:, 0]
    assert bool((chosen > 0).all()), "a token that the filters take out was drawn"
    if narrower:
        return
    off = deviations(token, p)
    assert abs(off) < MOST_DEVIATIONS, f"the draws miss the distribution by {off:.1f} deviations"
    if prob is not None:
        torch.testing.assert_close(prob, chosen, rtol=1e-4, atol=1e-7)
    if score is not None:
        torch.testing.assert_close(score, _score(metric, p, chosen), rtol=1e-4, atol=1e-4)


def _score(metric: str, p: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    if metric == "neg_entropy":
        return -torch.special.entr(p).sum(-1)
    if metric == "margin":
        best = p.topk(2).values
        return best[:, 0] - best[:, 1]
    return chosen


def flashinfer_providers(
    metric: str, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None
) -> dict[str, Callable[..., Any]]:
    """FlashInfer's way to (part of) the same job; it has no score, and no sampler a probability."""
    unfiltered = top_k is None and top_p is None
    if temperature == 0 and unfiltered and metric != "margin":
        return {"FlashInfer softmax, max (no score)": peers.softmax_max}
    # Its samplers take no temperature: a case at another one would need a pass more.
    if temperature != 1:
        return {}
    if unfiltered:
        return {
            "FlashInfer softmax, sampling (no score)": peers.softmax_sampling,
            "FlashInfer sampling_from_logits (token)": peers.sampling_from_logits,
        }
    if top_k is not None and top_p is not None:
        return {
            f"FlashInfer top_k_top_p, {order} (token)": functools.partial(
                peers.top_k_top_p, order, top_k, top_p
            )
            for order in ("joint", "top_k_first")
        }
    return {}


def case(
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    metric: str,
    device: str = "cpu",
    gpu_peers: bool | None = None,
    **options: Any,
) -> Case:
    """The vocabulary pass over rows x vocab logits.

    Args:
        gpu_peers: with our Triton kernels and FlashInfer where they are present, and an argmax;
            None: on a GPU.
        options: of token_confidence.
    """
    drawn = options.get("temperature", 0.0) > 0
    if gpu_peers is None:
        gpu_peers = device != "cpu"

    def make(buffers: int) -> list[tuple[torch.Tensor, ...]]:
        torch.compiler.reset()
        generator = torch.Generator(device).manual_seed(0)
        shape = (rows, vocab)
        key = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2 if drawn else 0)]
        return [
            ((torch.randn(shape, generator=generator, device=device) * 3).to(dtype), *key)
            for _ in range(buffers)
        ]

    call: Callable[..., Any] = functools.partial(token_confidence, metric=metric, **options)

    def draw(logits: torch.Tensor, *key: torch.Tensor, backend: str | None = None) -> Any:
        return call(logits, seed=key[0], step=key[1], backend=backend)

    ours: Callable[..., Any] = draw if drawn else call
    providers: dict[str, Callable[..., Any]] = {
        "eager": lambda logits, *_: eager(logits, metric=metric, **options),
        "torch.compile": lambda logits, *_: peers.compiled(eager)(logits, metric=metric, **options),
    }
    flashinfer: dict[str, Callable[..., Any]] = {}
    if gpu_peers and peers.has_flashinfer():
        flashinfer = flashinfer_providers(metric, **options)
    providers |= flashinfer
    providers["lopa"] = ours
    if gpu_peers and peers.has_triton("token_confidence"):
        providers["lopa, triton"] = functools.partial(ours, backend="triton")
    if gpu_peers:
        providers["argmax"] = argmax
    providers["read"] = read
    drawing = [name for name in providers if name not in ("argmax", "read")]
    checks: dict[str, Callable[[Any, Any], None]] = {
        name: functools.partial(
            check_drawn, metric, 0 if name.startswith("lopa") else 1, "top_k_first" in name
        )
        for name in drawing
    }
    label = ", ".join([metric, *(f"{name}={value}" for name, value in options.items())])
    return Case(
        op="token_confidence",
        name=f"{rows} x {vocab} {str(dtype).removeprefix('torch.')}, {label}",
        make=make,
        providers=providers,
        reference=None if drawn else "eager",
        check=check,
        bytes=rows * vocab * dtype.itemsize + rows * 16,
        flops=rows * vocab * FLOPS_PER_LOGIT,
        unchecked=("argmax", "read") if gpu_peers else ("read",),
        device=device,
        oracle=functools.partial(distributions, **options) if drawn else None,
        checks=checks if drawn else {},
        optional=("torch.compile", *flashinfer) if gpu_peers else (),
    )


def gpu_cases(device: str) -> list[Case]:
    bf16 = torch.bfloat16
    return [
        *(case(rows, DREAM, bf16, "neg_entropy", device) for rows in GPU_ROWS),
        case(512, DREAM, bf16, "prob", device),
        case(512, DREAM, bf16, "margin", device),
        case(512, LLADA, bf16, "neg_entropy", device),
        case(128, DREAM, torch.float16, "neg_entropy", device),
        case(128, DREAM, torch.float32, "neg_entropy", device),
        *(case(rows, DREAM, bf16, "neg_entropy", device, temperature=1.0) for rows in GPU_ROWS),
        *(
            case(rows, DREAM, bf16, "neg_entropy", device, temperature=1.0, top_k=50, top_p=0.9)
            for rows in GPU_ROWS
        ),
    ]


def cases(device: str = "cpu") -> list[Case]:
    """Every case on one device."""
    if device != "cpu":
        return gpu_cases(device)
    bf16 = torch.bfloat16
    return [
        *(case(64, DREAM, bf16, metric, device) for metric in ("neg_entropy", "prob", "margin")),
        case(1, DREAM, bf16, "neg_entropy", device),
        case(512, DREAM, bf16, "neg_entropy", device),
        case(64, DREAM, torch.float16, "neg_entropy", device),
        case(64, DREAM, torch.float32, "neg_entropy", device),
        case(64, LLADA, bf16, "prob", device),
        case(64, DREAM, bf16, "prob", device, temperature=1.0),
        case(16, DREAM, bf16, "prob", device, top_p=0.9),
        # In bf16 the published top-k keeps every token that equals the k-th, ours exactly k.
        case(16, DREAM, torch.float32, "prob", device, top_k=50),
    ]


CASES = cases()
