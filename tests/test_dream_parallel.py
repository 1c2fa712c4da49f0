"""Rounds of the small Dream and LLaDA with their branches on several ranks (gloo)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_distributed import run_ranks, values
from test_dream_model import both
from test_dream_round import PROMPTS, settings, small

from examples.dream.round import Runner
from lopa_kernels.distributed import BranchParallel

RANKS = 3
#: ranks of a group, mask, single phase
LAYOUTS = ((1, "full", False), (2, "full", False), (3, "full", False), (3, "block_causal", True))


def decoded_by_ranks(rank: int) -> dict[Any, Any]:
    groups = {n: dist.new_group(list(range(n))) for n in range(1, RANKS + 1)}
    results = {}
    for family in ("dream", "llada"):
        model = small(family)
        config = settings(model.config)
        for ranks, mask, single_phase in LAYOUTS:
            if rank >= ranks:
                continue
            with BranchParallel(config, groups[ranks], timeout=60.0, model=family) as parallel:
                runner = Runner(
                    model, config, batch=2, capacity=48, mask=mask, single_phase=single_phase,
                    parallel=parallel,
                )  # fmt: skip
                decoded = runner.decode(PROMPTS)
                cache = [runner.cache.k.tolist(), runner.cache.v.tolist()]
                results[family, ranks, mask] = (
                    decoded.tokens.tolist(), decoded.rounds.tolist(), cache,
                )  # fmt: skip
    return results


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder: Path = tmp_path_factory.mktemp("dream")
    return values(run_ranks(decoded_by_ranks, RANKS, folder))


@both
@pytest.mark.parametrize(("ranks", "mask", "single_phase"), LAYOUTS)
def test_tokens_and_caches_do_not_depend_on_the_ranks(
    by_ranks: list[dict[Any, Any]], family: str, ranks: int, mask: str, single_phase: bool
) -> None:
    model = small(family)
    runner = Runner(
        model, settings(model.config), batch=2, capacity=48, mask=mask, single_phase=single_phase
    )
    alone = runner.decode(PROMPTS)
    assert int(alone.rounds.max()) >= 5
    for rank in range(ranks):
        tokens, rounds, cache = by_ranks[rank][family, ranks, mask]
        assert tokens == alone.tokens.tolist(), f"rank {rank}"
        assert rounds == alone.rounds.tolist()
        assert cache == by_ranks[0][family, ranks, mask][2]
    k, v = (torch.tensor(x) for x in by_ranks[0][family, ranks, mask][2])
    torch.testing.assert_close(k, runner.cache.k, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(v, runner.cache.v, rtol=1e-4, atol=1e-5)


def decoded_on_gpus(transport: Any, rank: int) -> dict[str, Any]:
    torch.cuda.set_device(rank)
    results = {}
    for family in ("dream", "llada"):
        model = small(family, f"cuda:{rank}")
        config = settings(model.config)
        with BranchParallel(config, transport=transport, timeout=60.0, model=family) as parallel:
            assert parallel.transport == transport
            runner = Runner(model, config, batch=2, capacity=48, parallel=parallel)
            runner.prepare()
            # The second decode replays graphs alone.
            first, again = runner.decode(PROMPTS), runner.decode(PROMPTS)
            assert first.tokens.equal(again.tokens)
            cache = [runner.cache.k.cpu().tolist(), runner.cache.v.cpu().tolist()]
            results[family] = (again.tokens.tolist(), again.rounds.tolist(), cache)
    return results


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("transport", ["collective", "symmetric"])
def test_graphs_on_two_gpus(transport: str, tmp_path: Path) -> None:
    outcomes = values(run_ranks(partial(decoded_on_gpus, transport), 2, tmp_path, backend="nccl"))
    for family in ("dream", "llada"):
        model = small(family)
        alone = Runner(model, settings(model.config), batch=2, capacity=48).decode(PROMPTS)
        for outcome in outcomes:
            tokens, rounds, cache = outcome[family]
            assert tokens == alone.tokens.tolist()
            assert rounds == alone.rounds.tolist()
            assert cache == outcomes[0][family][2]


def other_settings(rank: int) -> list[str]:
    model = small("dream")
    config = settings(model.config)
    messages = []
    with BranchParallel(config, timeout=30.0) as parallel:
        for changed, options in (
            ({"branches": 2}, {}),
            ({"temperature": 1.0}, {}),
            ({}, {"compile": True}),
        ):
            other = settings(model.config, **changed)
            if "temperature" in changed:
                parallel.config = other
            try:
                Runner(model, other, capacity=48, parallel=parallel, **options)
            except ValueError as error:
                messages.append(str(error))
            parallel.config = config
    return messages


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    (messages,) = values(run_ranks(other_settings, 1, tmp_path))
    assert messages == [
        "Runner: parallel: expected one of the same config",
        "Runner: parallel: expected temperature 0 and no compile",
        "Runner: parallel: expected temperature 0 and no compile",
    ]
