"""Process groups of tensor parallelism times branch parallelism."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class Groups(NamedTuple):
    """The groups of this process."""

    tp: dist.ProcessGroup
    """The ranks that share a branch's matrices; neighbours, for their traffic is the larger."""
    bp: dist.ProcessGroup
    """The ranks that hold the same shard and share the branches."""
    mesh: DeviceMesh
    """[bp, tp], dimensions of these names."""


def make_groups(tp: int, bp: int, device_type: str | None = None) -> Groups:
    """Divides all processes into groups of `tp` and of `bp`; every process calls it.

    Rank r has tensor-parallel rank ``r % tp`` and branch-parallel rank ``r // tp``.

    Args:
        tp, bp: sizes; their product is the number of processes.
        device_type: of the mesh; None: "cuda" with a GPU, otherwise "cpu".

    Raises:
        ValueError: a size below 1, or a product other than the number of processes.
    """
    for name, size in (("tp", tp), ("bp", bp)):
        if size < 1:
            raise ValueError(f"make_groups: {name}: expected 1 or more, got {size}")
    if tp * bp != dist.get_world_size():
        raise ValueError(
            f"make_groups: tp * bp: expected {dist.get_world_size()}, the number of processes, "
            f"got {tp} * {bp}"
        )
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device_type, (bp, tp), mesh_dim_names=("bp", "tp"))
    return Groups(mesh.get_group("tp"), mesh.get_group("bp"), mesh)
