"""LoPA decoding over the operators: the pattern for a decoder of any model.

A round is one forward pass of all branches (Pre-Write and branch attention in every layer), one
`lopa_step`, and one commit of the winner's keys and values. There is no Python per token or per
branch, buffers are allocated once, and the host reads one small status a round: whether to stop,
and how many blocks of the window are in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Self

import torch
from torch import Tensor

import lopa_kernels as lk
from examples.tiny_dllm.model import TinyDLLM, rope_table

RoundHook = Callable[[lk.LopaState, lk.LopaStep], None]


@dataclass
class Timer:
    """Seconds by where they were spent."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("model", "step", "total"), 0.0)
    )

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[name] += perf_counter() - start


@dataclass(frozen=True)
class Decoded:
    """A decoded batch, on the CPU."""

    tokens: Tensor
    """int64 [B, max_new_tokens]: generated tokens; blocks that were never opened hold mask_id."""
    forwards: Tensor
    """int64 [B]: forward passes until the sequence was done, its prefill included."""


@dataclass(frozen=True)
class Cache:
    """Static keys and values of a batch: the committed prefix, and the branches' windows."""

    k: Tensor
    """[L, B, S, Hk, D]"""
    v: Tensor
    k_window: Tensor
    """[L, B, K, W, Hk, D]"""
    v_window: Tensor

    @classmethod
    def empty(
        cls,
        model: TinyDLLM,
        batch: int,
        branches: int,
        window: int,
        capacity: int,
        dtype: torch.dtype | None = None,
    ) -> Self:
        c, like = model.config, model.embed.weight

        def buffer(*shape: int) -> Tensor:
            return like.new_zeros(c.layers, batch, *shape, c.kv_heads, c.head_dim, dtype=dtype)

        return cls(
            buffer(capacity), buffer(capacity), buffer(branches, window), buffer(branches, window)
        )

    def columns(self, count: int) -> Self:
        """The same cache with windows of their first `count` columns."""
        return replace(
            self,
            k_window=self.k_window[:, :, :, :count],
            v_window=self.v_window[:, :, :, :count],
        )


