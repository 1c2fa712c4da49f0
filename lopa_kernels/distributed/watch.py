"""Ranks that agree at the start, and notice within a bounded time when one of them is gone.

Both go through the key-value store of torch.distributed, never through a collective, which hangs
when a rank is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_CLOSED = b"closed"
_FAULT = "fault"


class BranchParallelError(RuntimeError):
    """A rank is gone, or the ranks do not agree; the message names them."""


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def differences(said: list[Mapping[str, object]]) -> list[str]:
    """One line for each field in which the ranks differ, with every value and who has it."""
    lines = []
    for name in dict.fromkeys(name for fields in said for name in fields):
        holders: dict[str, list[int]] = {}
        for rank, fields in enumerate(said):
            value = json.dumps(fields[name]) if name in fields else "nothing"
            holders.setdefault(value, []).append(rank)
        if len(holders) > 1:
            parts = [f"{_ranks(ranks)}: {value}" for value, ranks in holders.items()]
            lines.append(f"{name}: {'; '.join(parts)}")
    return lines


class Watch:
    """Heartbeats of the ranks of one group.

    Args:
        store: the group's store; each rank passes one with the same prefix.
        rank, ranks: of the group.
        timeout: seconds without a heartbeat after which a rank counts as gone.
        on_fault: called once by the watching thread with the message.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        ranks: int,
        timeout: float,
        on_fault: Callable[[str], None] | None = None,
    ) -> None:
        # Calls of one store wait for each other: a rank that waits must not stop its heart.
        self._store = store.clone()  # type: ignore[attr-defined]
        self._beats = store.clone()  # type: ignore[attr-defined]
        self.rank, self.ranks, self.timeout = rank, ranks, timeout
        self._on_fault = on_fault
        self._fault: str | None = None
        self._found = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lopa-watch", daemon=True)

    def agree(self, topic: str, fields: Mapping[str, object]) -> list[Mapping[str, object]]:
        """What each rank says about `topic`.

        Raises:
            BranchParallelError: a rank says nothing within `timeout`.
        """
        self._store.set(f"{topic}/{self.rank}", json.dumps(dict(fields), default=str))
        deadline = time.monotonic() + self.timeout
        keys = [f"{topic}/{rank}" for rank in range(self.ranks)]
        while True:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            if not missing:
                return [json.loads(self._store.get(key)) for key in keys]
            self.check()
            if time.monotonic() > deadline:
                raise BranchParallelError(
                    f"{topic}: {_ranks(missing)} of {self.ranks} did not come within "
                    f"{self.timeout:.1f} s"
                )
            time.sleep(min(0.01, self.timeout / 50))

    def start(self) -> None:
        self._thread.start()

    @property
    def fault(self) -> str | None:
        """What is wrong, once it is known."""
        return self._fault

    def check(self) -> None:
        """Raises BranchParallelError once a rank is known to be gone."""
        if self._fault is not None:
            raise BranchParallelError(self._fault)

    def explain(self, error: BaseException) -> BranchParallelError:
        """The fault behind an error of a collective: waits until it is known, `timeout` at most
        beyond what a silent rank is given."""
        self._found.wait(1.5 * self.timeout + 1.0)
        if self._fault is not None:
            return BranchParallelError(self._fault)
        return BranchParallelError(
            f"a collective of rank {self.rank} of {self.ranks} failed, and all ranks are alive: "
            f"{error}"
        )

    def declare(self, fault: str) -> None:
        """Tells the other ranks of a fault; the first one told is what all report."""
        with contextlib.suppress(RuntimeError):
            first = self._store.compare_set(_FAULT, "", fault)
            fault = first.decode() or fault
        self._set(fault)

    def close(self) -> None:
        """The end of this rank is no fault."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(self.timeout)
        # The store may have gone with the process that hosts it.
        with contextlib.suppress(RuntimeError):
            self._store.set(f"beat/{self.rank}", _CLOSED)

    def _set(self, fault: str) -> None:
        if self._fault is None:
            self._fault = fault
            self._found.set()
            if self._on_fault is not None:
                self._on_fault(fault)

    def _run(self) -> None:
        interval = min(self.timeout / 10, 1.0)
        now = time.monotonic()
        seen = dict.fromkeys((r for r in range(self.ranks) if r != self.rank), (b"", now))
        answered = now
        count = 0
        while not self._stop.wait(interval):
            try:
                self._beats.set(f"beat/{self.rank}", str(count))
                count += 1
                said = self._look(list(seen))
                if self._beats.check([_FAULT]):
                    self._set(self._beats.get(_FAULT).decode())
                    return
            except RuntimeError:
                if time.monotonic() - answered > self.timeout:
                    self._set(self._lost_store())
                    return
                continue
            now = answered = time.monotonic()
            for rank, beat in said.items():
                if beat == _CLOSED:
                    seen.pop(rank)
                elif beat != seen[rank][0]:
                    seen[rank] = (beat, now)
            # Who fell silent first is the cause; the others may have ended because of it.
            silent = min(seen, key=lambda r: seen[r][1], default=None)
            if silent is not None and now - seen[silent][1] > self.timeout:
                self.declare(
                    f"rank {silent} of {self.ranks} is gone (no heartbeat for {self.timeout:.1f} s)"
                )
                return

    def _look(self, ranks: list[int]) -> dict[int, bytes]:
        return {
            rank: self._beats.get(key)
            for rank in ranks
            if self._beats.check([key := f"beat/{rank}"])
        }

    def _lost_store(self) -> str:
        host = (
            "the store of the process group"
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            else "global rank 0, whose process hosts the store,"
        )
        return f"{host} is gone (no answer to rank {self.rank} for {self.timeout:.1f} s)"


def end_process(message: str) -> None:
    """Ends the process at once: its main thread waits for a device that waits for a lost rank."""
    print(f"lopa_kernels.distributed: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def store_of(group: dist.ProcessGroup, name: str, timeout: float) -> dist.Store:
    """The default store under a prefix of `group` and `name`, its calls bounded by `timeout`."""
    prefix = f"lopa_kernels/{group.group_name}/{name}"
    # A clone, for the time-out of the default store is not ours to change.
    default: Any = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore(prefix, default.clone())
    store.set_timeout(timedelta(seconds=timeout))
    return store
