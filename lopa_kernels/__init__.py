"""Operators for LoPA, lookahead parallel decoding of diffusion language models.

Every operator is also ``torch.ops.lopa.<name>``, for compilers. docs/operators.md has the contract.
"""

from typing import TYPE_CHECKING

from lopa_kernels import _dispatch, _load

# Without the library the package still imports, so that `python -m lopa_kernels` can say why.
if TYPE_CHECKING or "lopa_cpu" not in _load.missing:
    from lopa_kernels._dispatch import get_backend, set_backend, use_backend
    from lopa_kernels.config import LopaConfig
    from lopa_kernels.ops.branch import (
        Selection,
        Spawned,
        branch_confidence,
        select_positions,
        spawn_branches,
    )
    from lopa_kernels.ops.branch_attention import branch_attention
    from lopa_kernels.ops.certainty_loss import certainty_forcing_loss
    from lopa_kernels.ops.certainty_loss.fused_linear import fused_linear_certainty_forcing_loss
    from lopa_kernels.ops.confidence import (
        SoftmaxStats,
        TokenConfidence,
        softmax_stats,
        token_confidence,
        token_confidence_out,
    )
    from lopa_kernels.ops.kv_cache import kv_commit_, kv_prewrite_, qkv_prewrite_
    from lopa_kernels.ops.step import (
        NeededRows,
        branch_step,
        branch_step_out,
        lopa_step,
        lopa_step_out,
        needed_rows,
    )
    from lopa_kernels.state import LopaState, LopaStep, empty_step, initial_state
    from lopa_kernels.status import Status

    _dispatch.load_triton()
else:

    def __getattr__(name: str) -> object:
        if name in __all__:
            _load.require("lopa_cpu")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "LopaConfig",
    "LopaState",
    "LopaStep",
    "NeededRows",
    "Selection",
    "SoftmaxStats",
    "Spawned",
    "Status",
    "TokenConfidence",
    "branch_attention",
    "branch_confidence",
    "branch_step",
    "branch_step_out",
    "certainty_forcing_loss",
    "empty_step",
    "fused_linear_certainty_forcing_loss",
    "get_backend",
    "initial_state",
    "kv_commit_",
    "kv_prewrite_",
    "lopa_step",
    "lopa_step_out",
    "needed_rows",
    "qkv_prewrite_",
    "select_positions",
    "set_backend",
    "softmax_stats",
    "spawn_branches",
    "token_confidence",
    "token_confidence_out",
    "use_backend",
]
