"""Graphs that call torch.ops.lopa become graphs of the operators of ascend_ops, by torchair."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ascend_definitions import Definition
from conftest import ELSEWHERE, Graph, Node

import lopa_kernels as lk
from lopa_kernels import LopaConfig, LopaState
from lopa_kernels.ascend import converters, register_converters

Convert = Callable[..., tuple[Graph, Graph]]

MASK = 63
#: layers, batch, branches, window, query heads, KV heads, head dim, capacity, vocabulary
L, B, K, W, HQ, HK, D, S, V = 2, 2, 3, 8, 4, 2, 64, 32, 64
INT32, FLOAT, BF16, INT64, BOOL = "DT_INT32", "DT_FLOAT", "DT_BF16", "DT_INT64", "DT_BOOL"
STATE_TYPES = (
    INT64, INT32, FLOAT, BOOL, INT32, INT32, INT32, INT32, INT64, FLOAT, FLOAT, BOOL,
)  # fmt: skip
RESULT_TYPES = (INT32, INT32, FLOAT, INT64, INT32)


def bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def int32(*shape: int) -> torch.Tensor:
    return zeros(*shape, dtype=torch.int32)


def caches() -> list[torch.Tensor]:
    return [zeros(L, B, S, HK, D) for _ in range(2)]


def windows() -> list[torch.Tensor]:
    return [zeros(L, B, K, W, HK, D) for _ in range(2)]


def state() -> LopaState:
    prompt = torch.ones(B, 4, dtype=torch.int64)
    made = lk.initial_state(prompt, config(window=W))
    tokens = made.tokens.new_full((B, K, W), MASK)
    wide = {"tokens": tokens, "length": int32(B, K), "creation": torch.zeros(B, K)}
    return made._replace(**wide, eos=torch.zeros(B, K, dtype=torch.bool))


def config(**changes: Any) -> LopaConfig:
    given = {
        "mask_id": MASK, "max_new_tokens": 18, "block_size": 4, "tau_conf": 0.9, "tau_add": 0.3,
        "tau_act": 0.7, "eos_id": 2, "metric": "neg_entropy", "reduction": "bottom",
        "fraction": 0.7, "alpha": 0.1, "shift": True,
    }  # fmt: skip
    return LopaConfig(**{**given, **changes})


class TestInPlace:
    """torchair copies what is written, the operator writes the copy, an Assign writes it back."""

    def check(
        self,
        graphs: tuple[Graph, Graph],
        kind: str,
        arguments: dict[str, int | None],
        written: tuple[str, ...],
        definition: Definition,
    ) -> Node:
        """`arguments`: the operator's input -> which argument of the function it is."""
        raw, final = graphs
        node = raw.one(kind)
        assert list(node.inputs) == list(definition.inputs)
        assert list(node.outputs) == list(definition.outputs) == list(written)
        assert set(node.attributes) == set(definition.attributes)
        number = {f"{name}:0": index for name, index in raw.data.items()}
        position = raw.argument_of
        for name, argument in arguments.items():
            source = node.inputs[name]
            if name in written:
                move = raw.producer(source)
                assert move.type == "TensorMove", name
                source = move.inputs["x"]
            if argument is None:
                assert source == "", name
            else:
                assert position[number[source]] == argument, name
        assigned = {a.inputs["value"]: a.inputs["ref"] for a in raw.of("Assign")}
        expected = {}
        for i, name in enumerate(written):
            if arguments.get(name) is not None:
                value, argument = f"{node.name}:{i}", arguments[name]
                assert position[number[assigned[value]]] == argument, name
                expected[value] = number[assigned[value]]
        assert set(assigned) == set(expected)
        # What runs: no copy back, since the outputs are the memory of the inputs.
        outputs = list(final.one("NetOutput").inputs.values())
        assert {outputs[o]: i for o, i in final.written.items()} == expected
        assert not final.of("Assign")
        return node

    def test_kv_commit(self, convert: Convert, definitions: dict[str, Definition]) -> None:
        def commit(*tensors: torch.Tensor) -> torch.Tensor:
            *most, status = tensors
            lk.kv_commit_(*most, status=status)
            return status + 1

        names = (
            "k_cache", "v_cache", "k_window", "v_window", "winner", "cache_len", "commit_len",
            "status",
        )  # fmt: skip
        graphs = convert(commit, *caches(), *windows(), *(int32(B) for _ in range(4)))
        node = self.check(
            graphs,
            "LopaKvCommit",
            {name: i for i, name in enumerate(names)},
            ("k_cache", "v_cache", "status"),
            definitions["LopaKvCommit"],
        )
        assert [dtype for dtype, _ in node.outputs.values()] == [BF16, BF16, INT32]
        shapes = {n.name: n.outputs["y"] for n in graphs[0].of("Data")}
        window = node.inputs["k_window"].rpartition(":")[0]
        assert shapes[window] == (BF16, (L, B, K, W, HK, D))

    @pytest.mark.parametrize("rotates", [True, False])
    def test_kv_prewrite(
        self, convert: Convert, definitions: dict[str, Definition], rotates: bool
    ) -> None:
        def prewrite(*tensors: torch.Tensor) -> torch.Tensor:
            k_window, v_window, k, v, *rotation = tensors
            lk.kv_prewrite_(k_window, v_window, 1, k, v, *rotation)
            return k + 1

        rows = [zeros(B, K, W, HK, D) for _ in range(2)]
        rotation = [torch.zeros(S + W, D), int32(B)] if rotates else []
        names = ("k_window", "v_window", "k", "v", "cos_sin", "cache_len")
        arguments = {name: i if i < 4 or rotates else None for i, name in enumerate(names)}
        node = self.check(
            convert(prewrite, *windows(), *rows, *rotation),
            "LopaKvPrewrite",
            arguments,
            ("k_window", "v_window"),
            definitions["LopaKvPrewrite"],
        )
        assert node.attributes == {"layer": 1}

    def test_kv_prewrite_direct(self, convert: Convert, definitions: dict[str, Definition]) -> None:
        names = (
            "k_window", "v_window", "k_cache", "v_cache", "k", "v", "cache_len", "commit_len",
            "cos_sin", "status",
        )  # fmt: skip

        def prewrite(*tensors: torch.Tensor) -> torch.Tensor:
            t = dict(zip(names, tensors, strict=True))
            window = t.pop("k_window"), t.pop("v_window")
            lk.kv_prewrite_(*window, 1, t.pop("k"), t.pop("v"), direct=True, **t)
            return t["status"] + 1

        rows = [zeros(B, K, W, HK, D) for _ in range(2)]
        lengths = (int32(B), int32(B), torch.zeros(S + W, D), int32(B))
        node = self.check(
            convert(prewrite, *windows(), *caches(), *rows, *lengths),
            "LopaKvPrewriteDirect",
            {name: i for i, name in enumerate(names)},
            ("k_window", "v_window", "k_cache", "v_cache", "status"),
            definitions["LopaKvPrewriteDirect"],
        )
        assert node.attributes == {"layer": 1}

    @pytest.mark.parametrize("norms", [True, False])
    def test_qkv_prewrite(
        self, convert: Convert, definitions: dict[str, Definition], norms: bool
    ) -> None:
        names = ("q", "k_window", "v_window", "qkv", "cos_sin", "cache_len", "q_norm", "k_norm")

        def prewrite(*tensors: torch.Tensor) -> torch.Tensor:
            q, k_window, v_window, qkv, cos_sin, cache_len, *weights = tensors
            given = dict(zip(names[6:], weights, strict=True)) if norms else {}
            if norms:
                given["norm_eps"] = 1e-5
            rotation = cos_sin, cache_len
            lk.qkv_prewrite_(k_window, v_window, 0, qkv, *rotation, num_heads=HQ, q=q, **given)
            return cache_len + 1

        qkv = zeros(B, K, W, HQ + 2 * HK, D)
        weights = (zeros(D), zeros(D)) if norms else ()
        inputs = (zeros(B, K, W, HQ, D), *windows(), qkv, torch.zeros(S + W, D), int32(B), *weights)
        node = self.check(
            convert(prewrite, *inputs),
            "LopaQkvPrewrite",
            {name: i if i < len(inputs) else None for i, name in enumerate(names)},
            ("q", "k_window", "v_window"),
            definitions["LopaQkvPrewrite"],
        )
        assert node.attributes == {"layer": 0, "norm_eps_bits": bits(1e-5 if norms else 1e-6)}

    @pytest.mark.parametrize("norms", [True, False])
    def test_qkv_prewrite_direct(
        self, convert: Convert, definitions: dict[str, Definition], norms: bool
    ) -> None:
        names = (
            "q", "k_window", "v_window", "k_cache", "v_cache", "qkv", "cos_sin", "cache_len",
            "commit_len", "status", "q_norm", "k_norm",
        )  # fmt: skip
        given = names if norms else names[:-2]

        def prewrite(*tensors: torch.Tensor) -> torch.Tensor:
            t = dict(zip(given, tensors, strict=True))
            window = t.pop("k_window"), t.pop("v_window")
            lk.qkv_prewrite_(*window, 1, t.pop("qkv"), num_heads=HQ, direct=True, **t)
            return t["status"] + 1

        qkv = zeros(B, K, W, HQ + 2 * HK, D)
        tensors = (zeros(B, K, W, HQ, D), *windows(), *caches(), qkv, torch.zeros(S + W, D))
        weights = (zeros(D), zeros(D)) if norms else ()
        node = self.check(
            convert(prewrite, *tensors, int32(B), int32(B), int32(B), *weights),
            "LopaQkvPrewriteDirect",
            {name: i if name in given else None for i, name in enumerate(names)},
            ("q", "k_window", "v_window", "k_cache", "v_cache", "status"),
            definitions["LopaQkvPrewriteDirect"],
        )
        assert node.attributes == {"layer": 1, "norm_eps_bits": bits(1e-6)}


