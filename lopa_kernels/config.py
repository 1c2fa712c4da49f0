"""Settings of a LoPA round."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

METRICS = ("prob", "margin", "neg_entropy")
ACCEPTS = ("prob", "score")
FALLBACKS = ("block", "window")
REDUCTIONS = ("mean", "bottom", "group", "min")


@dataclass(frozen=True, kw_only=True)
class LopaConfig:
    """The constants of a decode, under the papers' names; hashable, a constant for compilers.

    Attributes:
        mask_id: token id of a position that is not filled yet.
        max_new_tokens: tokens to generate at most; whole blocks of them are opened.
        block_size: T, positions of a block (D2F, SDAR, LLaDA semi-autoregressive); the whole
            generation length where there are no blocks.
        eos_id: token id after which no further block is opened; None: none.
        tau_conf: an open column is accepted if its `accept` value is above it (strictly). In
            [0, 1] for ``accept="prob"``; any number for ``"score"``.
        tau_add: a new block is opened once this share of the last one is filled, in [0, 1].
        tau_act: a block may force its best column once this share of the block before it is
            filled, in [0, 1].
        metric: the score of a column: "prob" p[token], "margin" p1 - p2, "neg_entropy" sum p log p.
        accept: what `tau_conf` is compared with: "prob" or "score" (the metric).
        fallback: who fills a column when nothing is accepted: "block", each activated block by
            itself (D2F, arXiv 2508.09192), or "window", the window once (LoPA's Eq. 1).
        reduction: scores of a branch to its confidence: "mean" (Eq. 2), "bottom", "group", "min"
            (arXiv 2508.15260).
        fraction: the share of lowest scores that "bottom" averages, in (0, 1].
        group: the number of consecutive open columns that "group" averages.
        alpha: weight of the score that made the branch against its window's, in [0, 1].
        shift: logits row c predicts column c + 1 (models derived from autoregressive ones, Dream).
        temperature: 0 takes the most likely token, above 0 samples (with `seed` and `step`).
        top_k, top_p: filters of the distribution, applied after temperature: top_p, then top_k.
        force_anchor: the anchor always wins (verification of lookahead against greedy decoding).
        branches: K of the next state; None: as it comes in.
        window: W of the next state; None: as it comes in.

    Raises:
        ValueError: a value outside its range; the message names the field.

    Source: LoPA, arXiv 2512.16229, Algorithm 1, Eq. 1-2.
    """

    mask_id: int
    max_new_tokens: int
    block_size: int = 32
    eos_id: int | None = None
    tau_conf: float = 0.9
    tau_add: float = 0.1
    tau_act: float = 0.95
    metric: Literal["prob", "margin", "neg_entropy"] = "neg_entropy"
    accept: Literal["prob", "score"] = "prob"
    fallback: Literal["block", "window"] = "block"
    reduction: Literal["mean", "bottom", "group", "min"] = "mean"
    fraction: float = 1.0
    group: int | None = None
    alpha: float = 0.0
    shift: bool = False
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    force_anchor: bool = False
    branches: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        self._choice("metric", METRICS)
        self._choice("accept", ACCEPTS)
        self._choice("fallback", FALLBACKS)
        self._choice("reduction", REDUCTIONS)
        for name in ("mask_id", "eos_id"):
            self._integer(name, 0, optional=name == "eos_id")
        self._integer("block_size", 1)
        self._integer("max_new_tokens", self.block_size, "block_size")
        self._integer("branches", 1, optional=True)
        self._integer("window", self.block_size, "block_size", optional=True)
        self._integer("group", 1, optional=True)
        self._integer("top_k", 1, optional=True)
        if self.eos_id is not None and self.eos_id == self.mask_id:
            self._fail("eos_id", "an id other than mask_id", self.eos_id)
        if self.reduction == "group" and self.group is None:
            self._fail("group", "a number of columns with reduction='group'", None)
        self._share("tau_add")
        self._share("tau_act")
        self._share("alpha")
        self._share("fraction", above_zero=True)
        if self.top_p is not None:
            self._share("top_p", above_zero=True)
        if self.accept == "prob":
            self._share("tau_conf")
        elif math.isnan(self._number("tau_conf")):
            self._fail("tau_conf", "a number", self.tau_conf)
        temperature = self._number("temperature")
        if not (math.isfinite(temperature) and temperature >= 0):
            self._fail("temperature", "a finite number >= 0", temperature)
        for field in fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                self._fail(field.name, "a bool", getattr(self, field.name))

    @classmethod
    def dparallel(
        cls, *, mask_id: int, max_new_tokens: int, tau_entropy: float = 0.5, **others: Any
    ) -> Self:
        """dParallel's decoding rule: a block at a time, without lookahead.

        A column is filled if the entropy of its distribution is below a threshold, and the one of
        lowest entropy in any case; the next block is opened when its last column is filled. With
        `branches` above 1 the same rule fills LoPA's winner.

        Args:
            mask_id, max_new_tokens: as for the class.
            tau_entropy: in nats, the published LLaDA-8B's by default.
            others: further fields of the class.

        Raises:
            ValueError: a value outside its range.

        Source: dParallel, arXiv 2509.26488, and its published code.
        """
        if isinstance(tau_entropy, bool) or not tau_entropy >= 0:
            raise ValueError(
                f"LopaConfig.dparallel: tau_entropy: expected a number >= 0, got {tau_entropy!r}"
            )
        rule: dict[str, Any] = {
            "metric": "neg_entropy",
            "accept": "score",
            "fallback": "window",
            "tau_conf": -tau_entropy,
            "tau_add": 1.0,
            "branches": 1,
        }
        return cls(mask_id=mask_id, max_new_tokens=max_new_tokens, **{**rule, **others})

    def _fail(self, name: str, expected: str, got: object) -> None:
        raise ValueError(f"LopaConfig: {name}: expected {expected}, got {got!r}")

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            self._fail(name, f"one of {', '.join(choices)}", getattr(self, name))

    def _integer(
        self, name: str, least: int, least_name: str | None = None, optional: bool = False
    ) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            bound = f"{least_name} ({least})" if least_name else str(least)
            self._fail(name, f"an integer >= {bound}", value)

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            self._fail(name, "a number", value)
        return float(value)

    def _share(self, name: str, above_zero: bool = False) -> None:
        value = self._number(name)
        # The comparisons are false for NaN.
        if not (0 <= value <= 1) or (above_zero and value == 0):
            self._fail(name, "a number in (0, 1]" if above_zero else "a number in [0, 1]", value)

    def step_args(self, branches: int, window: int) -> tuple[object, ...]:
        """The arguments of the round in ``torch.ops.lopa``'s schemas, from `out_branches` on.

        `branches` and `window` are K and W of the incoming state.
        """
        return (
            branches if self.branches is None else self.branches,
            window if self.window is None else self.window,
            self.tau_conf,
            self.tau_add,
            self.tau_act,
            self.block_size,
            self.max_new_tokens,
            self.mask_id,
            -1 if self.eos_id is None else self.eos_id,
            self.accept,
            self.fallback,
            self.reduction,
            self.fraction,
            self.group,
            self.alpha,
            self.shift,
            self.force_anchor,
        )

    def sampling_args(self) -> tuple[object, ...]:
        """The arguments of the vocabulary pass in ``torch.ops.lopa``'s schemas."""
        return (self.metric, self.temperature, self.top_k, self.top_p)