class Decoder:
    """Decodes batches of prompts with a LoPA configuration.

    Args:
        model: the model; its dtype and device are the decoder's.
        config: the settings; `branches` and `window` are K and W of the decoding rounds.
        mask: what a window column sees of its branch: "block_causal" (its own and earlier blocks,
            for which the cached prefix is exact) or "full".
        compile: run each round as one graph of torch.compile.
        autocast: dtype of products, keys and values (torch.autocast), as in training; the rest,
            the residual stream above all, keeps the model's. None: the model's throughout.
    """

    def __init__(
        self,
        model: TinyDLLM,
        config: lk.LopaConfig,
        *,
        mask: str = "block_causal",
        compile: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        if config.branches is None or config.window is None:
            raise ValueError("Decoder: config: expected branches and window to be set")
        self.model = model
        self.config = config
        self.mask = mask
        self.autocast = autocast
        self.timer = Timer()
        self.state_device = model.embed.weight.device
        self._compiled = torch.compile(self.graph, fullgraph=True) if compile else None

    def forward(
        self,
        state: lk.LopaState,
        cache: Cache,
        cos_sin: Tensor,
        *,
        direct: bool = False,
    ) -> Tensor:
        """Logits [B, K, W, V] of every column; keys and values go to the windows.

        With `direct` (prefill, one branch) the columns to commit go to the cache as well.
        """
        c = self.model.config
        x = self.model.embed(state.tokens)
        single_phase = {}
        if direct:
            single_phase = {
                "direct": True,
                "k_cache": cache.k,
                "v_cache": cache.v,
                "commit_len": state.commit_len,
            }
        for layer, block in enumerate(self.model.blocks):
            q = lk.qkv_prewrite_(
                cache.k_window,
                cache.v_window,
                layer,
                block.qkv(block.attn_norm(x)),
                cos_sin,
                state.cache_len,
                num_heads=c.q_heads,
                **single_phase,
            )
            attended = lk.branch_attention(
                q,
                cache.k[layer],
                cache.v[layer],
                cache.k_window[layer],
                cache.v_window[layer],
                state.cache_len,
                state.length,
                mask="block_causal" if direct else self.mask,
                block_size=c.block_size,
                prompt_len=state.prompt_len,
            )
            x = x + block.o(attended.flatten(-2))
            x = x + block.mlp(block.mlp_norm(x))
        return self.model.head(self.model.norm(x))

    def finish(self, logits: Tensor, state: lk.LopaState, cache: Cache) -> lk.LopaStep:
        """What follows the model in a decoding round."""
        out = lk.lopa_step(logits, state, self.config)
        lk.kv_commit_(
            cache.k,
            cache.v,
            cache.k_window,
            cache.v_window,
            out.winner,
            state.cache_len,
            state.commit_len,
        )
        return out

    def graph(self, state: lk.LopaState, cache: Cache, cos_sin: Tensor) -> lk.LopaStep:
        """A whole decoding round: what a serving engine would capture or compile."""
        return self.finish(self.forward(state, cache, cos_sin), state, cache)

    def round(self, state: lk.LopaState, cache: Cache, cos_sin: Tensor) -> lk.LopaStep:
        if self._compiled is not None:
            with self.timer("model"):
                return self._compiled(state, cache, cos_sin)
        with self.timer("model"):
            logits = self.forward(state, cache, cos_sin)
        with self.timer("step"):
            return self.finish(logits, state, cache)

    def prefill(self, state: lk.LopaState, cache: Cache, cos_sin: Tensor) -> lk.LopaStep:
        """The first round, over the prompt and the first block: the prompt goes to `cache`."""
        batch, _, window = state.tokens.shape
        own = Cache.empty(self.model, batch, 1, window, 0, self.autocast)
        with self.timer("model"):
            logits = self.forward(state, replace(own, k=cache.k, v=cache.v), cos_sin, direct=True)
        with self.timer("step"):
            return lk.lopa_step(logits, state, self.config)

    @torch.inference_mode()
    def decode(
        self, prompts: Sequence[Sequence[int]], on_round: RoundHook | None = None
    ) -> Decoded:
        """Decodes prompts (token ids) together; `on_round` sees each round's state and outcome.

        Raises:
            RuntimeError: a round reported a status other than 0 for some sequence.
        """
        device = self.model.embed.weight.device.type
        enabled = self.autocast is not None
        with self.timer("total"), torch.autocast(device, self.autocast, enabled=enabled):
            return self._decode(prompts, on_round)

    def _decode(self, prompts: Sequence[Sequence[int]], on_round: RoundHook | None) -> Decoded:
        c, config = self.model.config, self.config
        device = self.state_device
        batch, longest = len(prompts), max(map(len, prompts))
        prompt = torch.full((batch, longest), c.pad_id)
        for row, ids in zip(prompt, prompts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        prompt_len = torch.tensor([len(ids) for ids in prompts], dtype=torch.int32)
        state = lk.initial_state(prompt.to(device), config, prompt_len.to(device))

        capacity = longest + config.max_new_tokens
        assert config.branches is not None
        assert config.window is not None
        cache = Cache.empty(
            self.model, batch, config.branches, config.window, capacity, self.autocast
        )
        cos_sin = rope_table(replace(c, max_pos=capacity + config.window)).to(device)
        # One more column takes what is not committed, so that the scatter needs no host decision.
        text = torch.full((batch, capacity + 1), config.mask_id, device=device)
        forwards = torch.zeros(batch, dtype=torch.int64, device=device)
        window_cache, run = cache, self.prefill
        while True:
            out = run(state, window_cache, cos_sin)
            write_text(text, state.cache_len, out.committed)
            forwards += ~state.done
            if on_round is not None:
                on_round(state, out)
            state = out.state
            finished, status, longest = torch.stack(
                [state.done.all().int(), out.status.max(), state.length.max()]
            ).tolist()
            if status:
                raise RuntimeError(f"round ended with {lk.Status(status)!r}")
            if finished:
                break
            if self._compiled is None:
                # Columns that no branch has reached cost time: drop them, by whole blocks.
                columns = max(c.block_size, -(-longest // c.block_size) * c.block_size)
                state = state._replace(tokens=state.tokens[:, :, :columns])
                window_cache = cache.columns(columns)
            run = self.round
        # What was complete but not committed when the last sequence ended.
        columns = torch.arange(state.tokens.shape[2], device=device)
        anchor = torch.where(columns < state.length[:, :1], state.tokens[:, 0], -1)
        write_text(text, state.cache_len, anchor)
        generated = prompt_len.to(device)[:, None] + torch.arange(
            config.max_new_tokens, device=device
        )
        return Decoded(text.gather(1, generated).cpu(), forwards.cpu())


def write_text(text: Tensor, start: Tensor, tokens: Tensor) -> None:
    """Puts tokens[b, c] (-1: none) at text[b, start[b] + c]."""
    spare = text.shape[1] - 1
    column = start[:, None] + torch.arange(tokens.shape[1], device=text.device)
    column = torch.where(tokens >= 0, column, spare).clamp(max=spare)
    text.scatter_(1, column.long(), tokens)
