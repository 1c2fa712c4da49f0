"""A decoder around a made-up model: its logits, keys and values are looked up, so that they are
the same to the bit on every device, and every tensor is a static buffer, so that a round of it can
be captured."""

from __future__ import annotations

import torch

import lopa_kernels as lk
from lopa_kernels import LopaConfig, LopaState, LopaStep

#: two vocabulary tiles, the second one short
VOCAB = 2100
MASK = VOCAB - 1
ROWS = 509
LAYERS, HEADS, HEAD_DIM = 2, 2, 8

FORMS = ("functional", "out", "in place")


def make_config(**fixed: object) -> LopaConfig:
    values: dict[str, object] = {
        "mask_id": MASK,
        "max_new_tokens": 20,
        "block_size": 4,
        "tau_conf": 0.6,
        "tau_add": 0.5,
        "branches": 3,
        "window": 12,
    }
    return LopaConfig(**{**values, **fixed})  # type: ignore[arg-type]


class Model:
    """Rows of tables, chosen by a branch's own tokens and the position."""

    def __init__(self, device: str) -> None:
        g = torch.Generator().manual_seed(0)
        table = torch.randn(ROWS, VOCAB, generator=g) * (torch.rand(ROWS, 1, generator=g) * 5 + 1)
        table[:, MASK] = float("-inf")
        self.table = table.to(device)
        self.keys = torch.randn(LAYERS, ROWS, HEADS, HEAD_DIM, generator=g).to(device)
        self.values = torch.randn(LAYERS, ROWS, HEADS, HEAD_DIM, generator=g).to(device)
        angle = torch.rand(64, HEAD_DIM // 2, generator=g) * 6
        self.cos_sin = torch.cat([angle.cos(), angle.sin()], 1).to(device)

    def rows(self, state: LopaState) -> torch.Tensor:
        """int64 [B, K, W], the row of the tables that each column reads."""
        columns = torch.arange(state.tokens.shape[2], device=state.tokens.device)
        position = state.cache_len[:, None, None] + columns
        whole = state.tokens.sum(-1, keepdim=True)
        return (whole * 17 + state.tokens * 31 + position * 101) % ROWS


class Decode:
    """Sequences being decoded, in static buffers; `round` makes no allocation that outlives it."""

    def __init__(self, model: Model, config: LopaConfig, device: str, backend: str) -> None:
        self.model, self.config, self.device, self.backend = model, config, device, backend
        self.sampling: dict[str, torch.Tensor] = {}
        if config.temperature > 0:
            self.sampling = {
                name: torch.zeros(1, dtype=torch.int64, device=device) for name in ("seed", "step")
            }
        self.cache: tuple[torch.Tensor, ...] = ()
        self.window: tuple[torch.Tensor, ...] = ()

    def start(self, prompt: torch.Tensor, seed: int = 0) -> None:
        """The prefill round; a second start reuses the buffers of the first."""
        if self.sampling:
            self.sampling["seed"].fill_(seed)
            self.sampling["step"].fill_(0)
        initial = lk.initial_state(prompt.to(self.device), self.config)
        batch, columns = prompt.shape
        capacity = columns + self.config.max_new_tokens
        if not self.cache:
            shape = (LAYERS, batch, capacity, HEADS, HEAD_DIM)
            self.cache = tuple(torch.zeros(2, *shape, device=self.device).unbind())
            self.status = torch.zeros(batch, dtype=torch.int32, device=self.device)
        for tensor in (*self.cache, self.status):
            tensor.zero_()
        window = self._window(initial)
        step = self._step(initial, window)
        self._commit(window, step.winner, initial.cache_len, initial.commit_len)
        if not self.window:
            self.state = LopaState(*map(torch.clone, step.state))
            self.results = LopaStep(*lk.empty_step(self.state, self.config))
            self.window = self._window(self.state)
        for tensor in (*self.window, *self.results[1:]):
            tensor.zero_()
        for static, value in zip(self.state, step.state, strict=True):
            static.copy_(value)

    def _window(self, state: LopaState) -> tuple[torch.Tensor, ...]:
        shape = (LAYERS, *state.tokens.shape, HEADS, HEAD_DIM)
        return tuple(torch.zeros(2, *shape, device=self.device).unbind())

    def _step(
        self, state: LopaState, window: tuple[torch.Tensor, ...], form: str = "functional"
    ) -> LopaStep:
        rows = self.model.rows(state)
        for layer in range(LAYERS):
            k, v = self.model.keys[layer][rows], self.model.values[layer][rows]
            lk.kv_prewrite_(
                *window, layer, k, v, self.model.cos_sin, state.cache_len, backend=self.backend
            )
        needed = lk.needed_rows(state, self.config, backend=self.backend)
        logits = self.model.table[rows.flatten()[needed.index]]
        options = {**self.sampling, "backend": self.backend}
        if form == "functional":
            return lk.lopa_step(logits, state, self.config, needed.rows, **options)
        out = self.results if form == "out" else self.results._replace(state=state)
        lk.lopa_step_out(logits, state, self.config, out, needed.rows, **options)
        return out

    def _commit(
        self, window: tuple[torch.Tensor, ...], winner: torch.Tensor, *lengths: torch.Tensor
    ) -> None:
        lk.kv_commit_(
            *self.cache, *window, winner, *lengths, status=self.status, backend=self.backend
        )

    def round(self, form: str = "functional") -> None:
        """One round, in place as far as its caller sees; `form` is the form of lopa_step."""
        # The in-place form moves them on before the commit reads them.
        lengths = self.state.cache_len.clone(), self.state.commit_len.clone()
        step = self._step(self.state, self.window, form)
        self._commit(self.window, step.winner, *lengths)
        for static, value in zip(
            (*self.state, *self.results[1:]), (*step.state, *step[1:]), strict=True
        ):
            if static is not value:
                static.copy_(value)
        if self.sampling:
            self.sampling["step"].add_(1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a round changes."""
        named = {
            **self.state._asdict(),
            **{name: getattr(self.results, name) for name in LopaStep._fields[1:]},
            **self.sampling,
            "cache status": self.status,
        }
        for prefix, pair in (("cache", self.cache), ("window", self.window)):
            named |= {f"{kind} {prefix}": t for kind, t in zip("kv", pair, strict=True)}
        return named


def assert_same(actual: Decode, expected: Decode, where: str) -> None:
    """To the bit, all that a round changes."""
    theirs = expected.tensors()
    for name, tensor in actual.tensors().items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=0, atol=0, equal_nan=True,
            msg=lambda m, name=name: f"{where}, {name}: {m}",
        )  # fmt: skip
