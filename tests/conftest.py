"""Shared fixtures: poisoned memory, threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Building a batch of ragged states takes a while on a loaded machine, which says nothing of it.
settings.register_profile("lopa", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lopa")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that PyTorch leaves uninitialised holds NaN or the largest integer.

    An output element that a kernel forgets to write then differs from every expectation. The
    switch reaches ``torch.empty`` and its relatives; the C++ kernels' own outputs are poisoned by
    the tests that hand them buffers.
    """
    torch.use_deterministic_algorithms(True)
    previous = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = previous
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Gives the test the right to call ``torch.set_num_threads``."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
