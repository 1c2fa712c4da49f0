"""The Triton kernels of branch parallelism, on tables of addresses within one device.

What they read over NVLink is here the memory of the same device, or of the CPU in the interpreter.
"""

from __future__ import annotations

import pytest
import torch
from targets import KERNELS, Target, over

import lopa_kernels as lk
from lopa_kernels.distributed import Partition
from lopa_kernels.distributed.partition import local_state

TRITON = [target for target in KERNELS if target.backend == "triton"]

#: (K, ranks)
DIVISIONS = [(1, 1), (4, 2), (5, 2), (5, 8), (8, 3)]


def addresses(partition: Partition, parts: list[torch.Tensor], device: str) -> torch.Tensor:
    """int64 [K]: where each slot is, `parts[rank][place]` being the first element of a place."""
    owners = [partition.owner(slot) for slot in range(partition.branches)]
    return torch.tensor([parts[r][p].data_ptr() for r, p in owners], device=device)


def shares(full: torch.Tensor, dim: int, partition: Partition, spare: float) -> list[torch.Tensor]:
    """What each rank holds of the slots along `dim`; places without a slot hold `spare`."""
    made = []
    for rank in range(partition.ranks):
        own = partition.slots(rank)
        shape = list(full.shape)
        shape[dim] = partition.places
        part = full.new_full(shape, spare)
        part.narrow(dim, 0, len(own)).copy_(full.narrow(dim, own.start, len(own)))
        made.append(part)
    return made


@over(TRITON)
@pytest.mark.parametrize(("branches", "ranks"), DIVISIONS)
@pytest.mark.parametrize("window", [1, 64, 300])
def test_statistics_arrive(branches: int, ranks: int, window: int, target: Target) -> None:
    from lopa_kernels.distributed import triton

    partition, batch = Partition(branches, ranks), 2
    shape = (batch, branches, window)
    token = target.to(torch.randint(0, 2**31, shape))
    bits = torch.randint(-(2**31), 2**31, (2, *shape)).int()
    bits[0, 0, 0, 0], bits[1, 0, 0, 0] = -(2**31), 0x7FC01234  # -0, and a NaN with a payload
    prob, score = target.to(bits).view(torch.float32).unbind()
    packed = []
    for own in zip(*(shares(t, 1, partition, 0) for t in (token, prob, score)), strict=True):
        packed.append(
            torch.full((3, batch, partition.places, window), -1, dtype=torch.int32).to(token.device)
        )
        triton.pack(*own, packed[-1])
    slots = addresses(partition, [p[0, 0] for p in packed], target.device)
    got = (torch.full_like(token, -1), torch.full_like(prob, -1), torch.full_like(prob, -1))
    triton.unpack(slots, partition.places, *got)
    assert got[0].equal(token)
    assert got[1].view(torch.int32).equal(prob.view(torch.int32))
    assert got[2].view(torch.int32).equal(score.view(torch.int32))


@over(TRITON)
@pytest.mark.parametrize(("branches", "ranks"), DIVISIONS)
@pytest.mark.parametrize("window", [1, 70, 300])
def test_local_state(branches: int, ranks: int, window: int, target: Target) -> None:
    from lopa_kernels.distributed import triton

    batch = 5
    config = lk.LopaConfig(mask_id=9, max_new_tokens=8, block_size=4)
    state = lk.initial_state(torch.zeros(batch, 1, dtype=torch.int64), config)
    state = target.to(
        state._replace(
            tokens=torch.randint(0, 9, (batch, window, branches)).transpose(1, 2),
            length=torch.randint(1, window + 1, (batch, branches), dtype=torch.int32),
            creation=torch.rand(batch, branches),
            eos=torch.rand(batch, branches) < 0.5,
            branches=torch.randint(1, branches + 1, (batch,), dtype=torch.int32),
            done=torch.tensor([False, True, False, False, True]),
        )
    )
    partition = Partition(branches, ranks)
    for rank in range(ranks):
        source = torch.tensor(partition.sources(rank), device=target.device)
        own = partition.slots(rank)
        expected = local_state(state, own, source)
        for name, got in triton.local_state(state, own, source)._asdict().items():
            want = getattr(expected, name)
            assert got.dtype == want.dtype
            assert got.equal(want), name


