"""The settings of a round as one text, for the operators that plain calls take.

A round has 21 settings, which take PyTorch longer than its 30 tensors.
"""

from __future__ import annotations

import re

from lopa_kernels.config import LopaConfig


def schema(several: str) -> str:
    """A schema of ``torch.ops.lopa`` with the text in the place of the settings."""
    text, found = re.subn(
        r"int out_branches, .*?bool force_anchor(, str metric, .*?float\? top_p)?",
        "str settings",
        several,
    )
    assert found == 1, several
    return text


def _word(value: object) -> str:
    # By the plain types' own conversions: a subclass may print itself in another way.
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__repr__(value)
    return str.__str__(value) if isinstance(value, str) else str(value)


#: id of a configuration -> itself, which keeps the id its own, and its text
_texts: dict[int, tuple[LopaConfig, str]] = {}
_MOST_TEXTS = 256


def settings(config: LopaConfig) -> str:
    """The settings of a round as one text, made once for a configuration."""
    known = _texts.get(id(config))
    if known is not None:
        return known[1]
    # K and W of the next state are None here where they stay as they come in.
    _, _, *rest = config.step_args(0, 0)
    words = (config.branches, config.window, *rest, *config.sampling_args())
    text = " ".join(map(_word, words))
    if len(_texts) >= _MOST_TEXTS:
        _texts.clear()
    _texts[id(config)] = config, text
    return text
