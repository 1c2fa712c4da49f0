"""Builds the native libraries with CMake and places them inside the package."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def torch_dir() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(
            "lopa_kernels is built against an installed torch (>= 2.11) and found none.\n"
            "Install torch first, then: pip install --no-build-isolation ."
        )
    return Path(spec.origin).parent


def nvcc() -> str:
    """The CUDA compiler, or "" for a build without the CUDA library.

    $LOPA_CUDA is 0 (never), 1 (an error where there is no compiler) or unset (where there is one).
    """
    wanted = os.environ.get("LOPA_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"LOPA_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return ""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin") or ""
    if wanted == "1" and not found:
        sys.exit("LOPA_CUDA=1, and no nvcc on PATH or in CUDA_HOME")
    return found


class CMakeBuild(build_ext):
    """One CMake build for all libraries; they are plain shared objects, not Python modules."""

    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"cmake-{sys.platform}"
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DLOPA_TORCH_DIR={torch_dir()}",
            f"-DLOPA_OUTPUT_DIR={build / 'lib'}",
            f"-DLOPA_NVCC={nvcc()}",
        ]
        if "LOPA_CUDA_ARCHS" in os.environ:
            configure.append(f"-DLOPA_CUDA_ARCHS={os.environ['LOPA_CUDA_ARCHS']}")
        cache = build / "CMakeCache.txt"
        ninja = shutil.which("ninja")
        if ninja and (not cache.exists() or "CMAKE_GENERATOR:INTERNAL=Ninja" in cache.read_text()):
            # An old cache may name the ninja of an environment that is gone.
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)
        target = package / "lopa_kernels"
        target.mkdir(parents=True, exist_ok=True)
        for library in (build / "lib").glob("liblopa_*.so"):
            # A new inode: a process that has the old library mapped keeps it.
            temporary = target / (library.name + ".tmp")
            shutil.copy2(library, temporary)
            temporary.replace(target / library.name)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "lopa_kernels"
        return [str(library) for library in package.glob("liblopa_*.so")]


class PlatformWheel(bdist_wheel):
    """The stable ABI makes one wheel for every Python 3 of a platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(
    ext_modules=[Extension("lopa_kernels.liblopa_cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
