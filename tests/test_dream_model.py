"""Dream and LLaDA against an implementation of their definitions, written here from the papers."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from targets import TARGETS, Target, cpu, over
from torch import Tensor

import lopa_kernels as lk
from examples.dream import fused
from examples.dream.config import ModelConfig, dream_7b, llada_8b, small_dream, small_llada
from examples.dream.load import published
from examples.dream.model import Cache, DiffusionLM, random_weights, rope_table

SMALL = {"dream": small_dream, "llada": small_llada}
both = pytest.mark.parametrize("family", SMALL)

DREAM_HF: dict[str, Any] = {
    "model_type": "Dream",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "mask_token_id": 151666,
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "tie_word_embeddings": False,
}
LLADA_HF: dict[str, Any] = {
    "model_type": "llada",
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-05,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "weight_tying": False,
}


class Plain:
    """A whole sequence at once, without a cache: separate projections, a dense mask, fp64.

    `weights` have their published names; `lora` holds (A, B, scale) of a projection's name.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        lora: dict[str, tuple[Tensor, Tensor, float]] | None = None,
    ) -> None:
        self.c = config
        self.w = {name: tensor.detach().cpu().double() for name, tensor in weights.items()}
        self.lora = lora or {}

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.w[name + ".weight"].T
        if name + ".bias" in self.w:
            y = y + self.w[name + ".bias"]
        if name in self.lora:
            a, b, scale = self.lora[name]
            y = y + scale * ((x @ a.double().T) @ b.double().T)
        return y

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.c.norm_eps).sqrt() * self.w[name]

    def rotate(self, x: Tensor) -> Tensor:
        """x [n, heads, D]: the pair (i, i + D / 2) is a complex number that turns with position."""
        n, _, d = x.shape
        turns = torch.arange(n).double()[:, None] * self.c.rope_theta ** (
            -2 * torch.arange(d // 2).double() / d
        )
        z = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(
            torch.ones_like(turns), turns
        ).unsqueeze(1)
        return torch.cat([z.real, z.imag], dim=-1)

    def __call__(self, tokens: Tensor, visible: Tensor) -> tuple[list[Tensor], Tensor]:
        """The stream after each layer, and logits; `visible` bool [n, n], query by key."""
        c, n = self.c, len(tokens)
        dream = c.family == "dream"
        layer = "model.layers.{}." if dream else "model.transformer.blocks.{}."
        x = self.w[("model.embed_tokens" if dream else "model.transformer.wte") + ".weight"][tokens]
        after = []
        for number in range(c.layers):
            at = layer.format(number)
            attention = at + "self_attn." if dream else at
            h = self.norm(at + ("input_layernorm.weight" if dream else "attn_norm.weight"), x)
            q, k, v = (
                self.linear(attention + part, h).view(n, -1, c.head_dim)
                for part in ("q_proj", "k_proj", "v_proj")
            )
            group = c.heads // c.kv_heads
            k, v = (t.repeat_interleave(group, dim=1) for t in (self.rotate(k), v))
            scores = torch.einsum("qhd,khd->hqk", self.rotate(q), k) / c.head_dim**0.5
            share = scores.masked_fill(~visible, float("-inf")).softmax(-1)
            seen = torch.einsum("hqk,khd->qhd", share, v).reshape(n, -1)
            x = x + self.linear(attention + ("o_proj" if dream else "attn_out"), seen)
            norm = "post_attention_layernorm.weight" if dream else "ff_norm.weight"
            h = self.norm(at + norm, x)
            names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
            gate, up, down = names if dream else ("ff_proj", "up_proj", "ff_out")
            g = self.linear(at + gate, h)
            x = x + self.linear(at + down, g * torch.sigmoid(g) * self.linear(at + up, h))
            after.append(x)
        final, head = "model.norm.weight", "lm_head"
        if not dream:
            final, head = "model.transformer.ln_f.weight", "model.transformer.ff_out"
        return after, self.linear(head, self.norm(final, x))


def window_state(config: ModelConfig, lengths: list[int], columns: int) -> lk.LopaState:
    """One sequence with an empty cache and a branch of each length, all one open block."""
    lopa = config.decoding(max_new_tokens=columns, block_size=columns)
    branches = len(lengths)
    state = lk.initial_state(torch.zeros(1, 0, dtype=torch.int64), lopa)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, config.vocab_size - 2, (1, branches, columns), generator=generator)
    length = torch.tensor([lengths], dtype=torch.int32)
    tokens[torch.arange(columns) >= length.unsqueeze(-1)] = config.mask_id
    return state._replace(
        tokens=tokens,
        length=length,
        creation=torch.ones(1, branches),
        eos=torch.zeros(1, branches, dtype=torch.bool),
        branches=torch.tensor([branches], dtype=torch.int32),
    )


def run_layers(
    model: DiffusionLM, state: lk.LopaState, mask: str = "full"
) -> tuple[list[Tensor], Tensor]:
    """The stream after each layer [K, W, hidden], and logits [K, W, V]."""
    c = model.config
    _, branches, columns = state.tokens.shape
    device = model.embed.device
    cache = Cache.empty(model, 1, branches, columns, 1)
    cos_sin = rope_table(c, columns + 1, device)
    after = []
    residual, normed = fused.add_rms_norm(
        model.embed, None, model.weights(0).attn_norm, c.norm_eps, state.tokens.flatten()
    )
    options: dict[str, Any] = {"mask": mask, "block_size": columns, "direct": False}
    for number in range(c.layers):
        residual, delta = model.layer(number, residual, normed, state, cache, cos_sin, **options)
        after.append((residual + delta).view(branches, columns, -1))
        if number + 1 < c.layers:
            weight = model.weights(number + 1).attn_norm
            residual, normed = fused.add_rms_norm(residual, delta, weight, c.norm_eps)
    return after, model.logits(residual, delta).view(branches, columns, -1)


