"""The environment report, with the native library and without, and where its facts are written."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import lopa_kernels
from lopa_kernels import _dispatch, collect_env

ROOT = Path(__file__).parent.parent
PACKAGE = Path(lopa_kernels.__file__).parent


def run(where: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, importing the package from `where`."""
    environment = {**os.environ, "PYTHONPATH": str(where), **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=where, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module", params=["not built", "does not load"])
def without_library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A directory with a package whose library is missing or broken, and what the reason says."""
    where = tmp_path_factory.mktemp("package")
    package = where / "lopa_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if request.param == "does not load":
        (package / "liblopa_cpu.so").write_bytes(b"not a library")
        return where, "liblopa_cpu.so does not load: "
    return where, "liblopa_cpu.so is not in the package: it was not built"


def test_main_names_versions_devices_and_backends() -> None:
    result = run(PACKAGE.parent, "-m", "lopa_kernels")
    assert result.returncode == 0, result.stderr
    lines = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()]
    assert ["lopa_kernels", lopa_kernels.__version__] in lines
    assert ["torch", torch.__version__] in lines
    assert ["cpu kernels", torch.ops.lopa.cpu_isa()] in lines
    assert _dispatch.BACKENDS == ("cpu", "cuda", "triton", "ascend", "reference")
    for name in _dispatch.BACKENDS:
        reason = _dispatch.why_absent(name)
        assert [name, "present" if reason is None else f"absent: {reason}"] in lines


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_main_says_why_a_cpu_has_no_gpu_backends() -> None:
    result = run(PACKAGE.parent, "-m", "lopa_kernels", TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr
    text = re.sub(r" {2,}", "  ", result.stdout)
    assert f"  cuda  absent: torch {torch.__version__} is built without CUDA" in text
    if importlib.util.find_spec("triton") is None:
        assert "  triton  absent: the package triton is not installed" in text
        return
    assert (
        f"  triton  absent: torch {torch.__version__} has no GPU, and TRITON_INTERPRET is not set"
        in text
    )
    interpreted = run(PACKAGE.parent, "-m", "lopa_kernels", TRITON_INTERPRET="1")
    assert interpreted.returncode == 0, interpreted.stderr
    assert re.search(r"^  triton +present$", interpreted.stdout, re.MULTILINE)
    assert re.search(r"^  TRITON_INTERPRET +1  ", interpreted.stdout, re.MULTILINE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_main_names_the_gpu_and_what_serves_it() -> None:
    result = run(PACKAGE.parent, "-m", "lopa_kernels")
    assert result.returncode == 0, result.stderr
    present = [name for name in ("cuda", "triton") if _dispatch.why_absent(name) is None]
    line = re.escape(f"{torch.cuda.get_device_name(0)} ({', '.join(present) or 'none'})")
    assert re.search(rf"^  cuda:0 +{line}$", result.stdout, re.MULTILINE)


def test_main_shows_variables_as_set() -> None:
    result = run(
        PACKAGE.parent, "-m", "lopa_kernels", LOPA_CPU_ISA="portable", LOPA_BACKEND="reference"
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"^  cpu kernels +portable$", result.stdout, re.MULTILINE)
    assert re.search(r"^  LOPA_CPU_ISA +portable  ", result.stdout, re.MULTILINE)
    assert "Backends (default: reference)" in result.stdout


def test_main_survives_an_unknown_isa() -> None:
    result = run(PACKAGE.parent, "-m", "lopa_kernels", LOPA_CPU_ISA="sse9")
    assert result.returncode == 0, result.stderr
    assert "none: LOPA_CPU_ISA: expected portable, avx2 or avx512, got sse9" in result.stdout


def test_report_has_what_a_bug_report_needs() -> None:
    result = run(PACKAGE.parent, "-m", "lopa_kernels.collect_env")
    assert result.returncode == 0, result.stderr
    for name in ("liblopa_cpu.so", "liblopa_cuda.so", "liblopa_ascend.so"):
        library = PACKAGE / name
        size = f"{library.stat().st_size} bytes" if library.exists() else "absent"
        assert re.search(rf"{re.escape(str(library))} +{size}$", result.stdout, re.MULTILINE)
    for wanted in ("GCC version", "CMake version", "OS:", "PyTorch built with", "ATen/Parallel"):
        assert wanted in result.stdout


@pytest.mark.parametrize("module", ["lopa_kernels", "lopa_kernels.collect_env"])
def test_reports_work_without_the_library(without_library: tuple[Path, str], module: str) -> None:
    where, reason = without_library
    result = run(where, "-m", module)
    assert result.returncode == 0, result.stderr
    reasons = dict.fromkeys(_dispatch.BACKENDS, reason)
    reasons["cuda"] = "the schemas are in liblopa_cpu.so, which is not loaded"
    reasons["ascend"] = reasons["cuda"]
    reasons["triton"] = _dispatch.why_absent("triton") or reason
    for name, why in reasons.items():
        assert re.search(rf"^  {name} +absent: {re.escape(why)}", result.stdout, re.MULTILINE)
    assert "none: the library is not loaded" in result.stdout


USES = """
import importlib
import lopa_kernels

for use in (
    lambda: lopa_kernels.lopa_step,
    lambda: exec("from lopa_kernels import LopaConfig"),
    lambda: importlib.import_module("lopa_kernels.ops.confidence"),
):
    try:
        use()
    except ImportError as error:
        print(error)
print(hasattr(lopa_kernels, "no_such_name"))
"""


def test_use_without_the_library_says_what_to_do(without_library: tuple[Path, str]) -> None:
    where, reason = without_library
    result = run(where, "-c", USES)
    assert result.returncode == 0, result.stderr
    *errors, unknown = result.stdout.splitlines()
    assert len(errors) == 3
    for error in errors:
        assert error.startswith(f"lopa_kernels: {reason}")
        assert "pip install --no-build-isolation ." in error
    assert unknown == "False"


def test_unknown_backend_in_the_environment_is_named() -> None:
    result = run(PACKAGE.parent, "-c", "import lopa_kernels", LOPA_BACKEND="gpu")
    assert "ValueError: LOPA_BACKEND: expected one of auto" in result.stderr


def test_version_is_the_project_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert lopa_kernels.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_variables_are_in_the_table_and_in_the_readme() -> None:
    sources = [*PACKAGE.rglob("*.py"), *ROOT.glob("csrc/**/*.*"), ROOT / "setup.py"]
    read = set()
    for source in sources:
        read |= set(re.findall(r"(?:environ\S*|getenv)\(\"(\w+)\"", source.read_text()))
    assert {"LOPA_BACKEND", "LOPA_CPU_ISA", "MAX_JOBS"} <= read
    # What torchrun tells its processes is nobody's setting.
    assert read - {"TORCHELASTIC_USE_AGENT_STORE"} <= set(collect_env.VARIABLES)
    readme = (ROOT / "README.md").read_text()
    for name, meaning in collect_env.VARIABLES.items():
        assert f"| `{name}` | {meaning} |" in readme
