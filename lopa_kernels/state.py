"""What a round of LoPA needs and leaves behind."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lopa_kernels._checks import check_device, check_dtype, check_shape
from lopa_kernels.config import LopaConfig


class LopaState(NamedTuple):
    """B sequences of K branch slots with a window of W columns; all tensors on one device.

    Column c of the window is position ``cache_len + c``. Slot 0 is the anchor, the following ones
    are lookahead branches. A column is open if it is inside its branch's `length`, belongs to a
    generated block and holds ``mask_id``.
    """

    tokens: torch.Tensor
    """int64 [B, K, W]: each branch's window, padded with mask_id beyond `length`."""
    length: torch.Tensor
    """int32 [B, K]: valid columns of the branch."""
    creation: torch.Tensor
    """fp32 [B, K]: score of the token that made the branch; 1 for the anchor."""
    eos: torch.Tensor
    """bool [B, K]: an EOS has been filled in the branch's lineage."""
    branches: torch.Tensor
    """int32 [B]: live branch slots; those beyond are dead."""
    cache_len: torch.Tensor
    """int32 [B]: positions in the KV cache; the position of column 0."""
    commit_len: torch.Tensor
    """int32 [B]: leading columns, complete in the anchor, that this round commits."""
    prompt_len: torch.Tensor
    """int32 [B]: positions before the first generated block."""
    carry_token: torch.Tensor
    """int64 [B]: token of the logits row just before column 0 (shifted models)."""
    carry_prob: torch.Tensor
    """fp32 [B]: its probability."""
    carry_score: torch.Tensor
    """fp32 [B]: its score."""
    done: torch.Tensor
    """bool [B]: nothing is left to fill."""


class LopaStep(NamedTuple):
    """What one round gives."""

    state: LopaState
    """The state of the next round."""
    winner: torch.Tensor
    """int32 [B]: the branch slot that won; 0 where the sequence was done."""
    filled: torch.Tensor
    """int32 [B]: columns filled in this round."""
    confidence: torch.Tensor
    """fp32 [B, K]: branch confidence; -inf in dead slots and where the sequence was done."""
    committed: torch.Tensor
    """int64 [B, W]: tokens of the columns that left the window, -1 elsewhere; they belong to
    positions cache_len.. of the old state."""
    status: torch.Tensor
    """int32 [B]: 0, or bits of :class:`lopa_kernels.Status`."""


# torch.export serialises a NamedTuple only under a registered name.
for _type in (LopaState, LopaStep):
    torch.utils._pytree._register_namedtuple(
        _type, serialized_type_name=f"{_type.__module__}.{_type.__qualname__}"
    )


def initial_state(
    prompt: torch.Tensor, config: LopaConfig, prompt_len: torch.Tensor | None = None
) -> LopaState:
    """The state of the prefill round: one branch whose window is the prompt and the first block.

    The round from it commits the prompt's K/V and gives the first decoding state, of
    ``config.branches`` slots and ``config.window`` columns.

    Args:
        prompt: int64 [B, P], token ids, padded at the end to the longest prompt.
        config: `mask_id` and `block_size` are read.
        prompt_len: int32 [B], valid tokens of each prompt, in [0, P]; None: P for all.

    Returns:
        LopaState with K = 1 and W = P + block_size.

    Raises:
        TypeError, ValueError: dtype, shape or device of an argument.
    """
    op = "initial_state"
    check_dtype(op, "prompt", prompt, torch.int64)
    if prompt.dim() != 2:
        raise ValueError(f"{op}: prompt: expected shape [B, P], got {list(prompt.shape)}")
    batch, columns = prompt.shape
    device = prompt.device
    if prompt_len is None:
        prompt_len = torch.full((batch,), columns, dtype=torch.int32, device=device)
    check_dtype(op, "prompt_len", prompt_len, torch.int32)
    check_shape(op, "prompt_len", prompt_len, (batch,))
    check_device(op, "prompt_len", prompt_len, device)

    window = columns + config.block_size
    column = torch.arange(window, device=device)
    tokens = torch.full((batch, 1, window), config.mask_id, dtype=torch.int64, device=device)
    in_prompt = column[None, :columns] < prompt_len[:, None]
    tokens[:, 0, :columns] = torch.where(in_prompt, prompt, config.mask_id)

    def zeros(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(batch, dtype=dtype, device=device)

    return LopaState(
        tokens=tokens,
        length=(prompt_len + config.block_size)[:, None],
        creation=torch.ones(batch, 1, device=device),
        eos=torch.zeros(batch, 1, dtype=torch.bool, device=device),
        branches=torch.ones(batch, dtype=torch.int32, device=device),
        cache_len=zeros(torch.int32),
        commit_len=prompt_len.clone(),
        prompt_len=prompt_len.clone(),
        carry_token=zeros(torch.int64),
        carry_prob=zeros(torch.float32),
        carry_score=torch.full((batch,), float("-inf"), device=device),
        done=zeros(torch.bool),
    )


def empty_step(state: LopaState, config: LopaConfig) -> LopaStep:
    """Uninitialised buffers for the `out` forms: a :class:`LopaStep` of the right shapes."""
    batch, branches, window = state.tokens.shape
    next_branches = branches if config.branches is None else config.branches
    next_window = window if config.window is None else config.window
    sizes: dict[str, tuple[int, ...]] = {"tokens": (batch, next_branches, next_window)}
    for name in ("length", "creation", "eos"):
        sizes[name] = (batch, next_branches)

    def buffer(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=state.tokens.device)

    return LopaStep(
        LopaState(
            *(
                buffer(sizes.get(name, (batch,)), tensor.dtype)
                for name, tensor in zip(LopaState._fields, state, strict=True)
            )
        ),
        winner=buffer((batch,), torch.int32),
        filled=buffer((batch,), torch.int32),
        confidence=buffer((batch, branches), torch.float32),
        committed=buffer((batch, window), torch.int64),
        status=buffer((batch,), torch.int32),
    )


#: dtypes of the fields of LopaState, in their order
_DTYPES = (
    torch.int64,  # tokens
    torch.int32,  # length
    torch.float32,  # creation
    torch.bool,  # eos
    torch.int32,  # branches
    torch.int32,  # cache_len
    torch.int32,  # commit_len
    torch.int32,  # prompt_len
    torch.int64,  # carry_token
    torch.float32,  # carry_prob
    torch.float32,  # carry_score
    torch.bool,  # done
)


def check_state(op: str, state: LopaState, prefix: str = "state.") -> None:
    """Raises TypeError or ValueError where a field has the wrong dtype, shape or device."""
    tokens = state[0]
    if tokens.dim() != 3:
        raise ValueError(
            f"{op}: {prefix}tokens: expected shape [B, K, W], got {list(tokens.shape)}"
        )
    batch, branches, window = tokens.shape
    if branches < 1 or window < 1:
        raise ValueError(
            f"{op}: {prefix}tokens: expected at least one branch and one column, "
            f"got shape {list(tokens.shape)}"
        )
    device = tokens.device
    shape: tuple[int, ...]
    for index, tensor in enumerate(state):
        shape = tokens.shape if index == 0 else (batch, branches) if index < 4 else (batch,)
        if tensor.dtype != _DTYPES[index] or tensor.shape != shape or tensor.device != device:
            name = prefix + LopaState._fields[index]
            check_dtype(op, name, tensor, _DTYPES[index])
            check_shape(op, name, tensor, shape)
            check_device(op, name, tensor, device)
