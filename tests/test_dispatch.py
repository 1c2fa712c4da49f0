"""Which backend runs an operator: by device, as asked, or an error that says why not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from operators import registered
from targets import GPU_TARGETS, KERNELS

import lopa_kernels as lk
from lopa_kernels import _dispatch, _load

PACKAGE = Path(lk.__file__).parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Its interpreter takes an array of one element for an index, which NumPy 2.5 refuses.
OLD_INTERPRETER = HAS_TRITON and importlib.metadata.version("triton") < "3.7"
LOGITS = torch.tensor([[0.5, 2.0, 1.0]])


def python(code: str, where: Path = PACKAGE.parent, **variables: str) -> str:
    """What a process of its own prints; it has to succeed."""
    environment = {**os.environ, "PYTHONPATH": str(where), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=where, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Backends that are all present and have no operator yet."""
    table: dict[str, dict[str, Any]] = {name: {} for name in _dispatch.BACKENDS}
    monkeypatch.setattr(_dispatch, "_implementations", table)
    monkeypatch.setattr(_dispatch, "_why_no_triton", lambda: None)
    monkeypatch.setattr(_load, "missing", {})
    return table


class TestAuto:
    def test_cpu_tensors_take_the_cpu(self) -> None:
        assert _dispatch.of_device("cpu") == ("cpu",)
        native = torch.ops.lopa.token_confidence.default
        assert _dispatch.implementation("token_confidence", "cpu") is native
        assert _dispatch.implementation("token_confidence", "cpu", "auto") is native
        assert lk.token_confidence(LOGITS).token.item() == 1

    def test_gpu_tensors_take_cuda_then_triton(self, made_up: dict[str, dict[str, Any]]) -> None:
        assert _dispatch.of_device("cuda") == ("cuda", "triton")
        assert _dispatch.of_device("xpu") == ("triton",)
        made_up["triton"] = {"both": "triton's", "one": "triton's"}
        made_up["cuda"] = {"both": "cuda's"}
        made_up["reference"] = {"none": "reference's"}
        assert _dispatch.implementation("both", "cuda") == "cuda's"
        assert _dispatch.implementation("both", "xpu") == "triton's"
        assert _dispatch.implementation("one", "cuda") == "triton's"
        assert _dispatch.implementation("both", "cuda", "triton") == "triton's"
        with pytest.raises(RuntimeError) as raised:
            _dispatch.implementation("none", "cuda")
        assert str(raised.value) == (
            "none: no backend for device type 'cuda'; cuda: backend 'cuda' has no none; "
            "triton: backend 'triton' has no none; "
            "backend='reference' runs the PyTorch reference there"
        )

    def test_reasons_of_all_candidates_are_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        table: dict[str, dict[str, Any]] = {name: {} for name in _dispatch.BACKENDS}
        monkeypatch.setattr(_dispatch, "_implementations", table)
        monkeypatch.setattr(_dispatch, "_why_no_triton", lambda: "no Triton today")
        monkeypatch.setattr(_load, "missing", {"lopa_cuda": "liblopa_cuda.so went away"})
        with pytest.raises(RuntimeError) as raised:
            _dispatch.implementation("lopa_step", "cuda")
        assert "; cuda: liblopa_cuda.so went away; triton: no Triton today;" in str(raised.value)

    def test_the_reference_is_never_a_substitute(self) -> None:
        meta = LOGITS.to("meta")
        with pytest.raises(RuntimeError, match="no backend for device type 'meta'"):
            lk.token_confidence(meta)
        assert lk.token_confidence(LOGITS, backend="reference").token.item() == 1


