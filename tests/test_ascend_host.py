"""Tiling and inference of the Ascend operators, on shapes and attributes as CANN gives them."""

from __future__ import annotations

import math
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from ascend_definitions import compiled

from ascend_ops import emulator

CORES = 40  # of the platform in ascend_definitions/host.h
LIBRARY = 16 * 1024 * 1024
BF16, FP32, INT32, INT64, BOOL = (
    torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.bool,
)  # fmt: skip
B, K, W, HQ, HK, D, S, L, V = 3, 4, 20, 28, 4, 128, 512, 2, 1000

Attribute = int | float | bool | str


class Tensor(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


class Plan(NamedTuple):
    """What the tiling function has asked for."""

    cores: int
    together: bool
    workspace: int
    data: bytes


class Host:
    """Runs the host functions of an operator in a process of their own."""

    def __init__(self, program: Path) -> None:
        self.program = program

    def run(
        self, kind: str, inputs: list[Tensor | None], attributes: list[Attribute]
    ) -> subprocess.CompletedProcess[str]:
        words: list[object] = [kind]
        for tensor in inputs:
            if tensor is None:
                words.append("none")
            else:
                name = str(tensor.dtype).removeprefix("torch.")
                words += ["in", name, len(tensor.shape), *tensor.shape]
        for value in attributes:
            kinds = {bool: "b", int: "i", float: "f", str: "s"}
            words += [kinds[type(value)], int(value) if isinstance(value, bool) else value]
        text = " ".join(map(str, words))
        return subprocess.run([self.program], input=text, capture_output=True, text=True)

    def __call__(
        self, kind: str, inputs: list[Tensor | None], attributes: list[Attribute]
    ) -> tuple[list[Tensor], Plan]:
        done = self.run(kind, inputs, attributes)
        assert done.returncode == 0, done.stderr
        *outputs, last = done.stdout.splitlines()
        made = []
        for line in outputs:
            name, *sizes = line.split()
            made.append(Tensor(getattr(torch, name), tuple(map(int, sizes))))
        cores, together, workspace, data = last.split()
        return made, Plan(int(cores), together == "1", int(workspace), bytes.fromhex(data))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(compiled("*.cpp", "host.cpp", tmp_path_factory.mktemp("host")))


def bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def int32(*shape: int) -> Tensor:
    return Tensor(INT32, shape)


def floats(*shape: int) -> Tensor:
    return Tensor(FP32, shape)


def rows(*shape: int) -> Tensor:
    return Tensor(BF16, shape)


WINDOW, CACHE = rows(L, B, K, W, HK, D), rows(L, B, S, HK, D)
STATE = [
    Tensor(INT64, (B, K, W)), int32(B, K), floats(B, K), Tensor(BOOL, (B, K)), int32(B), int32(B),
    int32(B), int32(B), Tensor(INT64, (B,)), floats(B), floats(B), Tensor(BOOL, (B,)),
]  # fmt: skip
ROWS_STATE = [STATE[i] for i in (0, 1, 4, 5, 6, 7, 11)]
STATISTICS = [Tensor(INT64, (B, K, W)), floats(B, K, W), floats(B, K, W)]


class TestKvCache:
    SHAPE = (L, B, K, W, HK, 0, D, S)
    PACKED = (L, B, K, W, HK, HQ, D, S)

    def test_commit(self, host: Host) -> None:
        lengths = [int32(B)] * 4
        outputs, plan = host("LopaKvCommit", [CACHE, CACHE, WINDOW, WINDOW, *lengths], [])
        assert outputs == [CACHE, CACHE, int32(B)]
        expected = emulator.module().kv_commit_tiling(self.SHAPE, 2, cores=CORES)
        assert plan == (expected["cores"], False, 0, expected["data"])

    @pytest.mark.parametrize("rotates", [True, False])
    @pytest.mark.parametrize("direct", [True, False])
    @pytest.mark.parametrize("packed", [True, False])
    def test_prewrite(self, host: Host, packed: bool, direct: bool, rotates: bool) -> None:
        if packed and not rotates:
            pytest.skip("the packed form always rotates")
        table = floats(S + W, D) if rotates else None
        window, cache = [WINDOW, WINDOW], [CACHE, CACHE] if direct else []
        lengths = [int32(B), int32(B)] if direct else []
        written: list[Tensor] = [*window, *cache]
        if packed:
            q, qkv = rows(B, K, W, HQ, D), rows(B, K, W, HQ + 2 * HK, D)
            written = [q, *written]
            inputs = [*written, qkv, table, *(lengths or [int32(B)])]
            kind = "LopaQkvPrewrite"
        else:
            rows_in = [rows(B, K, W, HK, D)] * 2
            length = int32(B) if rotates else None
            inputs = [*written, *rows_in, *(lengths if direct else [table, length])]
            inputs += [table] if direct else []
            kind = "LopaKvPrewrite"
        if direct:
            inputs.append(int32(B))
            written.append(int32(B))
            kind += "Direct"
        if packed:
            inputs += [None, None]  # q_norm, k_norm
        outputs, plan = host(kind, inputs, [1, bits(1e-6)] if packed else [1])
        assert outputs == written
        shape = self.PACKED if packed else self.SHAPE
        expected = emulator.module().kv_prewrite_tiling(
            shape if direct else (*shape[:7], 0), 2, layer=1, positions=S + W if rotates else 0,
            rotates=rotates, has_cache_len=direct or rotates, cores=CORES,
        )  # fmt: skip
        assert plan == (expected["cores"], False, 0, expected["data"])

    @pytest.mark.parametrize("direct", [True, False])
    def test_norms(self, host: Host, direct: bool) -> None:
        written = [rows(B, K, W, HQ, D), WINDOW, WINDOW, *([CACHE, CACHE] if direct else [])]
        operands = [rows(B, K, W, HQ + 2 * HK, D), floats(S + W, D), int32(B)]
        lengths = [int32(B), int32(B)] if direct else []  # commit_len, status
        inputs = [*written, *operands, *lengths, rows(D), rows(D)]
        kind = "LopaQkvPrewriteDirect" if direct else "LopaQkvPrewrite"
        outputs, plan = host(kind, inputs, [1, bits(1e-5)])
        assert outputs == [*written, *lengths[1:]]
        expected = emulator.module().kv_prewrite_tiling(
            self.PACKED if direct else (*self.PACKED[:7], 0), 2, layer=1, positions=S + W,
            rotates=True, has_cache_len=True, norm_eps=1e-5, cores=CORES,
        )  # fmt: skip
        assert plan == (expected["cores"], False, 0, expected["data"])
        plain = host(kind, [*inputs[:-2], None, None], [1, bits(1e-5)])[1]
        assert plain.data != plan.data

        refused = [
            (rows(D), None, 1e-5, "q_norm, k_norm: expected both or neither"),
            (None, rows(D), 1e-5, "q_norm, k_norm: expected both or neither"),
            (rows(D), rows(D + 16), 1e-5, "q_norm, k_norm: expected [head_dim]"),
            (rows(1, D), rows(D), 1e-5, "q_norm, k_norm: expected [head_dim]"),
            (rows(D), rows(D), 0.0, "norm_eps: expected above 0"),
            (rows(D), rows(D), math.nan, "norm_eps: expected above 0"),
        ]
        for q_norm, k_norm, eps, message in refused:
            done = host.run(kind, [*inputs[:-2], q_norm, k_norm], [1, bits(eps)])
            assert done.returncode == 2
            assert message in done.stderr

    def test_what_is_refused(self, host: Host) -> None:
        narrow = rows(L, B, K, W, HK, 24)
        for inputs, attributes, message in (
            ([WINDOW, WINDOW, *[rows(B, K, W, HK, D)] * 2, None, None], [L], "layer: not one"),
            ([narrow, narrow, *[rows(B, K, W, HK, 24)] * 2, None, None], [0], "head_dim: expected"),
            (
                [WINDOW, WINDOW, *[rows(B, K, W, HK, D)] * 2, floats(S, D), None],
                [0],
                "cache_len: expected a tensor",
            ),
        ):
            done = host.run("LopaKvPrewrite", inputs, attributes)
            assert done.returncode == 2
            assert message in done.stderr


class TestConfidence:
    NONE = (bits(0.0), 0, bits(1.0))

    @pytest.mark.parametrize("named", [True, False])
    @pytest.mark.parametrize("metric", ["prob", "margin", "neg_entropy"])
    def test_token_confidence(self, host: Host, metric: str, named: bool) -> None:
        inputs = [rows(B, K, V), int32(5, 2) if named else None, None, None]
        outputs, plan = host("LopaTokenConfidence", inputs, [metric, *self.NONE])
        shape = (5, 2) if named else (B, K)
        types = (INT64, FP32, FP32, INT32)
        assert outputs == [Tensor(dtype, shape) for dtype in types]
        expected = emulator.module().confidence_tiling(
            vocab=V, logits_rows=B * K, rows=math.prod(shape), has_rows=named,
            metric=("prob", "margin", "neg_entropy").index(metric), all=False, cores=CORES,
        )  # fmt: skip
        workspace = LIBRARY + expected["workspace"]
        assert plan == (expected["blocks"], True, workspace, expected["data"])

    def test_softmax_stats(self, host: Host) -> None:
        outputs, plan = host("LopaSoftmaxStats", [rows(7, V), None, None, None], [*self.NONE])
        assert outputs == [Tensor(INT64, (7,)), *[floats(7)] * 4]
        expected = emulator.module().confidence_tiling(
            vocab=V, logits_rows=7, rows=7, has_rows=False, metric=0, all=True, cores=CORES
        )
        assert plan.data == expected["data"]

    def test_what_is_refused(self, host: Host) -> None:
        for attributes, message in (
            (["best", *self.NONE], "metric: expected prob, margin or neg_entropy"),
            (["prob", bits(0.5), 0, bits(1.0)], "temperature"),
            (["prob", bits(0.0), 10, bits(1.0)], "top_k"),
            (["prob", bits(0.0), 0, bits(0.9)], "top_p"),
        ):
            done = host.run("LopaTokenConfidence", [rows(7, V), None, None, None], attributes)
            assert done.returncode == 2
            assert message in done.stderr


class TestBranch:
    # The tiling structs of ascend_ops/branch, whose padding is nobody's.
    REDUCE = "2I3QI4x"
    SELECT = "3qf2I4x"

    def same(self, layout: str, one: bytes, other: bytes) -> bool:
        return struct.unpack(f"<{layout}", one) == struct.unpack(f"<{layout}", other)

    def reduce(self, kind: int, fraction: float, group: int, alpha: float) -> object:
        return emulator.module().Reduce(reduction=kind, fraction=fraction, group=group, alpha=alpha)

    def test_step(self, host: Host) -> None:
        attributes: list[Attribute] = [
            6, 32, 0.9, 3, 5, 8, 7, 63, 2, "score", "window", "bottom", bits(0.7), 0, bits(0.1),
            True, False,
        ]  # fmt: skip
        module = emulator.module()
        select = module.Select(
            block_size=8, act_count=5, mask_id=63, tau_conf=0.9, by_score=True, window=True
        )
        for unusable in (None, int32(B, K, W)):
            inputs = [*STATISTICS, unusable, *STATE]
            outputs, plan = host("LopaBranchStep", inputs, attributes)
            widths = {0: (B, 6, 32), 1: (B, 6), 2: (B, 6), 3: (B, 6)}
            following = [t._replace(shape=widths.get(i, t.shape)) for i, t in enumerate(STATE)]
            results = [int32(B), int32(B), floats(B, K), Tensor(INT64, (B, W)), int32(B)]
            assert outputs == [*following, *results]
            data = module.branch_step_tiling(
                batch=B, branches=K, window=W, next_branches=6, next_window=32,
                has_unusable=unusable is not None, shift=True, force_anchor=False, add_count=3,
                max_blocks=7, eos_id=2, reduce=self.reduce(1, 0.7, 0, 0.1), select=select,
            )  # fmt: skip
            assert plan[:3] == (B, False, 0)
            assert self.same(f"8I3q{self.REDUCE}{self.SELECT}", plan.data, data)

    def test_rows(self, host: Host) -> None:
        module = emulator.module()
        for given in (None, int32(B, K, W)):
            outputs, plan = host("LopaStepRows", [*ROWS_STATE, given], [63, True])
            assert outputs == [int32(B, K, W)]
            data = module.rows_tiling(
                batch=B, branches=K, window=W, shift=True, has_given=given is not None, mask_id=63,
                capacity=0,
            )  # fmt: skip
            assert plan[:3] == (B, False, 0)
            assert self.same("5I4x2q", plan.data, data)
        outputs, plan = host("LopaNeededRows", ROWS_STATE, [63, False, 50])
        assert outputs == [Tensor(INT64, (50,)), int32(B, K, W), int32(1)]
        data = module.rows_tiling(
            batch=B, branches=K, window=W, shift=False, has_given=False, mask_id=63, capacity=50
        )
        assert plan[:3] == (B, True, LIBRARY + 32 * B)
        assert self.same("5I4x2q", plan.data, data)

    def test_parts(self, host: Host) -> None:
        module = emulator.module()
        scores = [floats(B, K, W), Tensor(BOOL, (B, K, W)), floats(B, K)]
        attributes: list[Attribute] = ["group", bits(1.0), 3, bits(0.25)]
        outputs, plan = host("LopaBranchConfidence", [*scores, int32(B), None], attributes)
        assert outputs == [floats(B, K)]
        expected = module.branch_confidence_tiling(
            batch=B, branches=K, window=W, has_branches=True, has_length=False,
            reduce=self.reduce(2, 1.0, 3, 0.25),
        )  # fmt: skip
        assert self.same(f"5I4x{self.REDUCE}", plan.data, expected)

        window = [Tensor(INT64, (B, W)), floats(B, W), floats(B, W), Tensor(INT64, (B, W))]
        outputs, plan = host(
            "LopaSelectPositions", [*window, *[int32(B)] * 3], [4, 0.8, 3, 8, 63, "prob", "block"]
        )
        assert outputs == [Tensor(BOOL, (B, W)), int32(B, 4), int32(B)]
        select = module.Select(
            block_size=8, act_count=3, mask_id=63, tau_conf=0.8, by_score=False, window=False
        )
        expected = module.select_positions_tiling(batch=B, window=W, lookahead=4, select=select)
        assert self.same(f"3I4x{self.SELECT}", plan.data, expected)

        inputs = [window[0], Tensor(BOOL, (B,)), window[0], floats(B, W), int32(B, 4)]
        outputs, plan = host("LopaSpawnBranches", inputs, [2])
        assert outputs == [
            Tensor(INT64, (B, 5, W)), floats(B, 5), Tensor(BOOL, (B, 5)), int32(B),
        ]  # fmt: skip
        expected = module.spawn_branches_tiling(batch=B, branches=5, window=W, eos_id=2)
        assert self.same("3I4xq", plan.data, expected)

    def test_what_is_refused(self, host: Host) -> None:
        scores = [floats(B, K, W), Tensor(BOOL, (B, K, W)), floats(B, K), None, None]
        for attributes, message in (
            (["best", bits(1.0), 0, bits(0.0)], "reduction: expected mean"),
            (["bottom", bits(0.0), 0, bits(0.0)], "fraction_bits"),
            (["group", bits(1.0), 0, bits(0.0)], "group: expected 1 or more"),
            (["mean", bits(1.0), 0, bits(1.5)], "alpha_bits"),
        ):
            done = host.run("LopaBranchConfidence", scores, attributes)
            assert done.returncode == 2
            assert message in done.stderr


@pytest.mark.parametrize("layout", ["BSND", "BNSD"])
@pytest.mark.parametrize("paged", [True, False])
def test_attention(host: Host, paged: bool, layout: str) -> None:
    page, pages, table = 64, 30, int32(B, 8)
    capacity = page if paged else S
    first = pages if paged else B
    heads_first = layout == "BNSD"
    cache = rows(first, HK, capacity, D) if heads_first else rows(first, capacity, HK, D)
    q, window = rows(B, K, W, HQ, D), rows(B, K, W, HK, D)
    inputs = [q, cache, cache, window, window, int32(B), int32(B, K), int32(B)]
    outputs, plan = host(
        "LopaBranchAttention",
        [*inputs, table if paged else None],
        ["block_causal", 4, 0.25, layout],
    )
    assert outputs == [q, floats(B, K, HQ, W)]
    expected = emulator.module().branch_attention_tiling(
        batch=B, branches=K, window=W, query_heads=HQ, kv_heads=HK, head_dim=D, capacity=capacity,
        heads_first=heads_first, table_pages=8 if paged else 0, pages=pages if paged else 0,
        block_size=4, block_causal=True, scale=0.25, cores=20,
    )  # fmt: skip
    workspace = LIBRARY + expected["workspace"]
    assert plan == (expected["cores"], True, workspace, expected["data"])
