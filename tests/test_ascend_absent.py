"""Backend "ascend" on a machine without an NPU: absent, with the reason, and never a substitute."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lopa_kernels as lk
from lopa_kernels import _dispatch
from lopa_kernels.ascend import register_converters

PACKAGE = Path(lk.__file__).parent

without_torch_npu = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed"
)

CODE = """
import sys
{before}
from lopa_kernels import _dispatch
print(_dispatch.why_absent("ascend"))
for ask in ("ascend", None):
    try:
        _dispatch.implementation("lopa_step", "npu", ask)
    except RuntimeError as error:
        print(error)
"""


def absent(where: Path, before: str = "") -> list[str]:
    """What a process of its own says, with the package and torch_npu from `where`."""
    # A torch_npu on the path would be imported by `import torch` too.
    environment = {
        **os.environ,
        "PYTHONPATH": str(where),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "LOPA_BACKEND": "auto",
    }
    code = CODE.format(before=before)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=where, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@without_torch_npu
def test_the_reason_and_the_requests_that_raise_it() -> None:
    reason = "the package torch_npu is not installed"
    assert _dispatch.why_absent("ascend") == reason
    assert _dispatch.of_device("npu") == ("ascend",)
    with pytest.raises(RuntimeError, match=f"lopa_step: backend 'ascend' is missing: {reason}"):
        _dispatch.implementation("lopa_step", "npu", "ascend")
    with pytest.raises(
        RuntimeError, match=f"lopa_step: no backend for device type 'npu'; ascend: {reason}"
    ):
        _dispatch.implementation("lopa_step", "npu")


@without_torch_npu
def test_converters_say_what_they_need() -> None:
    with pytest.raises(ImportError, match="register_converters needs torchair, which comes with"):
        register_converters()


def test_tensors_of_another_device() -> None:
    with pytest.raises(RuntimeError, match="'ascend' does not run on device type 'cpu'"):
        lk.token_confidence(torch.zeros(1, 2), backend="ascend")
    with lk.use_backend("ascend"), pytest.raises(RuntimeError, match="'ascend' does not run"):
        lk.token_confidence(torch.zeros(1, 2))


@pytest.fixture(scope="module")
def pretended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package beside a torch_npu that has nothing in it."""
    where = tmp_path_factory.mktemp("pretended")
    ignored = shutil.ignore_patterns("liblopa_cuda.so", "liblopa_ascend.so", "__pycache__")
    shutil.copytree(PACKAGE, where / "lopa_kernels", ignore=ignored)
    (where / "torch_npu").mkdir()
    (where / "torch_npu" / "__init__.py").write_text("")
    return where


@pytest.mark.parametrize(
    ("before", "library", "reason"),
    [
        ("", None, "torch_npu is not imported: import it before lopa_kernels"),
        ("import torch_npu", None, "liblopa_ascend.so is not in the package: build ascend_ops"),
        ("import torch_npu", b"not a library", "liblopa_ascend.so does not load: "),
    ],
    ids=["not imported", "not built", "does not load"],
)
def test_reasons_beside_torch_npu(
    pretended: Path, before: str, library: bytes | None, reason: str
) -> None:
    path = pretended / "lopa_kernels" / "liblopa_ascend.so"
    path.unlink(missing_ok=True)
    if library is not None:
        path.write_bytes(library)
    why, named, automatic = absent(pretended, before)
    assert why.startswith(reason)
    assert named.startswith(f"lopa_step: backend 'ascend' is missing: {reason}")
    assert f"ascend: {reason}" in automatic
