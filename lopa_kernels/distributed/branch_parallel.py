"""A decoder's side of branch parallelism: own slots, exchange, the round, the commit."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist

import lopa_kernels
from lopa_kernels._checks import FLOATING, check_choice, check_device, check_dtype, check_shape
from lopa_kernels.config import LopaConfig
from lopa_kernels.distributed import partition as _partition
from lopa_kernels.distributed.partition import Partition
from lopa_kernels.distributed.transport import Collective, Symmetric, triton_kernels
from lopa_kernels.distributed.watch import (
    BranchParallelError,
    Watch,
    differences,
    end_process,
    store_of,
)
from lopa_kernels.ops.confidence import TokenConfidence
from lopa_kernels.ops.step import branch_step, branch_step_out
from lopa_kernels.state import LopaState, LopaStep, check_state

#: how many were made in a group: the same number on every rank names the same object
_made: Counter[str] = Counter()


class BranchParallel:
    """The branches of a batch, spread over the ranks of a process group.

    Every rank holds the same LopaState and the same KV cache, runs its model on :meth:`local`
    alone, and derives the same next state in :meth:`step` from the exchanged statistics.
    All ranks call the same methods in the same order; nothing here waits for the device.

    Args:
        config: the round's settings; `branches` and `window` must be set.
        group: the ranks, one process a device; None: the default group.
        device: of all tensors; None: the current GPU for NCCL, otherwise the CPU.
        transport: "collective": torch.distributed's all_gather and all_reduce; "symmetric": kernels
            that read the peers' memory, for GPUs of one host linked to each other; "auto":
            symmetric where every rank can, otherwise collective.
        columns: committed columns a round at most, which sizes the collective commit; None: the
            window. A longer commit is refused as one that does not fit (see :meth:`commit_`).
        timeout: seconds: a rank that gives no sign of life for that long is gone, and all others
            end with an error that names it.
        model: whatever identifies the weights and their dtype; ranks with another are refused.
        watch: the ranks to watch over; None: `group`. With tensor parallelism, the default group
            (``dist.group.WORLD``), since any rank that is lost stops them all.

    Raises:
        TypeError, ValueError: an argument out of range.
        BranchParallelError: the ranks differ in their settings, or one did not come.

    Source: LoPA section 3.4, arXiv 2512.16229.
    """

    def __init__(
        self,
        config: LopaConfig,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str | None = None,
        transport: Literal["auto", "collective", "symmetric"] = "auto",
        columns: int | None = None,
        timeout: float = 30.0,
        model: str = "",
        watch: dist.ProcessGroup | None = None,
    ) -> None:
        op = "BranchParallel"
        if not isinstance(config, LopaConfig):
            raise TypeError(f"{op}: config: expected a LopaConfig, got {type(config).__name__}")
        if config.branches is None or config.window is None:
            raise ValueError(f"{op}: config: expected branches and window to be set")
        check_choice(op, "transport", transport, ("auto", "collective", "symmetric"))
        if columns is not None and columns < 1:
            raise ValueError(f"{op}: columns: expected 1 or more, got {columns}")
        if timeout <= 0:
            raise ValueError(f"{op}: timeout: expected more than 0 seconds, got {timeout}")
        self.config, self.timeout = config, timeout
        self.group = dist.group.WORLD if group is None else group
        assert self.group is not None
        watched = self.group if watch is None else watch
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0 or dist.get_rank(watched) < 0:
            raise ValueError(f"{op}: group: expected a group that this process belongs to")
        self.device = self._device(device)
        self._partitions: dict[int, Partition] = {}
        self._sources: dict[int, torch.Tensor] = {}

        self._topics = 0
        self._ended = threading.Event()
        self._talk = self._watch_of(self.group, "talk", None)
        said = self._agree("settings", self._settings(transport, columns, model))
        chosen = self._transport(transport, said)
        self._watch = self._watch_of(watched, "watch", self._on_fault)
        self._watch.start()
        if chosen == "symmetric":
            self._moves: Collective = Symmetric(
                self.group, self.device, self._run, columns, timeout
            )
        else:
            self._moves = Collective(self.group, self.device, self._run, columns)
        self._kernels = triton_kernels(self.device)

    @property
    def transport(self) -> str:
        """ "collective" or "symmetric": what was chosen."""
        return self._moves.name

    @property
    def slots(self) -> range:
        """The branch slots of ``config.branches`` that this rank owns."""
        assert self.config.branches is not None
        return self.partition(self.config.branches).slots(self.rank)

    @property
    def places(self) -> int:
        """Slots that every rank computes: ceil(K / ranks)."""
        assert self.config.branches is not None
        return self.partition(self.config.branches).places

    def partition(self, branches: int) -> Partition:
        """How a state of so many slots is divided (prefill has one)."""
        if branches not in self._partitions:
            self._partitions[branches] = Partition(branches, self.ranks)
        return self._partitions[branches]

    def local(self, state: LopaState) -> LopaState:
        """The part of `state` that this rank's forward pass runs: a state of `places` slots.

        A place without a live branch of this rank mirrors the anchor, so that shapes are static
        and place 0 always holds a branch with the committed columns: ``direct=True`` of the
        prewrite is right on every rank. ``needed_rows`` of the result names no row of such places.

        Args:
            state: the full state, K slots; the same on all ranks.

        Returns:
            LopaState: tokens int64 [B, places, W], length, creation and eos [B, places]; branches
            the live ones, at least 1; done also where this rank has no live branch.
        """
        check_state("BranchParallel.local", state)
        branches = state.tokens.shape[1]
        partition = self.partition(branches)
        if branches not in self._sources:
            self._sources[branches] = torch.tensor(partition.sources(self.rank), device=self.device)
        source = self._sources[branches]
        own = partition.slots(self.rank)
        if self._kernels is not None:
            return self._kernels.local_state(state, own, source)
        return _partition.local_state(state, own, source)

    def windows(
        self, layers: int, batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeroed k_window and v_window [L, B, places, W, Hk, D] that the transport can read.

        A collective call. Only these windows, or their leading columns, are read by peers; others
        go by the collective. The next call ends the use of the last windows.

        Raises:
            TypeError: dtype.
            BranchParallelError: the ranks ask for different sizes.
        """
        check_dtype("BranchParallel.windows", "dtype", torch.empty(0, dtype=dtype), FLOATING)
        assert self.config.branches is not None
        assert self.config.window is not None
        partition = self.partition(self.config.branches)
        shape = (layers, batch, partition.places, self.config.window, kv_heads, head_dim)
        self._agree("windows", {"shape": list(shape), "dtype": str(dtype)})
        return self._moves.windows(shape, dtype, partition)

    def exchange(
        self,
        token: torch.Tensor,
        prob: torch.Tensor,
        score: torch.Tensor,
        branches: int | None = None,
        *,
        direct: bool = False,
    ) -> TokenConfidence:
        """The statistics of all slots from those of each rank's places: 12 bytes a column.

        Args:
            token: int64 [B, places, W], of the rows of this rank's logits.
            prob, score: fp32 [B, places, W].
            branches: K of the round's state; None: ``config.branches``.
            direct: no :meth:`commit_` follows in this round.

        Returns:
            token, prob, score [B, K, W], the same bits on every rank.

        Raises:
            TypeError, ValueError: dtype, shape or device of an argument.
            BranchParallelError: a rank is gone.
        """
        op = "BranchParallel.exchange"
        branches = branches or self.config.branches
        assert branches is not None
        partition = self.partition(branches)
        for name, value, dtype in (
            ("token", token, torch.int64),
            ("prob", prob, torch.float32),
            ("score", score, torch.float32),
        ):
            check_dtype(op, name, value, dtype)
            if value.dim() != 3:
                raise ValueError(
                    f"{op}: {name}: expected shape [B, places, W], got {list(value.shape)}"
                )
            check_shape(op, name, value, (token.shape[0], partition.places, token.shape[2]))
            check_device(op, name, value, self.device)
        self.check()
        return TokenConfidence(*self._moves.exchange((token, prob, score), partition, direct))

    def step(
        self,
        token: torch.Tensor,
        prob: torch.Tensor,
        score: torch.Tensor,
        state: LopaState,
        *,
        direct: bool = False,
    ) -> LopaStep:
        """The round of the whole state from the statistics of this rank's places.

        :meth:`exchange`, then :func:`lopa_kernels.branch_step` on the same inputs everywhere.
        """
        full = self.exchange(token, prob, score, state.tokens.shape[1], direct=direct)
        return branch_step(*full, state, self.config)

    def step_out(
        self,
        token: torch.Tensor,
        prob: torch.Tensor,
        score: torch.Tensor,
        state: LopaState,
        out: LopaStep,
        *,
        direct: bool = False,
    ) -> None:
        """:meth:`step` into existing tensors, as :func:`lopa_kernels.branch_step_out`."""
        full = self.exchange(token, prob, score, state.tokens.shape[1], direct=direct)
        branch_step_out(*full, state, self.config, out)

    def commit_(
        self,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k_window: torch.Tensor,
        v_window: torch.Tensor,
        winner: torch.Tensor,
        cache_len: torch.Tensor,
        commit_len: torch.Tensor,
        *,
        status: torch.Tensor | None = None,
    ) -> None:
        """:func:`lopa_kernels.kv_commit_` on every rank, from the rank that owns the winner.

        Args:
            k_cache, v_cache: [L, B, S, Hk, D] of this rank, written; equal on all ranks after.
            k_window, v_window: [L, B, places, W, Hk, D] of this rank (see :meth:`windows`).
            winner: int32 [B], a slot of the whole state, read on the device.
            cache_len, commit_len, status: int32 [B], as for kv_commit_. More committed columns
                than `columns` do not fit, as past S.

        Raises:
            TypeError, ValueError: shape, dtype or device of an argument.
            RuntimeError: on the CPU and without `status`, a commit that does not fit.
            BranchParallelError: a rank is gone.
        """
        op = "BranchParallel.commit_"
        assert self.config.branches is not None
        partition = self.partition(self.config.branches)
        for name, window in (("k_window", k_window), ("v_window", v_window)):
            if window.dim() != 6 or window.shape[2] != partition.places:
                raise ValueError(
                    f"{op}: {name}: expected shape [L, B, {partition.places}, W, Hk, D], "
                    f"got {list(window.shape)}"
                )
            check_dtype(op, name, window, FLOATING)
            check_device(op, name, window, self.device)
        check_shape(op, "v_window", v_window, k_window.shape)
        check_dtype(op, "winner", winner, torch.int32)
        self.check()
        self._moves.commit_(
            (k_cache, v_cache),
            (k_window, v_window),
            (winner, cache_len, commit_len),
            status,
            partition,
        )

    def check(self) -> None:
        """Raises BranchParallelError once a rank is gone; costs nothing.

        A replayed graph asks nobody: call it each round, when the host has read its status.
        """
        if self._watch.fault is not None:
            self._ended.set()
            self._watch.check()

    def explain(self, error: BaseException) -> BranchParallelError:
        """What is behind an error of the device, which does not know of ranks.

        A barrier of the symmetric transport that waits in vain ends its graph with a device error;
        this waits until the watch has found the reason, for a bounded time.
        """
        self._ended.set()
        return self._watch.explain(error)

    def close(self) -> None:
        """Ends the watch; the other ranks do not take it for a loss."""
        self._ended.set()
        self._watch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if error is not None and not isinstance(error, BranchParallelError):
            self._watch.declare(
                f"rank {self._watch.rank} of {self._watch.ranks} ended with "
                f"{type(error).__name__}: {error}"
            )
        self.close()

    def _device(self, device: torch.device | str | None) -> torch.device:
        if device is None:
            nccl = "nccl" in str(dist.get_backend(self.group))
            device = torch.device("cuda" if nccl else "cpu")
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return device

    def _watch_of(
        self, group: dist.ProcessGroup, kind: str, on_fault: Callable[[str], None] | None
    ) -> Watch:
        key = f"{kind}/{group.group_name}"
        name = f"{kind}{_made[key]}"
        _made[key] += 1
        return Watch(
            store_of(group, name, self.timeout),
            dist.get_rank(group),
            dist.get_world_size(group),
            self.timeout,
            on_fault,
        )

    def _settings(self, transport: str, columns: int | None, model: str) -> dict[str, object]:
        settings: dict[str, object] = {f"config.{k}": v for k, v in asdict(self.config).items()}
        settings |= {
            "lopa_kernels": lopa_kernels.__version__,
            "torch": torch.__version__,
            "device type": self.device.type,
            "transport": transport,
            "columns": columns,
            "timeout": self.timeout,
            "model": model,
            "group size": self.ranks,
        }
        # What may differ: where this rank is.
        settings["place"] = [socket.gethostname(), self.device.index, self._can_map()]
        return settings

    def _can_map(self) -> bool:
        if self.device.type != "cuda" or triton_kernels(self.device) is None:
            return False
        devices = range(torch.cuda.device_count())
        return all(
            torch.cuda.can_device_access_peer(self.device, other)
            for other in devices
            if other != self.device.index
        )

    def _agree(self, topic: str, fields: Mapping[str, object]) -> list[Mapping[str, object]]:
        """What all ranks say, the same but for their places."""
        said = self._talk.agree(f"{topic}{self._topics}", fields)
        self._topics += 1
        lines = differences([{k: v for k, v in one.items() if k != "place"} for one in said])
        if lines:
            raise BranchParallelError(
                f"BranchParallel: {topic}: the ranks differ: {'; '.join(lines)}"
            )
        return said

    def _transport(self, asked: str, said: list[Mapping[str, Any]]) -> str:
        if asked == "collective":
            return asked
        hosts = {one["place"][0] for one in said}
        unable = [rank for rank, one in enumerate(said) if not one["place"][2]]
        if not unable and len(hosts) == 1:
            return "symmetric"
        if asked == "symmetric":
            reason = (
                f"ranks {unable} cannot read their peers' memory"
                if unable
                else f"the ranks are on hosts {', '.join(sorted(hosts))}"
            )
            raise BranchParallelError(f"BranchParallel: transport: symmetric: {reason}")
        return "collective"

    def _run(self, name: str, call: Callable[[], dist.Work | None]) -> None:
        """Runs a collective; on the CPU, where it blocks, until it ends or a rank is gone."""
        try:
            work = call()
            while work is not None:
                try:
                    work.wait(timedelta(seconds=min(self.timeout / 10, 1.0)))
                    return
                except RuntimeError as error:
                    self.check()
                    if "timed out" not in str(error).lower() or work.is_completed():
                        raise
        except BranchParallelError:
            raise
        except RuntimeError as error:
            fault = self.explain(error)
            raise type(fault)(f"{fault} (in the {name} of rank {self.rank})") from error

    def _on_fault(self, fault: str) -> None:
        """On the watching thread: what waits on the device is set free, or ended."""
        if self.device.type == "cpu":
            return
        with contextlib.suppress(Exception):
            self.group._get_backend(self.device).abort()  # type: ignore[union-attr]
        # Kernels of a lost communicator end now, those of a barrier after its time-out; a main
        # thread that does not come back to ask by then never will.
        if not self._ended.wait(self.timeout + 5.0):
            end_process(fault)
