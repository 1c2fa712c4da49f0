"""A LoPA round as one CUDA graph, and the loop that launches rounds without waiting for them.

A round reads one static state and writes another; the next round reads that one and writes the
first, so that nothing is copied between rounds. All that a round leaves for the host lies in one
flat buffer, which one asynchronous copy brings to pinned memory. The host looks at it while the
next round runs: it learns a round late that all is done, and which window the round after needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lopa_kernels as lk
from examples.dream.model import Cache, DiffusionLM, rope_table
from lopa_kernels.distributed import BranchParallel

#: bytes at whose multiples the tensors of a flat buffer begin
_ALIGN = 256


@dataclass(frozen=True)
class Decoded:
    """A decoded batch, on the CPU."""

    tokens: Tensor
    """int64 [B, max_new_tokens]: generated tokens; blocks that were never opened hold mask_id."""
    rounds: Tensor
    """int64 [B]: forward passes until the sequence was done, its prefill included."""


def _size(template: lk.LopaStep) -> int:
    tensors = (*template.state, *template[1:])
    return sum(-(-t.numel() * t.element_size() // _ALIGN) * _ALIGN for t in tensors)


def _views(flat: Tensor, template: lk.LopaStep) -> lk.LopaStep:
    """Tensors like those of `template`, one after the other in `flat`."""
    offset, made = 0, []
    for like in (*template.state, *template[1:]):
        size = like.numel() * like.element_size()
        made.append(flat[offset : offset + size].view(like.dtype).view(like.shape))
        offset += -(-size // _ALIGN) * _ALIGN
    fields = len(lk.LopaState._fields)
    return lk.LopaStep(lk.LopaState(*made[:fields]), *made[fields:])


def _apart(step: lk.LopaStep) -> lk.LopaStep:
    """The same memory, each tensor with a storage of its own.

    torch.compile refuses to mutate views of one storage that differ in dtype, overlapping or not.
    """
    own = [torch.from_dlpack(tensor) for tensor in (*step.state, *step[1:])]
    fields = len(lk.LopaState._fields)
    return lk.LopaStep(lk.LopaState(*own[:fields]), *own[fields:])


class _Slot:
    """What rounds of one parity write, and its image on the host."""

    def __init__(self, template: lk.LopaStep, device: torch.device) -> None:
        size = _size(template)
        self.flat = torch.zeros(size, dtype=torch.uint8, device=device)
        self.step = _apart(_views(self.flat, template))
        self.event: torch.cuda.Event | None = None
        self.image, self.host = self.flat, self.step
        if device.type == "cuda":
            self.event = torch.cuda.Event()
            self.image = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
            self.host = _views(self.image, template)
        # A state that passes through every round, for captures before the first prompt.
        self.step.state.branches.fill_(1)
        self.step.state.done.fill_(True)

    def send(self) -> None:
        """Starts the copy to the host, behind what is under way."""
        if self.event is not None:
            self.image.copy_(self.flat, non_blocking=True)
            self.event.record()

    def read(self) -> lk.LopaStep:
        """The step on the host, once it is there."""
        if self.event is not None:
            self.event.synchronize()
        return self.host


def _committed(step: lk.LopaStep, columns: int) -> Tensor:
    """int64 [B, columns], in the memory of the widest window."""
    batch = step.committed.shape[0]
    return step.committed.flatten()[: batch * columns].view(batch, columns)


class Runner:
    """Decodes batches of up to `capacity` positions; its buffers and graphs outlive a decode.

    Args:
        model: its device and dtype are the runner's; of a sharded one all ranks have a runner.
        config: `branches` and `window` are K and W of the rounds; `shift` is the model's.
        batch: B.
        capacity: S, positions of a sequence, prompt and generated ones.
        mask: what a window column sees of its branch: "full" (D2F) or "block_causal".
        single_phase: Pre-Write also writes the cache, and there is no commit (mask
            "block_causal" alone).
        windows: the window sizes to run, ascending, the last one W; None: the multiples of
            block_size, and W. Each is a graph for either parity.
        head_rows: rows of the LM head a round; None: all columns. Too few are a RuntimeError.
        capture: replay CUDA graphs; None: on a GPU.
        compile: run rounds under torch.compile(fullgraph=True); prefill runs as it is. PyTorch
            counts the windows of all compiled runners against its `recompile_limit`;
            `torch._dynamo.reset()` starts afresh.
        compile_backend: its backend.
        seed: of the sampling (temperature > 0).
        parallel: the branches are spread over its ranks, each of which has a runner of the same
            settings and decodes the same prompts; all get the same tokens. Without sampling,
            whose draws depend on a row's place, and without `compile`.

    Raises:
        ValueError: settings that do not fit together.
    """

    def __init__(
        self,
        model: DiffusionLM,
        config: lk.LopaConfig,
        *,
        batch: int = 1,
        capacity: int,
        mask: str = "full",
        single_phase: bool = False,
        windows: Sequence[int] | None = None,
        head_rows: int | None = None,
        capture: bool | None = None,
        compile: bool = False,
        compile_backend: str | Callable[..., Any] = "inductor",
        seed: int = 0,
        parallel: BranchParallel | None = None,
    ) -> None:
        if config.branches is None or config.window is None:
            raise ValueError("Runner: config: expected branches and window to be set")
        if config.shift != model.config.shift:
            raise ValueError(f"Runner: config: expected shift={model.config.shift} of the model")
        if single_phase and mask != "block_causal":
            raise ValueError(f"Runner: single_phase: needs mask='block_causal', got {mask!r}")
        width, block = config.window, config.block_size
        sizes = [*range(block, width, block), width] if windows is None else list(windows)
        if sizes != sorted(set(sizes)) or not sizes or sizes[0] < 1 or sizes[-1] != width:
            raise ValueError(f"Runner: windows: expected ascending up to {width}, got {sizes}")
        if parallel is not None and parallel.config != config:
            raise ValueError("Runner: parallel: expected one of the same config")
        if parallel is not None and (config.temperature > 0 or compile):
            raise ValueError("Runner: parallel: expected temperature 0 and no compile")
        if model.ranks > 1 and compile:
            raise ValueError("Runner: compile: expected a model that is not sharded")
        self.device = model.embed.device
        if capture is None:
            capture = self.device.type == "cuda"
        if capture and self.device.type != "cuda":
            raise ValueError(f"Runner: capture: needs a GPU, the model is on {self.device}")
        self.model, self.config, self.mask, self.single_phase = model, config, mask, single_phase
        self.batch, self.capacity, self.windows = batch, capacity, sizes
        self.head_rows, self.capture = head_rows, capture
        self.parallel = parallel
        self.cache = self._make_cache()
        self.cos_sin = rope_table(model.config, capacity + width, self.device)
        self._seed = self._count = None
        if config.temperature > 0:
            self._seed = torch.tensor([seed], device=self.device)
            self._count = torch.zeros_like(self._seed)
        self._slots = self._make_slots()
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._round: Callable[..., None] = self._compute
        if compile:
            limit = torch._dynamo.config.recompile_limit
            if len(sizes) > limit:
                raise ValueError(f"Runner: windows: compile takes {limit} at most, got {sizes}")
            self._round = torch.compile(
                self._compute, fullgraph=True, dynamic=False, backend=compile_backend
            )
        self.launched = 0

    def _make_cache(self) -> Cache:
        model, parallel = self.model, self.parallel
        branches, window = self.config.branches, self.config.window
        assert branches is not None
        assert window is not None
        if parallel is None:
            return Cache.empty(model, self.batch, branches, window, self.capacity)
        prefix = Cache.empty(model, self.batch, 1, 0, self.capacity)
        c = model.config
        windows = parallel.windows(c.layers, self.batch, c.kv_heads, c.head_dim, model.embed.dtype)
        return Cache(prefix.k, prefix.v, *windows)

    def _make_slots(self) -> list[_Slot]:
        empty = torch.empty(self.batch, 0, dtype=torch.int64)
        first = lk.initial_state(empty, self.config)
        state = lk.empty_step(first, self.config).state
        return [_Slot(lk.empty_step(state, self.config), self.device) for _ in range(2)]

    def _compute(
        self,
        state: lk.LopaState,
        out: lk.LopaStep,
        cache: Cache,
        head_rows: int,
        mask: str,
        direct: bool,
        commit: bool,
    ) -> None:
        """A round: what is captured and compiled, and what prefill runs."""
        config, parallel = self.config, self.parallel
        own = state if parallel is None else parallel.local(state)
        needed = lk.needed_rows(own, config, head_rows)
        residual, delta = self.model.hidden(
            own,
            cache,
            self.cos_sin,
            mask=mask,
            block_size=config.block_size,
            direct=direct,
        )
        logits = self.model.logits(residual, delta, needed.index)
        if parallel is None:
            lk.lopa_step_out(
                logits, state, config, out, needed.rows, seed=self._seed, step=self._count
            )
        else:
            statistics = lk.token_confidence(logits, metric=config.metric, rows=needed.rows)
            assert isinstance(statistics, lk.TokenConfidence)
            parallel.step_out(*statistics, state, out, direct=not commit)
        if commit:
            (lk.kv_commit_ if parallel is None else parallel.commit_)(
                cache.k,
                cache.v,
                cache.k_window,
                cache.v_window,
                out.winner,
                state.cache_len,
                state.commit_len,
                status=out.status,
            )
        if self._count is not None:
            self._count.add_(1)

    def _decode_round(self, columns: int, parity: int) -> None:
        """The round that reads slot 1 - parity and writes slot parity."""
        source, target = self._slots[1 - parity].step.state, self._slots[parity].step
        rows = self.batch * self.cache.k_window.shape[2] * columns
        self._round(
            source._replace(tokens=source.tokens[:, :, :columns]),
            target._replace(committed=_committed(target, columns)),
            self.cache.columns(columns),
            rows if self.head_rows is None else min(rows, self.head_rows),
            self.mask,
            self.single_phase,
            not self.single_phase,
        )

    def _capture(self, columns: int, parity: int) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._decode_round(columns, parity)
        self._pool = graph.pool()
        self._graphs[columns, parity] = graph

    @torch.no_grad()
    def prepare(self) -> None:
        """Captures every graph now. Otherwise each is captured after its first round.

        Raises:
            RuntimeError: a decode has been started.
        """
        if self.launched:
            raise RuntimeError("Runner.prepare: expected no decode before it")
        if self.capture:
            for columns in reversed(self.windows):
                for parity in (0, 1):
                    # Kernels are compiled and libraries set up outside of captures.
                    self._decode_round(columns, parity)
                    self._capture(columns, parity)

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        vocabulary = self.model.config.vocab_size
        if len(prompts) != self.batch:
            raise ValueError(f"prompts: expected {self.batch}, got {len(prompts)}")
        for row, ids in enumerate(prompts):
            room = self.capacity - self.config.max_new_tokens
            if not 1 <= len(ids) <= room:
                raise ValueError(f"prompts[{row}]: expected 1 to {room} tokens, got {len(ids)}")
            if not all(0 <= token < vocabulary for token in ids):
                raise ValueError(f"prompts[{row}]: expected ids below {vocabulary}")

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Launches the prefill of B prompts (token ids): a round whose window is the prompt.

        Raises:
            ValueError: the number of prompts, a length, or an id.
        """
        self._check(prompts)
        config, lengths = self.config, [len(ids) for ids in prompts]
        # Whole blocks, so that kernels that are compiled for a width see few of them.
        longest = -(-max(lengths) // config.block_size) * config.block_size
        padded = torch.full((self.batch, longest), config.mask_id)
        for row, ids in zip(padded, prompts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        prompt_len = torch.tensor(lengths, dtype=torch.int32)
        state = lk.initial_state(padded, config, prompt_len)
        state = lk.LopaState(*(tensor.to(self.device) for tensor in state))
        slot, window = self._slots[0], state.tokens.shape[2]
        own = lk.empty_step(state, config)
        windows = Cache.empty(self.model, self.batch, 1, window, 0)
        if self._count is not None:
            self._count.zero_()
        # Of other shapes than a decoding round's, so that the host gets none of a prefill.
        slot.step.confidence.fill_(-torch.inf)
        slot.step.committed.fill_(-1)
        self._compute(
            state,
            slot.step._replace(confidence=own.confidence, committed=own.committed),
            Cache(self.cache.k, self.cache.v, windows.k_window, windows.v_window),
            # The first block's rows, and the one before it that a shifted model reads.
            self.batch * (config.block_size + 1),
            "block_causal",
            True,
            False,
        )
        slot.send()
        self.launched = 1

    @torch.no_grad()
    def launch(self, columns: int) -> None:
        """Launches a round over windows of `columns` columns, one of `windows`; never waits.

        The caller has to know that no branch is longer (`WINDOW_FULL` or `BAD_STATE` otherwise).
        """
        if columns not in self.windows:
            raise ValueError(f"columns: expected one of {self.windows}, got {columns}")
        if not self.launched:
            raise RuntimeError("Runner.launch: expected start() before it")
        if self.parallel is not None:
            self.parallel.check()
        parity = self.launched % 2
        graph = self._graphs.get((columns, parity))
        if graph is not None:
            graph.replay()
            self._slots[parity].send()
        else:
            self._decode_round(columns, parity)
            self._slots[parity].send()
            if self.capture:
                self._capture(columns, parity)
        self.launched += 1

    def result(self, number: int) -> lk.LopaStep:
        """Round `number` (0: prefill) on the host, one of the last two that were launched.

        Waits for that round alone. The first B * columns elements of `committed` are its
        [B, columns], the rest is of other rounds.
        """
        if not max(0, self.launched - 2) <= number < self.launched:
            raise ValueError(f"number: expected one of the last two rounds, got {number}")
        return self._slots[number % 2].read()

    def fitting(self, length: int) -> int:
        """The smallest window size that holds `length` columns, W at most."""
        return next((size for size in self.windows if size >= length), self.windows[-1])

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        on_round: Callable[[lk.LopaStep], None] | None = None,
    ) -> Decoded:
        """Decodes prompts (token ids) together; `on_round` sees each round's step on the host,
        whose memory the round after the next overwrites; of a prefill without its `confidence`
        and `committed`.

        Raises:
            ValueError: as :meth:`start`.
            RuntimeError: a round reported a status other than 0 for some sequence.
        """
        config, block = self.config, self.config.block_size
        self.start(prompts)
        text = torch.full((self.batch, self.capacity), config.mask_id)
        rounds = torch.zeros(self.batch, dtype=torch.int64)
        begin = torch.tensor([len(ids) for ids in prompts])
        start, done = begin.clone(), torch.zeros(self.batch, dtype=torch.bool)
        # The window of a round is at most that of the round before, and one block: what the
        # host knows when it launches a round is the state two rounds earlier.
        longest, seen, width = block, 0, 1
        while True:
            following = self.fitting(min(longest + block, self.windows[-1]))
            self.launch(following)
            step = self.result(seen)
            if step.status.any():
                row = int(step.status.argmax())
                fault = lk.Status(int(step.status[row]))
                raise RuntimeError(f"sequence {row}: round {seen} ended with {fault!r}")
            rounds += ~done
            # Prefill commits the prompt, which is known.
            step = step._replace(committed=_committed(step, width))
            _write(text, start, step.committed)
            if on_round is not None:
                on_round(step)
            done = step.state.done.clone()
            if bool(done.all()):
                break
            start = step.state.cache_len.long()
            longest, width, seen = int(step.state.length.max()), following, seen + 1
        # What was complete but not committed when the last sequence ended.
        column = torch.arange(step.state.tokens.shape[2])
        anchor = torch.where(column < step.state.length[:, :1], step.state.tokens[:, 0], -1)
        _write(text, step.state.cache_len.long(), anchor)
        generated = begin[:, None] + torch.arange(config.max_new_tokens)
        return Decoded(text.gather(1, generated), rounds)


def _write(text: Tensor, start: Tensor, tokens: Tensor) -> None:
    """Puts tokens[b, c] (-1: none) at text[b, start[b] + c]."""
    row, column = (tokens >= 0).nonzero(as_tuple=True)
    text[row, start[row] + column] = tokens[row, column]
