"""Every operator with small inputs: as the public functions take them, and as torch.ops does."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from states import MASK, random_state, random_stats
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import lopa_kernels as lk
from lopa_kernels import LopaConfig, LopaStep, TokenConfidence
from lopa_kernels.ops.certainty_loss import gradient as loss_gradient

#: two vocabulary tiles, the second one short
VOCAB = 2100


def copied(values: Any, device: torch.device | str | None = None) -> Any:
    """Copies of all tensors, of the same strides; a tensor that occurs twice is copied once."""
    made: dict[int, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            to = torch.empty_strided(
                tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device or tensor.device
            )
            made[id(tensor)] = to.copy_(tensor)
        return made[id(tensor)]

    return tree_map_only(torch.Tensor, copy, values)


def tensors_of(values: Any) -> list[torch.Tensor]:
    """Every tensor once, in order."""
    found = {id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}
    return list(found.values())


class Call(NamedTuple):
    """A function and its arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def copied(self, device: torch.device | str | None = None) -> Call:
        return Call(self.function, *copied((self.args, self.kwargs), device))

    def tensors(self) -> list[torch.Tensor]:
        return tensors_of((self.args, self.kwargs))

    def __call__(self, **options: Any) -> list[torch.Tensor]:
        """The tensors of the result, then those of the arguments, which may have been written."""
        result = self.function(*self.args, **self.kwargs, **options)
        return [*tensors_of(result), *self.tensors()]


