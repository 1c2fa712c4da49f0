"""Shared fixtures: poisoned memory, threads; markers and options of the GPU runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

# PyTorch's deterministic mode, below, asks it of cuBLAS, which reads it once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from ascend import ascend as ascend  # the fixture
from hypothesis import HealthCheck, settings

from lopa_kernels import _dispatch

# Building a batch of ragged states takes a while on a loaded machine, which says nothing of it.
settings.register_profile("lopa", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lopa")


def _patch_triton_once() -> None:
    """Triton's interpreter patches its language in every call of a device function.

    That takes three quarters of its time, and changes nothing: the kernel's own launch has patched
    the language before, and undoes it after.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None:
        return

    def patch_once(fn: Any) -> Any:
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.arange) for language in languages):
            return patch(fn)
        return scope()

    interpreter._patch_lang = patch_once


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-poison",
        action="store_true",
        help="leave uninitialised memory as it is, for a tool that watches it (scripts/sanitize)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if _dispatch.interpreted() and _dispatch.why_absent("triton") is None:
        _patch_triton_once()
    config.addinivalue_line(
        "markers", "triton: runs Triton kernels, in Triton's interpreter where TRITON_INTERPRET=1"
    )
    config.addinivalue_line(
        "markers", "big: gigabytes, compilers or profiles, which scripts/sanitize leaves out"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "triton" in item.name:
            item.add_marker("triton")


def _poison(on: bool) -> None:
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = on


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Memory that PyTorch leaves uninitialised holds NaN or the largest integer.

    An output element that a kernel forgets to write then differs from every expectation. The
    switch reaches ``torch.empty`` and its relatives, on a GPU the outputs of the C++ kernels too;
    on the CPU those are poisoned by the tests that hand them buffers.
    """
    previous = torch.utils.deterministic.fill_uninitialized_memory
    _poison(not request.config.getoption("--no-poison", default=False))
    yield
    _poison(False)
    torch.utils.deterministic.fill_uninitialized_memory = previous


@pytest.fixture
def plain_memory(poisoned_memory: None) -> None:
    """No poison: it is a kernel for each allocation, which the test would count."""
    _poison(False)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Gives the test the right to call ``torch.set_num_threads``."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
