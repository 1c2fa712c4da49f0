"""The adapters' library, built against torch and torch_npu, beside a package without operators."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ascend_definitions import Definition
from conftest import ELSEWHERE, ROOT

BUILT = ROOT / "build" / "torchair" / "lib" / "liblopa_ascend.so"

CODE = """
import torch
import torch_npu
import lopa_kernels as lk
from lopa_kernels import _dispatch
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("lopa::")]
print(*sorted(n for n in names if not has(n, "PrivateUse1")))
print(*torch.ops.lopa_ascend.missing())
print(_dispatch.why_absent("ascend"))
try:
    _dispatch.implementation("lopa_step", "npu", "ascend")
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    where = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns("liblopa_cuda.so", "__pycache__")
    shutil.copytree(ROOT / "lopa_kernels", where / "lopa_kernels", ignore=ignored)
    shutil.copy(BUILT, where / "lopa_kernels")
    environment = {**os.environ, "PYTHONPATH": str(where)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=where, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-4:]


def test_every_operator_has_a_kernel_for_npus(lines: list[str]) -> None:
    assert set(lines[0].split()) == {f"lopa::{name}" for name in ELSEWHERE}


def test_they_call_the_operators_that_are_defined(
    lines: list[str], definitions: dict[str, Definition]
) -> None:
    assert set(lines[1].split()) == {f"aclnn{name}" for name in definitions}
    sources = [path.read_text() for path in Path(ROOT / "ascend_ops" / "torch").glob("*.cpp")]
    for name in definitions:
        assert (
            sum(f'launch("aclnn{name}"' in text for text in sources)
            + sum(
                f'"aclnn{name}", logits_operand' in path.read_text()
                for path in Path(ROOT / "ascend_ops" / "torch").glob("*.h")
            )
            == 1
        ), name


def test_the_backend_says_what_is_not_installed(lines: list[str]) -> None:
    assert lines[2].startswith("the package of custom operators built from ascend_ops lacks aclnn")
    assert lines[2].endswith("or is not installed (ASCEND_CUSTOM_OPP_PATH)")
    assert lines[3] == f"lopa_step: backend 'ascend' is missing: {lines[2]}"


def test_importable_from_here() -> None:
    assert Path(sys.modules["lopa_kernels"].__file__ or "").parent == ROOT / "lopa_kernels"