class TestStep:
    def test_it_is_three_operators(
        self, convert: Convert, definitions: dict[str, Definition]
    ) -> None:
        settings = config(tau_act=0.5)

        def step(logits: torch.Tensor, *fields: torch.Tensor) -> tuple[torch.Tensor, ...]:
            out = lk.lopa_step(logits, LopaState(*fields), settings)
            return (*out.state, *out[1:])

        _, final = convert(step, zeros(B, K, W, V), *state())
        assert final.custom() == ["LopaStepRows", "LopaTokenConfidence", "LopaBranchStep"]
        # And nothing beside them: no statistic, no length goes through another operator.
        assert {node.type for node in final.nodes} - set(final.custom()) == {"Data", "NetOutput"}
        rows, confidence, step_node = (final.one(kind) for kind in final.custom())
        for node in (rows, confidence, step_node):
            definition = definitions[node.type]
            assert list(node.inputs) == list(definition.inputs), node.type
            assert list(node.outputs) == list(definition.outputs), node.type
            assert set(node.attributes) == set(definition.attributes), node.type

        assert rows.inputs["given_rows"] == ""
        assert rows.attributes == {"mask_id": MASK, "shift": True}
        assert rows.outputs["wanted"][0] == INT32
        assert confidence.inputs["rows"] == f"{rows.name}:0"
        assert confidence.inputs["seed"] == confidence.inputs["step"] == ""
        assert confidence.attributes == {
            "metric": "neg_entropy",
            "temperature_bits": bits(0.0),
            "top_k": 0,
            "top_p_bits": bits(1.0),
        }
        assert [dtype for dtype, _ in confidence.outputs.values()] == [INT64, FLOAT, FLOAT, INT32]
        for i, name in enumerate(("token", "prob", "score", "unusable")):
            assert step_node.inputs[name] == f"{confidence.name}:{i}"
        attributes = dict(step_node.attributes)
        assert attributes.pop("tau_conf") == pytest.approx(0.9)
        assert attributes == {
            "out_branches": K, "out_window": W, "add_count": 2, "act_count": 2, "block_size": 4,
            "max_blocks": 4, "mask_id": MASK, "eos_id": 2, "accept": "prob", "fallback": "block",
            "reduction": "bottom", "fraction_bits": bits(0.7), "group": 0,
            "alpha_bits": bits(0.1), "shift": True, "force_anchor": False,
        }  # fmt: skip
        types = [dtype for dtype, _ in step_node.outputs.values()]
        assert types == [*STATE_TYPES, *RESULT_TYPES]
        outputs = list(final.one("NetOutput").inputs.values())
        assert outputs == [f"{step_node.name}:{i}" for i in range(17)]

    def test_rows(self, convert: Convert) -> None:
        settings = config(top_k=40, top_p=1.0, branches=5, window=12, group=3,
                          reduction="group", tau_act=1.0)  # fmt: skip

        def step(
            logits: torch.Tensor,
            rows: torch.Tensor,
            seed: torch.Tensor,
            count: torch.Tensor,
            *fields: torch.Tensor,
        ) -> torch.Tensor:
            return lk.lopa_step(
                logits, LopaState(*fields), settings, rows, seed=seed, step=count
            ).winner

        numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        _, final = convert(step, zeros(20, V), int32(B, K, W), *numbers, *state())
        rows, confidence, step_node = (final.one(kind) for kind in final.custom())
        position = {f"{name}:0": final.argument_of[i] for name, i in final.data.items()}
        assert position[rows.inputs["given_rows"]] == 1
        assert position[confidence.inputs["logits"]] == 0
        assert position[confidence.inputs["seed"]] == 2
        assert position[confidence.inputs["step"]] == 3
        assert confidence.attributes == {
            "metric": "neg_entropy",
            "temperature_bits": bits(0.0),
            "top_k": 40,
            "top_p_bits": bits(1.0),
        }
        wanted = {"out_branches": 5, "out_window": 12, "group": 3, "act_count": 4}
        assert wanted.items() <= step_node.attributes.items()
        names = list(step_node.inputs)[4:]
        assert [position[step_node.inputs[name]] for name in names] == list(range(4, 16))

    def test_branch_step(self, convert: Convert) -> None:
        settings = config()

        def step(*tensors: torch.Tensor) -> torch.Tensor:
            return lk.branch_step(*tensors[:3], LopaState(*tensors[3:]), settings).filled

        token = torch.zeros(B, K, W, dtype=torch.int64)
        _, final = convert(step, token, torch.zeros(B, K, W), torch.zeros(B, K, W), *state())
        assert final.custom() == ["LopaBranchStep"]
        assert final.one("LopaBranchStep").inputs["unusable"] == ""

    def test_needed_rows(self, convert: Convert) -> None:
        settings = config(shift=False)

        def needed(*fields: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(lk.needed_rows(LopaState(*fields), settings, capacity=10))

        _, final = convert(needed, *state())
        node = final.one("LopaNeededRows")
        assert node.attributes == {"mask_id": MASK, "shift": False, "capacity": 10}
        assert [dtype for dtype, _ in node.outputs.values()] == [INT64, INT32, INT32]

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 1 / 3, 0.9, 1.0])
    def test_counts_of_shares(self, share: float) -> None:
        for block_size in (1, 3, 4, 7, 10, 32, 64):
            least = next(n for n in range(block_size + 1) if n / block_size >= share)
            assert converters._least_count(share, block_size) == least


