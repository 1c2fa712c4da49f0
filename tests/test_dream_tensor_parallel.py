"""Rounds of the small Dream and LLaDA with their matrices, and their branches, on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_distributed import run_ranks, values
from test_dream_model import both
from test_dream_round import PROMPTS, settings, small

from examples.dream.config import dream_7b, llada_8b
from examples.dream.round import Runner
from examples.dream.tensor_parallel import ShardedLM, share_of
from lopa_kernels.distributed import BranchParallel, make_groups

RANKS = 4
#: TP, BP, mask, single phase
LAYOUTS = ((2, 2, "full", False), (2, 2, "block_causal", True))


def decoded_by_ranks(rank: int) -> dict[Any, Any]:
    groups = make_groups(2, 2, "cpu")
    results = {}
    for family in ("dream", "llada"):
        model = ShardedLM(small(family), groups.tp)
        config = settings(model.config)
        for tp, bp, mask, single_phase in LAYOUTS:
            with BranchParallel(
                config, groups.bp, timeout=60.0, model=family, watch=dist.group.WORLD
            ) as parallel:
                runner = Runner(
                    model, config, batch=2, capacity=48, mask=mask, single_phase=single_phase,
                    parallel=parallel,
                )  # fmt: skip
                results[family, tp, bp, mask] = outcome(runner)
        # Without branch parallelism, each pair of ranks on its own.
        results[family, 2, 1, "full"] = outcome(Runner(model, config, batch=2, capacity=48))
        with pytest.raises(ValueError, match="Runner: compile: expected a model that is not shard"):
            Runner(model, config, batch=2, capacity=48, compile=True)
    return results


def outcome(runner: Runner) -> list[Any]:
    decoded = runner.decode(PROMPTS)
    cache = [runner.cache.k.tolist(), runner.cache.v.tolist()]
    return [decoded.tokens.tolist(), decoded.rounds.tolist(), cache]


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder: Path = tmp_path_factory.mktemp("sharded")
    return values(run_ranks(decoded_by_ranks, RANKS, folder))


@both
@pytest.mark.parametrize(("tp", "bp", "mask", "single_phase"), [*LAYOUTS, (2, 1, "full", False)])
def test_tokens_and_caches_are_those_of_one_device(
    by_ranks: list[dict[Any, Any]], family: str, tp: int, bp: int, mask: str, single_phase: bool
) -> None:
    model = small(family)
    runner = Runner(
        model, settings(model.config), batch=2, capacity=48, mask=mask, single_phase=single_phase
    )
    tokens, rounds, (k, v) = outcome(runner)
    assert max(rounds) >= 5
    results = [ranks[family, tp, bp, mask] for ranks in by_ranks]
    for rank, result in enumerate(results):
        assert result[0] == tokens, f"rank {rank}"
        assert result[1] == rounds
        # Ranks of the same share hold the same bits.
        assert result[2] == results[rank % tp][2]
    for whole, parts in ((k, 0), (v, 1)):
        shares = [torch.tensor(result[2][parts]) for result in results[:tp]]
        torch.testing.assert_close(torch.cat(shares, 3), torch.tensor(whole), rtol=1e-4, atol=1e-5)


def test_shapes_that_do_not_divide_are_refused() -> None:
    assert share_of(dream_7b(), 4).kv_heads == 1
    assert share_of(llada_8b(), 8).qkv_dim == 3 * 4 * 128
    with pytest.raises(ValueError, match="heads: expected a multiple of 8 ranks, got 28"):
        share_of(dream_7b(), 8)
