"""The status word of a sequence: what went wrong in a round, as bits."""

from __future__ import annotations

from enum import IntFlag


class Status(IntFlag):
    """Bits of ``LopaStep.status`` and of the `status` tensors of the cache operators."""

    OK = 0
    NONFINITE = 1
    """NaN or no finite logit in a needed row; such a row counts as (token 0, prob 0, -inf)."""
    WINDOW_FULL = 2
    """The next window is too small for what is left; the sequence ends, its window cut."""
    BAD_STATE = 4
    """A field of the state is out of range; the sequence ends as it is."""
    MISSING_ROW = 8
    """A needed column has no row of logits; it counts as a row without a finite logit."""
    CACHE_FULL = 16
    """A write past the capacity of the cache, dropped."""
    STALLED = 32
    """Every open column predicts mask_id, so that nothing can be filled; the sequence ends."""
