"""token_confidence against the decoders' own PyTorch code, eager and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench.case import Case
from lopa_kernels.ops.confidence import token_confidence

#: one exponential, counted as ten, and the additions, comparisons and products beside it
FLOPS_PER_LOGIT = 18

#: Dream and LLaDA-2: 152,064 and 126,464 tokens
DREAM, LLADA = 152064, 126464


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
    probs = torch.softmax(logits, dim=-1)
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


@functools.cache
def compiled() -> Callable[..., Any]:
    """`eager` under torch.compile with static shapes; the first call compiles."""
    return torch.compile(eager, dynamic=False)


def read(logits: torch.Tensor) -> torch.Tensor:
    """The memory of the logits, read once: the floor."""
    return logits.view(torch.int64).amax()


def check(result: Any, expected: Any) -> None:
    """Equal tokens, and floats within the tolerance that the peers' float32 sums allow."""
    assert torch.equal(result[0], expected[0]), "tokens differ"
    torch.testing.assert_close(result[1], expected[1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(result[2], expected[2], rtol=1e-4, atol=1e-4)


def check_drawn(result: Any, expected: Any) -> None:
    """Draws of different generators differ: tokens exist and have a probability."""
    assert result[0].shape == expected[0].shape
    assert bool((result[1] > 0).all())


def case(
    rows: int, vocab: int, dtype: torch.dtype, metric: str, device: str = "cpu", **options: Any
) -> Case:
    """The vocabulary pass over rows x vocab logits."""
    drawn = options.get("temperature", 0.0) > 0

    def make(buffers: int) -> list[tuple[torch.Tensor]]:
        generator = torch.Generator(device).manual_seed(0)
        shape = (rows, vocab)
        return [
            ((torch.randn(shape, generator=generator, device=device) * 3).to(dtype),)
            for _ in range(buffers)
        ]

    ours = dict(options)
    if drawn:
        ours["seed"] = torch.zeros(1, dtype=torch.int64, device=device)
    label = ", ".join([metric, *(f"{name}={value}" for name, value in options.items())])
    return Case(
        op="token_confidence",
        name=f"{rows} x {vocab} {str(dtype).removeprefix('torch.')}, {label}",
        make=make,
        providers={
            "eager": functools.partial(eager, metric=metric, **options),
            "torch.compile": lambda logits: compiled()(logits, metric=metric, **options),
            "lopa": functools.partial(token_confidence, metric=metric, **ours),
            "read": read,
        },
        reference="eager",
        check=check_drawn if drawn else check,
        bytes=rows * vocab * dtype.itemsize + rows * 16,
        flops=rows * vocab * FLOPS_PER_LOGIT,
        unchecked=("read",),
    )


def cases(device: str = "cpu") -> list[Case]:
    """Every case on one device."""
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
