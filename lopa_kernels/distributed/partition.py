"""Which rank runs which branch slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lopa_kernels.state import LopaState


@dataclass(frozen=True)
class Partition:
    """K branch slots in contiguous, nearly even runs over the ranks, the first ranks one more.

    Every rank has the same number of places, so that shapes agree: a place beyond a rank's own
    slots mirrors the anchor, and so do all places of the ranks that own none (K below the ranks).
    """

    branches: int
    ranks: int

    @property
    def places(self) -> int:
        """Places of a rank: ceil(K / ranks)."""
        return -(-self.branches // self.ranks)

    def slots(self, rank: int) -> range:
        """The slots that `rank` owns; empty where there are fewer slots than ranks."""
        share, more = divmod(self.branches, self.ranks)
        start = rank * share + min(rank, more)
        return range(start, start + share + (rank < more))

    def owner(self, slot: int) -> tuple[int, int]:
        """(rank, place) of a slot."""
        for rank in range(self.ranks):
            own = self.slots(rank)
            if slot in own:
                return rank, slot - own.start
        raise IndexError(f"Partition: slot: expected 0 to {self.branches - 1}, got {slot}")

    def sources(self, rank: int) -> list[int]:
        """The slot that each place of `rank` runs: its own, then the anchor."""
        own = list(self.slots(rank))
        return own + [0] * (self.places - len(own))


def local_state(state: LopaState, own: range, source: torch.Tensor) -> LopaState:
    """The places of one rank as a state of its own; see :meth:`BranchParallel.local`.

    `source` is int64 [places], the slot of each place (see :meth:`Partition.sources`).
    """
    # Slots from `branches` on are dead, and their contents anything: the anchor stands in.
    slot = torch.where(source < state.branches[:, None], source, 0)  # [B, places]
    live = (state.branches - own.start).clamp(0, len(own))
    tokens = state.tokens.gather(1, slot[:, :, None].expand(-1, -1, state.tokens.shape[2]))
    return state._replace(
        tokens=tokens,
        length=state.length.gather(1, slot),
        creation=state.creation.gather(1, slot),
        eos=state.eos.gather(1, slot),
        branches=live.clamp(min=1),
        done=state.done | (live == 0),
    )