class TestNamed:
    def test_unknown_names(self) -> None:
        names = "expected one of auto, cpu, cuda, triton, ascend, reference, got 'gpu'"
        with pytest.raises(ValueError, match=f"backend: {names}"):
            lk.token_confidence(LOGITS, backend="gpu")
        with pytest.raises(ValueError, match=f"set_backend: {names}"):
            lk.set_backend("gpu")
        with pytest.raises(ValueError, match=f"set_backend: {names}"), lk.use_backend("gpu"):
            raise AssertionError("entered")
        assert lk.get_backend() == os.environ.get("LOPA_BACKEND", "auto")

    @pytest.mark.parametrize("backend", ["cuda", "triton", "ascend"])
    def test_a_backend_of_another_device(self, backend: str) -> None:
        if backend == "triton" and _dispatch.interpreted():
            pytest.skip("the interpreter runs on the CPU")
        with pytest.raises(
            RuntimeError,
            match=f"token_confidence: backend '{backend}' does not run on device type 'cpu'",
        ):
            lk.token_confidence(LOGITS, backend=backend)

    def test_a_missing_backend_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        table: dict[str, dict[str, Any]] = {name: {} for name in _dispatch.BACKENDS}
        monkeypatch.setattr(_dispatch, "_implementations", table)
        monkeypatch.setattr(_dispatch, "_why_no_triton", lambda: "no Triton today")
        monkeypatch.setattr(_load, "missing", {"lopa_cuda": "liblopa_cuda.so went away"})
        for backend, reason in (("cuda", "liblopa_cuda.so went away"), ("triton", "no Triton")):
            with pytest.raises(
                RuntimeError, match=f"lopa_step: backend '{backend}' is missing: {reason}"
            ):
                _dispatch.implementation("lopa_step", "cuda", backend)
        assert _dispatch.why_absent("cpu") is None
        assert _dispatch.why_absent("reference") is None

    def test_an_operator_that_a_backend_lacks(self, made_up: dict[str, dict[str, Any]]) -> None:
        made_up["triton"]["other"] = "triton's"
        assert _dispatch.why_absent("cuda", "other") == "backend 'cuda' has no other"
        with pytest.raises(RuntimeError, match="backend 'cuda' is missing: backend 'cuda' has no"):
            _dispatch.implementation("other", "cuda", "cuda")

    def test_default_of_the_process(self) -> None:
        before = lk.get_backend()
        with lk.use_backend("reference"):
            assert lk.get_backend() == "reference"
            with lk.use_backend("cpu"):
                assert lk.get_backend() == "cpu"
            assert lk.get_backend() == "reference"
            with pytest.raises(KeyError), lk.use_backend("auto"):
                raise KeyError
            assert lk.get_backend() == "reference"
            chosen = _dispatch.implementation("token_confidence", "cpu")
            assert chosen is _dispatch._implementations["reference"]["token_confidence"]
            named = _dispatch.implementation("token_confidence", "cpu", "cpu")
            assert named is torch.ops.lopa.token_confidence.default
        assert lk.get_backend() == before

    def test_default_from_the_environment(self) -> None:
        code = "import lopa_kernels; print(lopa_kernels.get_backend())"
        assert python(code, LOPA_BACKEND="triton").strip() == "triton"
        use = (
            "import torch, lopa_kernels as lk\n"
            "try: lk.token_confidence(torch.zeros(1, 2))\n"
            "except RuntimeError as error: print(error)"
        )
        printed = python(use, LOPA_BACKEND="cuda")
        assert "backend 'cuda' does not run on device type 'cpu'" in printed


class TestWhyAbsent:
    def test_without_cuda(self) -> None:
        if torch.version.cuda is not None:
            pytest.skip("torch has CUDA")
        reason = f"torch {torch.__version__} is built without CUDA"
        assert _dispatch.why_absent("cuda") == reason
        with pytest.raises(RuntimeError, match="backend 'cuda' is missing: torch .* without CUDA"):
            _dispatch.implementation("lopa_step", "cuda", "cuda")

    def test_without_the_package_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
        )
        assert _dispatch.why_absent("triton") == "the package triton is not installed"

    @pytest.mark.skipif(torch.cuda.is_available() or not HAS_TRITON, reason="needs Triton, no GPU")
    def test_triton_without_a_gpu(self) -> None:
        code = "from lopa_kernels import _dispatch; print(_dispatch.why_absent('triton'))"
        expected = f"torch {torch.__version__} has no GPU, and TRITON_INTERPRET is not set"
        assert python(code, TRITON_INTERPRET="0").strip() == expected
        assert python(code, TRITON_INTERPRET="1").strip() == "None"

    def test_a_library_that_was_not_built(self, tmp_path: Path) -> None:
        if torch.version.cuda is None:
            pytest.skip("torch has no CUDA, which is said first")
        without = tmp_path / "lopa_kernels"
        ignored = shutil.ignore_patterns("liblopa_cuda.so", "__pycache__")
        shutil.copytree(PACKAGE, without, ignore=ignored)
        code = "from lopa_kernels import _dispatch; print(_dispatch.why_absent('cuda'))"
        expected = "liblopa_cuda.so is not in the package: it was not built"
        assert python(code, tmp_path).strip() == expected
        (without / "liblopa_cuda.so").write_bytes(b"not a library")
        assert "liblopa_cuda.so does not load: " in python(code, tmp_path)


