"""The package of custom operators: its CMake project, with recorders for CANN's functions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ascend_ops import emulator

ASCEND_OPS = Path(emulator.SOURCE).parent

#: stands for CANN's module: writes down how each function is called
RECORDER = """
set(ASCEND_AUTOGEN_PATH ${CMAKE_BINARY_DIR}/autogen)
foreach(name npu_op_package npu_op_code_gen npu_op_library npu_op_kernel_sources
             npu_op_kernel_library npu_op_package_add)
  cmake_language(EVAL CODE "
    function(${name})
      file(APPEND \\${CMAKE_BINARY_DIR}/calls \\"${name} \\${ARGV}\\\\n\\")
    endfunction()")
endforeach()
"""


def configure(build: Path, home: str | None) -> subprocess.CompletedProcess[str]:
    cmake = shutil.which("cmake")
    assert cmake is not None
    environment = {k: v for k, v in os.environ.items() if k != "ASCEND_HOME_PATH"}
    if home is not None:
        environment["ASCEND_HOME_PATH"] = home
    return subprocess.run(
        [cmake, "-S", str(ASCEND_OPS), "-B", str(build)],
        env=environment,
        text=True,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The calls of CANN's functions, as lists of words."""
    home = tmp_path_factory.mktemp("cann")
    modules = home / "compiler/tikcpp/ascendc_kernel_cmake"
    modules.mkdir(parents=True)
    (modules / "ASCConfig.cmake").write_text(RECORDER)
    build = tmp_path_factory.mktemp("build")
    done = configure(build, str(home))
    assert done.returncode == 0, done.stdout + done.stderr
    return [re.split("[ ;]", line) for line in (build / "calls").read_text().splitlines()]


def of(calls: list[list[str]], name: str) -> list[list[str]]:
    return [call[1:] for call in calls if call[0] == name]


def test_every_operator_is_packed(calls: list[list[str]]) -> None:
    defined = set()
    for source in ASCEND_OPS.glob("*/op_host/*_def.cpp"):
        defined |= set(re.findall(r"OP_ADD\((\w+)\)", source.read_text()))
    packed = {}
    for target, *words in of(calls, "npu_op_kernel_sources"):
        assert target == "lopa_kernels"
        options = dict(zip(words[::2], words[1::2], strict=True))
        entry = ASCEND_OPS / options["KERNEL_DIR"] / options["KERNEL_FILE"]
        found = re.search(r"__aicore__ void (\w+)\(", entry.read_text())
        assert found is not None
        packed[options["OP_TYPE"]] = found[1]
    assert packed.keys() == defined
    for name, entry in packed.items():
        snake = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
        assert entry == snake


def test_every_kernel_folder_stands_alone(calls: list[list[str]]) -> None:
    """The toolchain compiles, and the package installs, what the folder of the kernel holds."""
    for source in ASCEND_OPS.glob("*/op_kernel/*"):
        for name in re.findall(r'#include "([^"]+)"', source.read_text()):
            assert name == "kernel_operator.h" or (source.parent / name).is_file(), source


def test_host_sources_are_in_every_library(calls: list[list[str]]) -> None:
    sources = {str(path) for path in ASCEND_OPS.glob("*/op_host/*.cpp")}
    (generation,) = of(calls, "npu_op_code_gen")
    assert sources <= set(generation)
    libraries = {words[0]: set(words[2:]) for words in of(calls, "npu_op_library")}
    assert sources <= libraries["cust_optiling"]
    assert sources <= libraries["cust_op_proto"]
    (packed,) = of(calls, "npu_op_package_add")
    assert packed[:2] == ["lopa", "LIBRARY"]
    assert set(packed[2:]) == {*libraries, "lopa_kernels"}


def test_without_a_toolkit(tmp_path: Path) -> None:
    done = configure(tmp_path, None)
    assert done.returncode != 0
    assert "ASCEND_HOME_PATH is not set" in done.stderr