def _logits(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Rows from flat to sharp."""
    scale = torch.rand((*shape[:-1], 1), generator=generator) * 9 + 1
    return torch.randn(shape, generator=generator) * scale


def public_calls(seed: int = 0) -> dict[str, Call]:
    """Name -> a call on CPU tensors. The name's first word is the function's."""
    g = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)

    def int32(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
        return Call(function, args, kwargs)

    logits = _logits(g, 5, VOCAB)
    wide = _logits(g, 3, 2, VOCAB + 5).bfloat16()[..., :VOCAB]
    key = {"seed": torch.tensor([rng.getrandbits(40)]), "step": torch.tensor([3])}
    some = torch.tensor([[4, -1, 0], [2, 2, 1]], dtype=torch.int32)
    into = TokenConfidence(torch.zeros(5, dtype=torch.int64), torch.zeros(5), torch.zeros(5))
    calls = {
        "token_confidence": call(lk.token_confidence, logits, metric="neg_entropy"),
        "token_confidence sampled": call(
            lk.token_confidence, logits, metric="margin", temperature=0.8, rows=some, **key
        ),
        "token_confidence filtered": call(
            lk.token_confidence, wide, temperature=1.1, top_k=50, top_p=0.9, seed=key["seed"]
        ),
        "token_confidence_out": call(lk.token_confidence_out, logits, into),
        "softmax_stats": call(lk.softmax_stats, wide),
    }

    state = random_state(rng, 2, 3, 8, 4)._replace(done=torch.zeros(2, dtype=torch.bool))
    token, prob, score = random_stats(rng, (2, 3, 8))
    score = score.nan_to_num(0.0, 0.0, 0.0)
    config = LopaConfig(
        mask_id=MASK, max_new_tokens=32, block_size=4, tau_conf=0.3, eos_id=3, branches=3, alpha=0.3
    )
    changed = {**config.__dict__, "shift": True, "temperature": 0.8, "metric": "margin"}
    sampled = LopaConfig(**changed)
    filtered = LopaConfig(**{**changed, "top_k": 40, "top_p": 0.8, "branches": 4})
    columns = torch.tensor([[3, 1, -1], [0, -1, -1]], dtype=torch.int32)
    first = token[:, 0], prob[:, 0], score[:, 0], state.tokens[:, 0], state.length[:, 0]
    positions = state.cache_len, state.prompt_len
    spawned = state.tokens[:, 0], state.eos[:, 0], token[:, 0], score[:, 0]
    calls |= {
        "branch_confidence": call(
            lk.branch_confidence,
            score,
            state.tokens == MASK,
            state.creation,
            branches=state.branches,
            length=state.length,
            reduction="group",
            group=3,
            alpha=0.3,
        ),
        "select_positions": call(
            lk.select_positions, *(t.contiguous() for t in first), *positions, config
        ),
        "select_positions strided": call(lk.select_positions, *first, *positions, config),
        "spawn_branches": call(
            lk.spawn_branches, *(t.contiguous() for t in spawned), columns, eos_id=3
        ),
        "spawn_branches strided": call(lk.spawn_branches, *spawned, columns, eos_id=3),
        "needed_rows": call(lk.needed_rows, state, config, 20),
    }

    dense = _logits(g, *state.tokens.shape, VOCAB)
    needed = lk.needed_rows(state, sampled, backend="cpu")
    sparse = dense.flatten(0, 2)[needed.index].bfloat16()
    buffers = lk.empty_step(state, config)
    other = lk.empty_step(state, config)
    own, self_written = copied(state), copied(state)
    calls |= {
        "lopa_step": call(lk.lopa_step, dense, state, config),
        "lopa_step sampled": call(lk.lopa_step, sparse, state, sampled, needed.rows, **key),
        "lopa_step filtered": call(lk.lopa_step, dense.half(), state, filtered, **key),
        "lopa_step_out": call(lk.lopa_step_out, dense, state, config, buffers),
        "lopa_step_out in place": call(
            lk.lopa_step_out, dense, own, config, LopaStep(own, *lk.empty_step(own, config)[1:])
        ),
        "branch_step": call(lk.branch_step, token, prob, score, state, config),
        "branch_step_out": call(lk.branch_step_out, token, prob, score, state, config, other),
        "branch_step_out in place": call(
            lk.branch_step_out,
            token,
            prob,
            score,
            self_written,
            config,
            LopaStep(self_written, *lk.empty_step(state, config)[1:]),
        ),
    }

    L, B, K, W, Hq, Hk, D, S = 2, 2, 3, 5, 4, 2, 8, 20
    angle = torch.rand(S + W, D // 2, generator=g) * 6
    table = torch.cat([angle.cos(), angle.sin()], 1)
    qkv = torch.randn(B, K, W, (Hq + 2 * Hk) * D, generator=g)
    _, k, v = qkv.unflatten(-1, (-1, D)).split([Hq, Hk, Hk], 3)
    cache = tuple(torch.randn(2, L, B, S, Hk, D, generator=g))
    window = tuple(torch.randn(2, L, B, K, W, Hk, D, generator=g))
    lengths = {"cache_len": int32(11, 4), "commit_len": int32(3, 5)}
    direct = {
        "direct": True,
        "k_cache": cache[0],
        "v_cache": cache[1],
        "commit_len": lengths["commit_len"],
        "status": int32(0, 0),
    }
    full = {**direct, "status": int32(0, 0), "cache_len": int32(18, 4)}
    q_norm, k_norm = torch.rand(2, D, generator=g) + 0.5
    norms = {"q_norm": q_norm, "k_norm": k_norm, "norm_eps": 1e-5}
    calls |= {
        "kv_prewrite_": call(lk.kv_prewrite_, *window, 1, k, v),
        "kv_prewrite_ rotated": call(
            lk.kv_prewrite_, *window, 0, k, v, table, lengths["cache_len"]
        ),
        "kv_prewrite_ direct": call(lk.kv_prewrite_, *window, 1, k, v, table, **full),
        "qkv_prewrite_": call(
            lk.qkv_prewrite_, *window, 1, qkv, table, lengths["cache_len"], num_heads=Hq
        ),
        "qkv_prewrite_ direct": call(
            lk.qkv_prewrite_, *window, 0, qkv, table, lengths["cache_len"], num_heads=Hq, **direct
        ),
        "qkv_prewrite_ normed": call(
            lk.qkv_prewrite_, *window, 1, qkv, table, lengths["cache_len"], num_heads=Hq, **norms
        ),
        "qkv_prewrite_ normed, direct": call(
            lk.qkv_prewrite_,
            *window,
            0,
            qkv,
            table,
            lengths["cache_len"],
            num_heads=Hq,
            **direct,
            **norms,
        ),
        "kv_commit_": call(lk.kv_commit_, *cache, *window, int32(2, 1), **lengths),
        "kv_commit_ with status": call(
            lk.kv_commit_,
            *(t.bfloat16() for t in (*cache, *window)),
            int32(2, 1),
            int32(4, 17),
            lengths["commit_len"],
            status=int32(0, 0),
        ),
    }
    return {name: made.copied() for name, made in calls.items()}


def attention_calls(seed: int = 0) -> dict[str, Call]:
    """The same of branch_attention, whose kernels on a GPU are of two backends."""
    g = torch.Generator().manual_seed(seed)
    B, K, W, Hq, Hk, D, S, page = 2, 3, 5, 4, 2, 8, 48, 16

    def int32(*values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    q = torch.randn(B, K, W, Hq, D, generator=g)
    cache = torch.randn(2, B, Hk, S, D, generator=g).transpose(2, 3).unbind()
    pools = torch.randn(2, 5, page, Hk, D, generator=g).unbind()
    window = torch.randn(2, B, K, W, Hk, D, generator=g).unbind()
    lengths = int32(37, 9), int32([5, 2, 0], [3, 5, 4])
    inputs = (q, *cache, *window, *lengths)
    paged = (q, *pools, *window, *lengths)
    # The second sequence needs one page.
    table = int32([3, 0, 4], [1, -1, 99])
    blocks = {"mask": "block_causal", "block_size": 3, "prompt_len": int32(36, 11)}
    function = lk.branch_attention
    calls = {
        "branch_attention": Call(function, inputs, {}),
        "branch_attention causal": Call(function, inputs, {**blocks, "return_lse": True}),
        "branch_attention out": Call(function, inputs, {"out": torch.zeros(q.shape), **blocks}),
        "branch_attention paged": Call(function, paged, {"block_table": table, "scale": 0.3}),
        "branch_attention paged causal": Call(
            function, paged, {"block_table": table, **blocks, "return_lse": True}
        ),
        "branch_attention paged out": Call(
            function,
            paged,
            {"block_table": table, "out": torch.zeros(q.shape), "return_lse": True},
        ),
    }
    return {name: made.copied() for name, made in calls.items()}


def loss_calls(seed: int = 0) -> dict[str, Call]:
    """The same of the certainty-forcing loss, and of its backward pass alone."""
    g = torch.Generator().manual_seed(seed)
    logits = _logits(g, 2, 3, VOCAB)
    labels = logits.argmax(-1)
    labels[0] = torch.randint(0, VOCAB, (3,), generator=g)
    masked = torch.tensor([[True, True, False], [True, False, True]])
    wide = _logits(g, 6, VOCAB + 5)[:, :VOCAB]
    rows = (wide, labels.flatten(), masked.flatten())
    options = {"temperature": 0.7, "beta": 1.3}
    grad_loss = torch.tensor(3.0)
    saved = torch.ops.lopa.certainty_forcing_loss(logits, labels, masked)[2:]
    other = torch.ops.lopa.certainty_forcing_loss(*rows, **options)[2:]
    calls = {
        "certainty_forcing_loss": Call(
            lk.certainty_forcing_loss, (logits, labels, masked), {"return_terms": True}
        ),
        "certainty_forcing_loss tempered": Call(
            lk.certainty_forcing_loss, rows, {**options, "inplace_backward": True}
        ),
        "certainty_forcing_loss backward": Call(
            loss_gradient, (grad_loss, logits, labels, *saved), {}
        ),
        "certainty_forcing_loss backward in place": Call(
            loss_gradient, (grad_loss, *rows[:2], *other), {**options, "inplace": True}
        ),
    }
    return {name: made.copied() for name, made in calls.items()}


def all_calls(seed: int = 0) -> dict[str, Call]:
    """The calls of every operator."""
    return public_calls(seed) | attention_calls(seed) | loss_calls(seed)


class OpCall(NamedTuple):
    """Arguments of an operator of torch.ops, as the dispatcher gets them."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OpCall] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "lopa":
            self.calls.append(OpCall(func._opname, *copied((args, kwargs))))
        return func(*args, **kwargs)


def op_calls() -> dict[str, OpCall]:
    """Name of the public call -> the operator below it, on CPU tensors."""
    made = {}
    for name, call in all_calls().items():
        with _Recorder() as recorder:
            call(backend="cpu")
        (made[name],) = recorder.calls
    return made


def registered(namespace: str) -> set[str]:
    """The operators of a namespace of torch.ops."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.partition("::")[2] for name in names if name.startswith(f"{namespace}::")}
