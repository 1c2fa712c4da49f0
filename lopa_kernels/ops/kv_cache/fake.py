"""The operators of the kv_cache room mutate and return nothing, for compilers too."""

from __future__ import annotations

from typing import Any

import torch


def _nothing(*inputs: Any, **options: Any) -> None:
    return None


for _name in (
    "kv_prewrite_",
    "kv_prewrite_direct_",
    "qkv_prewrite_",
    "qkv_prewrite_direct_",
    "kv_commit_",
):
    torch.library.register_fake(f"lopa::{_name}", _nothing)