def test_a_registered_function_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = _dispatch._implementations["cpu"]
    monkeypatch.setitem(operators, "token_confidence", operators["token_confidence"])

    @_dispatch.implements("token_confidence", "cpu")
    def mine(logits: torch.Tensor, *rest: object) -> tuple[torch.Tensor, ...]:
        return torch.tensor([7]), torch.tensor([0.5]), torch.tensor([0.25])

    assert lk.token_confidence(LOGITS).token.item() == 7
    assert lk.token_confidence(LOGITS, backend="reference").token.item() == 1


class TestFallback:
    """torch.ops.lopa.* of a device that no native library serves are Triton's."""

    CODE = """
import torch
import lopa_kernels
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = sorted(
    name.partition("::")[2]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("lopa_triton::")
)
for name in names:
    keys = [key for key in ("CPU", "CUDA", "XPU") if has(f"lopa::{name}", key)]
    print(name, *keys)
"""

    @pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
    def test_registration(self) -> None:
        printed = [line.split() for line in python(self.CODE, TRITON_INTERPRET="1").splitlines()]
        found = {name: keys for name, *keys in printed}
        assert set(found) == registered("lopa") - {"cpu_isa"}
        assert all(keys == ["CPU", "CUDA", "XPU"] for keys in found.values()), found

    @pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
    @pytest.mark.skipif(OLD_INTERPRETER, reason="needs the interpreter of Triton 3.7 or later")
    def test_the_interpreter_leaves_the_cpu_s_operators_alone(self) -> None:
        code = """
import torch
import lopa_kernels as lk
logits = torch.tensor([[0.5, 2.0, 1.0]])
def refuse(*_, **__):
    raise AssertionError("Triton ran")
lk._dispatch._implementations["triton"]["token_confidence"] = refuse
print(lk.token_confidence(logits).token.item())
print(torch.ops.lopa.token_confidence(logits)[0].item())
print(torch.ops.lopa_triton.token_confidence(logits)[0].item())
"""
        assert python(code, TRITON_INTERPRET="1").split() == ["1", "1", "1"]

    @pytest.mark.skipif(not GPU_TARGETS, reason="needs a GPU")
    def test_without_the_cuda_library(self, tmp_path: Path) -> None:
        ignored = shutil.ignore_patterns("liblopa_cuda.so", "__pycache__")
        shutil.copytree(PACKAGE, tmp_path / "lopa_kernels", ignore=ignored)
        code = """
import torch
import lopa_kernels as lk
logits = torch.tensor([[0.5, 2.0, 1.0]], device="cuda")
print(lk.token_confidence(logits).token.item())
print(torch.ops.lopa.token_confidence(logits)[0].item())
try: lk.token_confidence(logits, backend="cuda")
except RuntimeError as error: print(error)
"""
        auto, op, *error = python(code, tmp_path).splitlines()
        assert auto == op == "1"
        assert "backend 'cuda' is missing: liblopa_cuda.so is not in the package" in error[0]

    @pytest.mark.skipif(
        not any(target.backend == "cuda" for target in KERNELS), reason="needs the CUDA library"
    )
    def test_native_kernels_come_first(self) -> None:
        native = torch.ops.lopa.token_confidence.default
        assert _dispatch.implementation("token_confidence", "cuda") is native
        assert _dispatch._implementations["cuda"].keys() >= registered("lopa_triton")
