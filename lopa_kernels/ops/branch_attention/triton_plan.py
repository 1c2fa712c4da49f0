"""How branch_attention is cut into Triton programs: sizes of tiles, and shares of the keys.

All of it follows from shapes, dtypes and the device, and nothing from values: a captured graph
replays with other lengths, and the same inputs give the same bits.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from lopa_kernels._triton import dependent, power_of_two

__all__ = ["Device", "Plan", "Tile", "device_of", "make_plan", "splits_of"]


class Tile(NamedTuple):
    """Rows and keys of a tile, and how a program works on it."""

    rows: int
    keys: int
    warps: int
    stages: int  # of the tiles of keys on their way from memory
    resident: int  # programs that a multiprocessor holds


# (bytes of an element, padded head dimension) -> tiles, from many rows to few: a call takes the
# first that gives every multiprocessor work. Smaller head dimensions are as the least. `_COMPACT`
# needs less than the 99 KB of shared memory of compute capability 8.6 and 8.9, `_ROOMY` less than
# the 163 KB of 8.0. Warps and keys are such that the loops over 16-bit keys spill next to nothing.
_COMPACT = {
    (2, 64): (Tile(128, 64, 8, 3, 1), Tile(64, 64, 4, 3, 2)),
    (2, 128): (Tile(128, 64, 8, 2, 1), Tile(64, 64, 4, 2, 1)),
    (2, 256): (Tile(64, 32, 8, 2, 1), Tile(32, 32, 4, 2, 1)),
    (4, 64): (Tile(64, 32, 8, 2, 1), Tile(32, 32, 4, 2, 2)),
    (4, 128): (Tile(32, 32, 4, 2, 1), Tile(16, 32, 4, 2, 1)),
    (4, 256): (Tile(16, 16, 4, 2, 1),),
}
_ROOMY = {
    **_COMPACT,
    (2, 64): (Tile(128, 64, 8, 3, 1), Tile(64, 64, 4, 3, 2)),
    (2, 128): (Tile(128, 64, 8, 3, 1), Tile(64, 64, 4, 3, 2)),
}
_ROOMY_BYTES = 160 * 1024
# Of devices of other vendors, which have 64 KB.
_SMALL = {
    size: tuple(tile._replace(rows=min(tile.rows, 64), warps=4, stages=1) for tile in tiles)
    for size, tiles in _COMPACT.items()
}
_LEAST_ROWS = 16
_LEAST_HEAD_DIM = 16

# What a share costs beside its tiles of keys, in the time that one of those takes a program that is
# alone on its multiprocessor: to start, to be merged with others at all, and its bytes written and
# read again by the merge. Of two programs that share a multiprocessor each is slower by `_BUSY`.
_START = 3
_MERGE = 8
_BYTES_OF_A_TILE = 1 << 20
_BUSY = 0.65
#: tiles of keys of a share, at least, however short the prefix is
MIN_SHARE = 4
MAX_SPLITS = 32
#: of a tile of the merge
MERGE_ELEMENTS = 2048


class Device(NamedTuple):
    multiprocessors: int
    tiles: dict[tuple[int, int], tuple[Tile, ...]]
    dependent: bool  # programmatic dependent launch


class Plan(NamedTuple):
    tile: Tile
    block_d: int
    tiles: int  # of the rows of a KV head
    splits: int


@functools.cache
def device_of(device: torch.device) -> Device:
    if device.type == "cpu":
        return Device(4, _COMPACT, False)
    if device.type != "cuda":
        properties = torch.get_device_module(device).get_device_properties(device)
        return Device(getattr(properties, "max_compute_units", 64), _SMALL, False)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    roomy = _ROOMY if shared >= _ROOMY_BYTES else _COMPACT
    tiles = _SMALL if torch.version.hip is not None else roomy
    return Device(properties.multi_processor_count, tiles, dependent(device))


def splits_of(
    programs: int, multiprocessors: int, resident: int, key_tiles: int, split_bytes: int
) -> int:
    """Shares of the keys that take the least time.

    Args:
        programs: of a share.
        key_tiles: of all shares.
        split_bytes: that a share leaves for the merge.
    """
    best, least = 1, math.inf
    for splits in range(1, MAX_SPLITS + 1):
        share = -(-key_tiles // splits)
        if splits > 1 and share < MIN_SHARE:
            break
        busiest = -(-programs * splits // multiprocessors)
        time = (share + _START) * max(busiest * _BUSY, -(-busiest // resident))
        if splits > 1:
            time += _MERGE + 2 * splits * split_bytes / _BYTES_OF_A_TILE
        if time < least:
            best, least = splits, time
    return best


@functools.lru_cache(maxsize=4096)
def make_plan(
    device: torch.device,
    element_size: int,
    heads: int,
    rows: int,
    head_dim: int,
    capacity: int,
    window: int,
    group: int,
    branches: int,
) -> Plan:
    """For `heads` KV heads of all sequences with `rows` rows each."""
    about = device_of(device)
    block_d = max(power_of_two(head_dim), _LEAST_HEAD_DIM)
    choices = about.tiles[element_size, max(block_d, 64)]
    for tile in choices:
        if -(-rows // tile.rows) * heads >= about.multiprocessors:
            break
    if rows < tile.rows:
        size = max(power_of_two(rows), _LEAST_ROWS)
        tile = tile._replace(rows=size, warps=min(tile.warps, 4))
    tiles = -(-rows // tile.rows)
    # A tile of rows spans so many branches at most, of whose columns it visits all.
    spanned = min(-(-tile.rows // (window * group)) + 1, branches)
    key_tiles = -(-capacity // tile.keys) + -(-spanned * window // tile.keys)
    splits = splits_of(
        tiles * heads, about.multiprocessors, tile.resident, key_tiles, heads * rows * head_dim * 4
    )
    return Plan(tile, block_d, tiles, splits)
