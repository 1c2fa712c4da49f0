"""The ways of decoding that the demonstration and the evaluation compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import lopa_kernels as lk
from examples.tiny_dllm.decode import Decoder
from examples.tiny_dllm.model import TinyConfig
from examples.tiny_dllm.problems import Problem, extract_answer
from examples.tiny_dllm.tokenizer import CharTokenizer

#: the threshold of the published loop's recorded rounds, as are tau_add and tau_act below
#: (tests/data/conformance)
PAPER_TAU = 0.9


@dataclass(frozen=True)
class Method:
    """A named decoding configuration."""

    name: str
    config: lk.LopaConfig


def base_config(model: TinyConfig, window: int = 128) -> lk.LopaConfig:
    return lk.LopaConfig(
        mask_id=model.mask_id,
        eos_id=model.eos_id,
        max_new_tokens=model.max_new_tokens,
        block_size=model.block_size,
        tau_conf=PAPER_TAU,
        tau_add=0.1,
        tau_act=0.95,
        metric="neg_entropy",
        branches=1,
        window=window,
    )


def vanilla(model: TinyConfig) -> Method:
    """One token a forward pass, block after block: nothing is accepted, each round forces one.

    Two blocks of window, so that a finished block can be committed while the next is filled.
    """
    config = base_config(model, window=2 * model.block_size)
    return Method("vanilla", replace(config, tau_conf=1.0, tau_add=1.0, tau_act=1.0))


def lopa(model: TinyConfig, branches: int, tau_conf: float, **changes: Any) -> Method:
    """K = 1 is confidence-driven decoding, above it LoPA."""
    config = replace(base_config(model), branches=branches, tau_conf=tau_conf, **changes)
    return Method("confidence" if branches == 1 else f"LoPA K={branches}", config)


def entropy(model: TinyConfig, tau_entropy: float, **changes: Any) -> Method:
    """dParallel's rule: fills what is below an entropy, in nats, block after block.

    Two blocks of window, as `vanilla`.
    """
    settings: dict[str, Any] = {
        "mask_id": model.mask_id,
        "eos_id": model.eos_id,
        "max_new_tokens": model.max_new_tokens,
        "block_size": model.block_size,
        "window": 2 * model.block_size,
    }
    return Method("entropy", lk.LopaConfig.dparallel(tau_entropy=tau_entropy, **settings | changes))


@dataclass(frozen=True)
class Outcome:
    """What a method made of each of n problems."""

    correct: Tensor
    """bool [n]"""
    forwards: Tensor
    """int64 [n]: forward passes."""
    filled: Tensor
    """int64 [n]: positions filled, the padding after the end of the text included."""
    written: Tensor
    """int64 [n]: tokens of the text, its end of text included."""
    seconds: dict[str, float]

    @property
    def accuracy(self) -> float:
        return float(self.correct.double().mean())

    @property
    def tpf(self) -> float:
        """Tokens a forward pass: positions filled over forward passes; 1 at most for vanilla."""
        return float(self.filled.sum()) / float(self.forwards.sum())

    @property
    def text_tpf(self) -> float:
        """The same, counting only tokens of the text."""
        return float(self.written.sum()) / float(self.forwards.sum())

    def summary(self) -> dict[str, float]:
        return {
            "problems": len(self.correct),
            "accuracy": self.accuracy,
            "forwards": int(self.forwards.sum()),
            "tpf": self.tpf,
            "text_tpf": self.text_tpf,
            "tokens_per_second": float(self.filled.sum()) / self.seconds["total"],
            **{f"seconds_{name}": value for name, value in self.seconds.items()},
            "seconds_elsewhere": self.seconds["total"]
            - self.seconds["model"]
            - self.seconds["step"],
        }


def judge(tokens: Tensor, forwards: Tensor, problems: Sequence[Problem]) -> tuple[Tensor, ...]:
    """(correct, forwards, filled, written) of decoded tokens [n, max_new_tokens]."""
    tokenizer = CharTokenizer()
    correct, written = [], []
    for row, problem in zip(tokens.tolist(), problems, strict=True):
        text = tokenizer.decode(row)
        correct.append(extract_answer(text) == problem.answer)
        ends = row.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in row else len(row)
        written.append(ends)
    filled = (tokens != tokenizer.mask_id).sum(1)
    return torch.tensor(correct), forwards, filled, torch.tensor(written)


def run(
    decoder: Decoder,
    problems: Sequence[Problem],
    batch: int,
    advance: Callable[[int], None] | None = None,
) -> Outcome:
    """Decodes all problems in batches; `advance` is told how many were finished."""
    tokenizer = CharTokenizer()
    parts = []
    for start in range(0, len(problems), batch):
        some = problems[start : start + batch]
        decoded = decoder.decode([tokenizer.encode(problem.prompt) for problem in some])
        parts.append(judge(decoded.tokens, decoded.forwards, some))
        if advance is not None:
            advance(len(some))
    correct, forwards, filled, written = (torch.cat(column) for column in zip(*parts, strict=True))
    return Outcome(correct, forwards, filled, written, dict(decoder.timer.seconds))
