"""Statistics and committed keys and values between the ranks, by a collective or peer reads."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lopa_kernels.distributed.partition import Partition
from lopa_kernels.ops.kv_cache import kv_commit_

Run = Callable[[str, Callable[[], dist.Work | None]], None]
Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Windows = tuple[torch.Tensor, torch.Tensor]

# The name since torch 2.13 of what 2.11 calls all_gather_into_tensor.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def triton_kernels(device: torch.device) -> Any:
    """The Triton kernels of the package where the device runs them, otherwise None."""
    from lopa_kernels import _dispatch

    if device.type not in ("cuda", "xpu") or _dispatch.why_absent("triton") is not None:
        return None
    from lopa_kernels.distributed import triton

    return triton


@dataclass
class _Buffers:
    """The static buffers of one shape of statistics."""

    packed: torch.Tensor
    """int32 [3, B, places, W]."""
    gathered: torch.Tensor
    """int32 [R, 3, B, places, W]."""
    index: torch.Tensor
    """int64 [K]: rank * places + place of each slot."""
    slots: torch.Tensor
    """int64 [K]: the addresses of the slots' statistics."""


class Collective:
    """all_gather of the statistics, all_reduce of the winner's keys and values.

    Every rank enters the same collectives in the same order, whoever wins, so that no host needs
    to know.

    Args:
        group: the ranks.
        device: of all tensors.
        run: runs a collective by name, watching the ranks meanwhile.
        columns: committed columns at most, for the buffer of a commit; None: the window.
    """

    name = "collective"

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, run: Run, columns: int | None
    ) -> None:
        self.group, self.device, self.columns = group, device, columns
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.kernels = triton_kernels(device)
        self._run = run
        self._buffers: dict[tuple[int, int, int], _Buffers] = {}
        self._words: dict[tuple[torch.Size, torch.dtype], torch.Tensor] = {}
        self._zeros: dict[int, torch.Tensor] = {}

    def windows(self, shape: tuple[int, ...], dtype: torch.dtype, partition: Partition) -> Windows:
        k_window, v_window = torch.zeros(2, *shape, dtype=dtype, device=self.device).unbind()
        return k_window, v_window

    def exchange(self, statistics: Statistics, partition: Partition, direct: bool) -> Statistics:
        buffers = self._statistics(statistics[0].shape, partition)
        if self.kernels is not None:
            self.kernels.pack(*statistics, buffers.packed)
        else:
            token, prob, score = statistics
            buffers.packed[0].copy_(token)
            buffers.packed[1].copy_(prob.view(torch.int32))
            buffers.packed[2].copy_(score.view(torch.int32))
        self._run(
            "all_gather of the statistics",
            lambda: _all_gather(
                buffers.gathered.flatten(),
                buffers.packed.flatten(),
                group=self.group,
                async_op=self.device.type == "cpu",
            ),
        )
        if self.kernels is not None:
            return self.unpacked(buffers.slots, statistics[0], partition)
        planes = buffers.gathered.permute(1, 2, 0, 3, 4).flatten(2, 3)
        token, prob, score = planes.index_select(2, buffers.index).unbind()
        return token.long(), prob.view(torch.float32), score.view(torch.float32)

    def unpacked(self, slots: torch.Tensor, like: torch.Tensor, partition: Partition) -> Statistics:
        batch, places, window = like.shape
        shape = (batch, partition.branches, window)
        token = like.new_empty(shape)
        prob, score = (like.new_empty(shape, dtype=torch.float32) for _ in range(2))
        self.kernels.unpack(slots, places, token, prob, score)
        return token, prob, score

    def _statistics(self, shape: torch.Size, partition: Partition) -> _Buffers:
        batch, places, window = shape
        key = (batch, partition.branches, window)
        if key not in self._buffers:
            owners = [partition.owner(slot) for slot in range(partition.branches)]
            gathered = torch.zeros(self.ranks, 3, *shape, dtype=torch.int32, device=self.device)
            size = 3 * batch * places * window
            self._buffers[key] = _Buffers(
                torch.zeros(3, *shape, dtype=torch.int32, device=self.device),
                gathered,
                torch.tensor([r * places + p for r, p in owners], device=self.device),
                torch.tensor(
                    [gathered.data_ptr() + 4 * (r * size + p * window) for r, p in owners],
                    device=self.device,
                ),
            )
        return self._buffers[key]

    def commit_(
        self,
        caches: Windows,
        windows: Windows,
        lengths: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        status: torch.Tensor | None,
        partition: Partition,
    ) -> None:
        winner, cache_len, commit_len = lengths
        layers, batch, places, window, heads, head_dim = windows[0].shape
        columns = window if self.columns is None else min(self.columns, window)
        shape = torch.Size((2, layers, batch, 1, columns, heads, head_dim))
        words = self._commit_words(shape, windows[0].dtype)
        own = words.view(windows[0].dtype)[: shape.numel()].view(shape)
        slots = partition.slots(self.rank)
        place = (winner - slots.start).long()
        mine = (place >= 0) & (place < len(slots))
        column = torch.arange(columns, device=self.device)
        # A branch that another rank owns, or a column that is not committed, contributes zero
        # bits: the sum of the words is then the winner's own words, whatever they mean as numbers.
        kept = (mine[:, None] & (column < commit_len[:, None]))[None, :, :, None, None]
        sequence = torch.arange(batch, device=self.device)
        place = place.clamp(0, places - 1)
        for part, source in zip(own, windows, strict=True):
            picked = source[:, sequence, place, :columns]
            part[:, :, 0].copy_(torch.where(kept, picked, torch.zeros_like(picked)))
        self._run(
            "all_reduce of the winner's keys and values",
            lambda: dist.all_reduce(words, group=self.group, async_op=self.device.type == "cpu"),
        )
        if batch not in self._zeros:
            self._zeros[batch] = torch.zeros(batch, dtype=torch.int32, device=self.device)
        k_own, v_own = own.unbind()
        kv_commit_(*caches, k_own, v_own, self._zeros[batch], cache_len, commit_len, status=status)

    def _commit_words(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The static buffer of a commit as int32, which every backend of a collective sums."""
        if (shape, dtype) not in self._words:
            count = -(-shape.numel() * dtype.itemsize // 4)
            self._words[shape, dtype] = torch.zeros(count, dtype=torch.int32, device=self.device)
        return self._words[shape, dtype]


class Symmetric(Collective):
    """Windows and statistics in symmetric memory, which kernels of the peers read over NVLink.

    Rounds whose statistics or windows are not of :meth:`windows` (prefill) take the collective.
    """

    name = "symmetric"

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        run: Run,
        columns: int | None,
        timeout: float,
    ) -> None:
        super().__init__(group, device, run, columns)
        self._timeout_ms = int(1000 * timeout)
        self._handle: Any = None
        self._memory: torch.Tensor | None = None
        self._bases: list[int] = []
        self._shape: tuple[int, ...] = ()
        self._window_bytes = 0
        self._tables: dict[tuple[int, int, int], torch.Tensor] = {}
        self._slots: Windows | None = None
        self._reading = False

    def windows(self, shape: tuple[int, ...], dtype: torch.dtype, partition: Partition) -> Windows:
        # PyTorch sets a multicast object up at every rendezvous unless told otherwise; no kernel
        # here uses one.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed._symmetric_memory as symmetric_memory

        size = torch.Size(shape).numel() * dtype.itemsize
        self._window_bytes = -(-size // 256) * 256
        _, batch, places, window, _, _ = shape
        total = 2 * self._window_bytes + 12 * batch * places * window
        self._memory = symmetric_memory.empty(total, dtype=torch.uint8, device=self.device)
        self._memory.zero_()
        self._handle = symmetric_memory.rendezvous(self._memory, self.group)
        self._bases = [
            self._handle.get_buffer(rank, (total,), torch.uint8).data_ptr()
            for rank in range(self.ranks)
        ]
        if self._bases[self.rank] != self._memory.data_ptr():
            raise RuntimeError("BranchParallel: symmetric memory: unexpected layout of the buffers")
        self._shape, self._tables, self._reading = shape, {}, False
        place_bytes = torch.Size(shape[3:]).numel() * dtype.itemsize
        self._slots = tuple(
            self._addresses(partition, offset, place_bytes) for offset in (0, self._window_bytes)
        )  # type: ignore[assignment]
        # No peer may write before every rank has zeroed its memory.
        self._barrier(0)
        k_window, v_window = (
            self._memory[offset : offset + size].view(dtype).view(shape)
            for offset in (0, self._window_bytes)
        )
        return k_window, v_window

    def _addresses(self, partition: Partition, offset: int, place_bytes: int) -> torch.Tensor:
        owners = [partition.owner(slot) for slot in range(partition.branches)]
        return torch.tensor(
            [self._bases[rank] + offset + place * place_bytes for rank, place in owners],
            device=self.device,
        )

    def _barrier(self, channel: int) -> None:
        def wait() -> None:
            self._handle.barrier(channel, self._timeout_ms)

        self._run("barrier of the symmetric memory", wait)

    def _holds(self, shape: torch.Size) -> bool:
        """Are statistics of this shape those of a round in the symmetric windows?"""
        return bool(self._shape) and (
            shape[0] == self._shape[1] and shape[1] == self._shape[2] and shape[2] <= self._shape[3]
        )

    def exchange(self, statistics: Statistics, partition: Partition, direct: bool) -> Statistics:
        shape = statistics[0].shape
        if not self._holds(shape) or self._memory is None:
            return super().exchange(statistics, partition, direct)
        if self._reading:
            raise RuntimeError(
                "BranchParallel.exchange: expected commit_ after the last exchange, or direct=True"
            )
        key = (shape[0], partition.branches, shape[2])
        start = 2 * self._window_bytes
        if key not in self._tables:
            self._tables[key] = self._addresses(partition, start, 4 * shape[2])
        packed = self._memory[start : start + 12 * shape.numel()].view(torch.int32)
        self.kernels.pack(*statistics, packed)
        # Behind this barrier lie the windows of this round too. Nobody overwrites either before
        # the barrier at the end of the round, here or in commit_.
        self._barrier(0)
        made = self.unpacked(self._tables[key], statistics[0], partition)
        if direct:
            self._barrier(1)
        self._reading = not direct
        return made

    def commit_(
        self,
        caches: Windows,
        windows: Windows,
        lengths: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        status: torch.Tensor | None,
        partition: Partition,
    ) -> None:
        if self._memory is None or self._slots is None or not self._is_own(windows):
            super().commit_(caches, windows, lengths, status, partition)
            return
        from lopa_kernels.ops.kv_cache.peer import peer_commit_

        peer_commit_(*caches, windows[0], *self._slots, *lengths, status)
        self._barrier(1)
        self._reading = False

    def _is_own(self, windows: Windows) -> bool:
        """Are these the symmetric windows, or their leading columns?"""
        assert self._memory is not None
        start = self._memory.data_ptr()
        return [w.data_ptr() for w in windows] == [start, start + self._window_bytes]