class TestOthers:
    def test_statistics(self, convert: Convert) -> None:
        def both(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
            stats = lk.softmax_stats(logits)
            return (*lk.token_confidence(logits, metric="margin", top_k=9), stats.lse)

        _, final = convert(both, zeros(5, V))
        node = final.one("LopaTokenConfidence")
        assert node.attributes["metric"] == "margin"
        assert node.attributes["top_k"] == 9
        assert list(final.one("LopaSoftmaxStats").outputs) == [
            "token", "prob", "margin", "neg_entropy", "lse",
        ]  # fmt: skip

    def test_parts_of_a_round(self, convert: Convert) -> None:
        settings = config(fallback="window", accept="score", tau_act=0.6)

        def parts(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            score, open_columns, creation, token, tokens, length, eos = tensors
            confidence = lk.branch_confidence(
                score, open_columns, creation, reduction="bottom", fraction=0.7, alpha=0.1
            )
            first = score[:, 0].contiguous()
            chosen = lk.select_positions(
                token, first, first, tokens, length, length, length, settings, lookahead=2
            )
            made = lk.spawn_branches(tokens, eos, token, first, chosen.columns, eos_id=2)
            return (confidence, *chosen, *made)

        tokens = torch.zeros(B, W, dtype=torch.int64)
        _, final = convert(
            parts, torch.zeros(B, K, W), torch.zeros(B, K, W, dtype=torch.bool),
            torch.zeros(B, K), tokens, tokens.clone(), int32(B), torch.zeros(B, dtype=torch.bool),
        )  # fmt: skip
        confidence = final.one("LopaBranchConfidence")
        assert confidence.attributes == {
            "reduction": "bottom",
            "fraction_bits": bits(0.7),
            "group": 0,
            "alpha_bits": bits(0.1),
        }
        selection = final.one("LopaSelectPositions").attributes
        assert selection["lookahead"] == 2
        assert selection["act_count"] == 3
        assert (selection["accept"], selection["fallback"]) == ("score", "window")
        spawned = final.one("LopaSpawnBranches")
        assert spawned.attributes == {"eos_id": 2}
        assert spawned.inputs["columns"] == f"{final.one('LopaSelectPositions').name}:1"

    @pytest.mark.parametrize("paged", [False, True])
    def test_attention(
        self, convert: Convert, definitions: dict[str, Definition], paged: bool
    ) -> None:
        def attend(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            *inputs, prompt_len, table = tensors
            return lk.branch_attention(
                *inputs, mask="block_causal", block_size=4, prompt_len=prompt_len,
                block_table=table if paged else None, scale=0.25, return_lse=True,
            )  # fmt: skip

        pools = [zeros(6, 16, HK, D) if paged else zeros(B, S, HK, D) for _ in range(2)]
        window = [zeros(B, K, W, HK, D) for _ in range(2)]
        _, final = convert(
            attend, zeros(B, K, W, HQ, D), *pools, *window, int32(B), int32(B, K), int32(B),
            int32(B, 2),
        )  # fmt: skip
        node = final.one("LopaBranchAttention")
        definition = definitions["LopaBranchAttention"]
        assert list(node.inputs) == list(definition.inputs)
        assert list(node.outputs) == list(definition.outputs)
        assert (node.inputs["block_table"] == "") == (not paged)
        assert node.attributes == {
            "mask": "block_causal",
            "block_size": 4,
            "scale": 0.25,
            "cache_layout": "BSND",
        }
        assert [dtype for dtype, _ in node.outputs.values()] == [BF16, FLOAT]


def test_a_round_is_one_graph(convert: Convert) -> None:
    """Pre-Write and attention of each layer, the step, and the commit of the winner it names."""
    settings = config(shift=False)

    def decode(
        hidden: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        cache, window, status = tensors[:2], tensors[2:4], tensors[4]
        fields = LopaState(*tensors[5:])
        x = hidden
        for layer in range(L):
            q = lk.qkv_prewrite_(*window, layer, x @ weight, table, fields.cache_len, num_heads=HQ)
            kv = [tensor[layer] for tensor in (*cache, *window)]
            a = lk.branch_attention(q, *kv, fields.cache_len, fields.length)
            x = x + a.flatten(-2)
        out = lk.lopa_step(x[..., :V], fields, settings)
        lengths = fields.cache_len, fields.commit_len
        lk.kv_commit_(*cache, *window, out.winner, *lengths, status=status)
        return (*out.state, *out[1:])

    weight = zeros(HQ * D, (HQ + 2 * HK) * D)
    raw, final = convert(
        decode, zeros(B, K, W, HQ * D), weight, torch.zeros(S + W, D), *caches(), *windows(),
        int32(B), *state(),
    )  # fmt: skip
    round_ = ["LopaStepRows", "LopaTokenConfidence", "LopaBranchStep"]
    layers = ["LopaQkvPrewrite", "LopaBranchAttention"] * L
    assert final.custom() == [*layers, *round_, "LopaKvCommit"]
    commit, step = final.one("LopaKvCommit"), final.one("LopaBranchStep")
    assert commit.inputs["winner"] == f"{step.name}:12"
    # The second layer writes the windows that the first has written.
    first, second = raw.of("LopaQkvPrewrite")
    assert raw.producer(raw.producer(second.inputs["k_window"]).inputs["x"]).name == first.name
    assert raw.producer(commit.inputs["k_window"]).name == second.name
    # Both caches, both windows and the status words are written back.
    assert len(raw.of("Assign")) == 5
    positions = sorted(final.argument_of[i] for i in final.written.values())
    assert positions == [3, 4, 5, 6, 7]


class TestRefused:
    def test_out_and_in_place_rounds(self, convert: Convert) -> None:
        settings = config()

        def step(logits: torch.Tensor, *fields: torch.Tensor) -> torch.Tensor:
            given = LopaState(*fields)
            out = lk.empty_step(given, settings)
            lk.lopa_step_out(logits, given, settings, out)
            return out.winner

        message = "lopa::lopa_step_out does not convert to a GE graph.*use lopa_step"
        with pytest.raises(Exception, match=message):
            convert(step, zeros(B, K, W, V), *state())

    def test_filters(self, convert: Convert) -> None:
        def filtered(logits: torch.Tensor) -> torch.Tensor:
            return lk.token_confidence(logits, top_p=0.9).token

        with pytest.raises(Exception, match="top_p 0.9: Ascend's operators filter no tokens"):
            convert(filtered, zeros(5, V))

    def test_what_is_not_installed(self, convert: Convert, monkeypatch: Any) -> None:
        from torchair.core import _torchair

        monkeypatch.setattr(_torchair, "get_registered_ir_def", lambda name: ("ERROR", [], [], []))

        def stats(logits: torch.Tensor) -> torch.Tensor:
            return lk.token_confidence(logits).token

        with pytest.raises(Exception, match="LopaTokenConfidence"):
            convert(stats, zeros(5, V))


def test_every_operator_has_a_converter() -> None:
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.removeprefix("lopa::") for name in names if name.startswith("lopa::")}
    assert registered >= ELSEWHERE
    assert set(converters._converters) == registered - ELSEWHERE
    register_converters()
    for op in converters._converters:
        assert getattr(torch.ops.lopa, op).default._ge_converter is not None
