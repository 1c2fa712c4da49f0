"""One thing to measure: what the benchmark program and every room's file agree on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A shape of an operator and everybody who can compute it.

    Attributes:
        op: the operator.
        name: the shape and options, short enough for a table.
        make: n -> n argument tuples; calls rotate over them, so that inputs do not stay in cache.
        providers: name -> callable of one argument tuple's elements.
        reference: the provider that the others' results are checked against; None: `oracle`.
        check: (result, reference's result) -> None; raises AssertionError where they differ.
        bytes: memory that one call must read and write at least.
        flops: arithmetic of one call.
        unchecked: providers whose results are not comparable, such as a read of the same memory.
        buffers: argument tuples to rotate over; None: as many as exceed the caches.
        device: "cpu" or "cuda", where `make` puts its tensors.
        oracle: computes what all results are checked against, where no provider is the reference.
        checks: provider -> its own check, where it keeps to another contract than ours.
        optional: peers that are a compiler's or another library's work. Where such a one raises
            or errs it alone has no speed, and the verdict says so; the operator keeps its own.
        eager: providers that a CUDA graph cannot hold, since they read results on the host.
        host: what is measured is the host's time for a call, not the device's.
    """

    op: str
    name: str
    make: Callable[[int], list[tuple[Any, ...]]]
    providers: dict[str, Callable[..., Any]]
    reference: str | None
    check: Callable[[Any, Any], None]
    bytes: int
    flops: int
    unchecked: tuple[str, ...] = ()
    buffers: int | None = None
    device: str = "cpu"
    oracle: Callable[..., Any] | None = None
    checks: dict[str, Callable[[Any, Any], None]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    eager: tuple[str, ...] = ()
    host: bool = False