@both
@over(TARGETS)
def test_every_layer_and_logit_is_that_of_the_definition(family: str, target: Target) -> None:
    if target.interpreted:
        pytest.skip("many products, which the interpreter does not make")
    config = SMALL[family]()
    model = random_weights(config, target.device, torch.float32, seed=1)
    state = window_state(config, [11, 7], 11)
    with lk.use_backend(target.backend):
        after, logits = cpu(run_layers(model, target.to(state)))
    plain = Plain(config, published(model))
    for branch, length in enumerate((11, 7)):
        tokens = state.tokens[0, branch, :length]
        expected, expected_logits = plain(tokens, torch.ones(length, length, dtype=torch.bool))
        close: dict[str, Any] = dict.fromkeys(("rtol", "atol"), 2e-3 if target.gpu else 1e-4)
        for got, want in zip(after, expected, strict=True):
            torch.testing.assert_close(got[branch, :length].double(), want, **close)
        torch.testing.assert_close(logits[branch, :length].double(), expected_logits, **close)


@both
def test_a_round_takes_the_layers_and_the_rows_that_it_names(family: str) -> None:
    config = SMALL[family]()
    model = random_weights(config, dtype=torch.float32, seed=1)
    state = window_state(config, [11, 7], 11)
    _, logits = run_layers(model, state)
    cache = Cache.empty(model, 1, 2, 11, 1)
    residual, delta = model.hidden(state, cache, rope_table(config, 12), mask="full", block_size=11)
    index = torch.tensor([12, 0, 3])
    torch.testing.assert_close(
        model.logits(residual, delta, index), logits.flatten(0, 1)[index], rtol=1e-5, atol=1e-5
    )


def functions(target: Target) -> ModuleType:
    """Triton's kernels also in the interpreter, where `fused` does not take them."""
    if target.backend != "triton":
        return fused
    from examples.dream import fused_triton

    return fused_triton


def test_biases_and_heads_matter() -> None:
    """What the two families differ in is seen by the comparison above."""
    config = small_dream()
    model = random_weights(config, dtype=torch.float32, seed=1)
    state = window_state(config, [11], 11)
    _, logits = run_layers(model, state)
    layer = model.weights(0)
    assert layer.qkv_bias is not None
    assert random_weights(small_llada()).weights(0).qkv_bias is None
    layer.qkv_bias.data[: config.heads * config.head_dim] += 1
    _, moved = run_layers(model, state)
    assert (moved - logits).abs().max() > 1e-2


@over(TARGETS)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 8), (5, 96), (3, 3584)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_rms_norm(target: Target, rows: int, hidden: int, dtype: torch.dtype) -> None:
    if target.interpreted and dtype == torch.bfloat16:
        pytest.skip("the interpreter's cast to bf16 cuts")
    generator = torch.Generator().manual_seed(0)
    residual, delta = torch.randn(2, rows, hidden, generator=generator).to(dtype)
    weight = torch.randn(hidden, generator=generator).to(dtype)
    index = torch.tensor([rows - 1, 0])
    for chosen in (None, index):
        for added in (None, delta):
            total, normed = cpu(
                functions(target).add_rms_norm(
                    *target.to((residual, added, weight)), 1e-6, target.to(chosen)
                )
            )
            expected = residual if added is None else residual + added
            expected = expected if chosen is None else expected[chosen]
            assert total.equal(expected)
            x = expected.double()
            x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
            tolerance = 1e-5 if dtype == torch.float32 else 2**-7
            torch.testing.assert_close(normed.double(), x, rtol=tolerance, atol=tolerance)


@over(TARGETS)
@pytest.mark.parametrize(("rows", "inner"), [(1, 8), (3, 100), (2, 4100)])
def test_swiglu(target: Target, rows: int, inner: int) -> None:
    packed = 4 * torch.randn(rows, 2 * inner, generator=torch.Generator().manual_seed(0))
    gate, up = packed.double().chunk(2, dim=1)
    got = cpu(functions(target).swiglu(target.to(packed)))
    torch.testing.assert_close(got.double(), gate * torch.sigmoid(gate) * up, rtol=1e-5, atol=1e-5)


def test_configurations_are_the_published_ones() -> None:
    assert ModelConfig.from_hf(DREAM_HF) == dream_7b()
    assert ModelConfig.from_hf(LLADA_HF) == llada_8b()
    assert dream_7b().decoding(max_new_tokens=64).shift
    assert not llada_8b().decoding(max_new_tokens=64).shift


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**DREAM_HF, "model_type": "qwen2"}, "model_type: expected Dream or llada, got 'qwen2'"),
        ({**DREAM_HF, "rope_scaling": {"factor": 2}}, "rope_scaling: only None is implemented"),
        ({**DREAM_HF, "num_key_value_heads": 5}, "heads: expected a multiple of kv_heads"),
        ({**DREAM_HF, "mask_token_id": 152064}, "mask_id: expected an id below vocab_size"),
        ({**LLADA_HF, "include_bias": True}, "include_bias: only False is implemented, got True"),
        ({**LLADA_HF, "n_layers": None}, "n_layers: missing"),
    ],
)
def test_other_configurations_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(values)