def commit_case(
    dtype: torch.dtype, branches: int, heads: int, head_dim: int, transposed: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    layers, batch, window, capacity = 2, 3, 6, 17
    word = torch.int16 if dtype.itemsize == 2 else torch.int32
    size = 2 ** (8 * dtype.itemsize - 1)
    raw = torch.randint(-size, size, (2, layers, batch, branches, window, heads, head_dim))
    windows = [part.to(word).view(dtype) for part in raw]
    if transposed:
        caches = [
            torch.full((layers, batch, heads, capacity, head_dim), 3.0, dtype=dtype).transpose(2, 3)
            for _ in range(2)
        ]
    else:
        caches = [
            torch.full((layers, batch, capacity, heads, head_dim), 3.0, dtype=dtype)
            for _ in range(2)
        ]
    winner = torch.randint(0, branches, (batch,))
    lengths = [winner, torch.tensor([0, 5, 11]), torch.tensor([6, 0, 5])]
    return caches, windows, [length.int() for length in lengths]


def commit(
    target: Target,
    partition: Partition,
    caches: list[torch.Tensor],
    windows: list[torch.Tensor],
    lengths: list[torch.Tensor],
    columns: int | None = None,
) -> torch.Tensor:
    """Both commits into copies of the caches; they and the status words must agree."""
    from lopa_kernels.ops.kv_cache.peer import peer_commit_

    expected, status = [cache.clone() for cache in caches], torch.zeros(3, dtype=torch.int32)
    cut = [window[:, :, :, :columns] for window in windows]
    lk.kv_commit_(*expected, *cut, *lengths, status=status, backend="reference")
    got, own, lengths = target.to(([cache.clone() for cache in caches], windows, lengths))
    got_status = torch.zeros(3, dtype=torch.int32, device=target.device)
    parts = [shares(window, 2, partition, torch.nan) for window in own]
    tables = [addresses(partition, [part[0, 0] for part in side], target.device) for side in parts]
    peer_commit_(*got, parts[0][0][:, :, :, :columns], *tables, *lengths, got_status)
    word = torch.int16 if got[0].element_size() == 2 else torch.int32
    for one, other in zip(got, expected, strict=True):
        assert one.cpu().view(word).equal(other.view(word))
    assert got_status.cpu().equal(status)
    return status


@over(TRITON)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("branches", "ranks"), DIVISIONS)
@pytest.mark.parametrize(
    ("heads", "head_dim", "transposed"),
    [(2, 16, False), (2, 16, True), (3, 7, False), (1, 2, True)],
)
def test_commit_reads_the_owner(
    dtype: torch.dtype,
    branches: int,
    ranks: int,
    heads: int,
    head_dim: int,
    transposed: bool,
    target: Target,
) -> None:
    case = commit_case(dtype, branches, heads, head_dim, transposed)
    assert not commit(target, Partition(branches, ranks), *case).any()


@over(TRITON)
def test_commit_of_leading_columns(target: Target) -> None:
    caches, windows, lengths = commit_case(torch.bfloat16, 5, 2, 16, False)
    lengths[2].clamp_(max=4)
    assert not commit(target, Partition(5, 2), caches, windows, lengths, columns=4).any()


@over(TRITON)
@pytest.mark.parametrize(
    ("which", "value", "bit"),
    [
        (0, -1, lk.Status.BAD_STATE),
        (0, 5, lk.Status.BAD_STATE),
        (1, -1, lk.Status.BAD_STATE),
        (1, 12, lk.Status.CACHE_FULL),
        (2, -1, lk.Status.BAD_STATE),
        (2, 7, lk.Status.BAD_STATE),
        (2, 2**31 - 1, lk.Status.BAD_STATE),
    ],
)
def test_faults_drop_the_sequence(which: int, value: int, bit: int, target: Target) -> None:
    caches, windows, lengths = commit_case(torch.bfloat16, 5, 2, 16, False)
    lengths[which][0] = value
    if which == 1 and value > 0:
        lengths[2][0] = 6
    assert commit(target, Partition(5, 2), caches, windows, lengths).tolist() == [bit, 0, 0]


@over(TRITON)
def test_bad_arguments_raise(target: Target) -> None:
    from lopa_kernels.ops.kv_cache.peer import peer_commit_

    caches, windows, lengths = target.to(commit_case(torch.float32, 2, 1, 4, False))
    table = torch.zeros(2, dtype=torch.int64, device=target.device)
    good = (*caches, windows[0], table, table, *lengths)
    for index, wrong, message in (
        (1, caches[1][:, :, 1:], r"v_cache: expected shape \[2, 3, 17, 1, 4\]"),
        (0, caches[0].half(), "k_cache: expected dtype Float, got Half"),
        (3, table.int(), "k_slots: expected dtype Long, got Int"),
        (5, lengths[0].long(), "winner: expected dtype Int, got Long"),
        (7, lengths[2][:2], r"commit_len: expected shape \[3\], got shape \[2\]"),
    ):
        arguments = list(good)
        arguments[index] = wrong
        with pytest.raises(RuntimeError, match=f"peer_commit_: {message}"):
            peer_commit_(*arguments)
