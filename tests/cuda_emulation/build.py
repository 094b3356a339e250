"""Compiles the CUDA kernels as ordinary C++ against the headers of this folder, into a module like ``fastattn._C``."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# -O1: the kernels' loops are unrolled by their pragmas for nvcc only; more optimisation costs more than it saves.
FLAGS = f"-O1 -std=c++17 -fPIC -fvisibility=hidden -Wno-unknown-pragmas -I{HERE} -I{{csrc}}"
BINDINGS = (
    f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']} "
    r"-DFASTATTN_WITH_CUDA -DFASTATTN_CUDA_ARCHS=\"80\""
)
RULES = """\
rule cxx
  command = c++ $flags -MMD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = c++ -shared $in -o $out
"""


def _setup() -> Any:
    """setup.py as a module: it knows what is compiled, and for which element types and head dimensions."""
    spec = importlib.util.spec_from_file_location("fastattn_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module


def sources(csrc: Path = ROOT / "csrc", keep: str = "") -> dict[str, tuple[str, str]]:
    """Object name -> (source, flags); of the kernels only those whose object's name matches ``keep``."""
    probes = () if keep else sorted((HERE / "probes").glob("*.cu"))
    found = {
        "module.o": (f"{HERE}/module.cpp", ""),
        **{f"probes-{path.stem}.o": (str(path), "") for path in probes},
        **{f"emulator-{path.stem}.o": (str(path), "-O2") for path in sorted((HERE / "emulator").glob("*.cpp"))},
        "bindings.o": (f"{csrc}/bindings.cpp", BINDINGS),
    }
    for source in _setup().cuda_sources():
        if source.path.endswith(("attention.cu", "dispatch.cu", "dispatch_fp8.cu")) or re.search(keep, source.object):
            defines = " ".join(f"-D{name}={value}" for name, value in source.defines.items())
            path = f"{csrc}/{source.path.removeprefix('csrc/')}"
            found[source.object] = (path, " ".join([defines, *source.flags]))
    return found


def build(
    folder: Path, csrc: Path = ROOT / "csrc", keep: str = "", more_flags: str = "", more_sources: tuple[Path, ...] = ()
) -> Path:
    """Compiles what has changed into ``folder/_C.so``; RuntimeError where something does not compile.

    ``more_flags``: of the objects of ``csrc/cuda``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    objects = sources(csrc, keep) | {f"{path.stem}.o": (str(path), "") for path in more_sources}
    lines = [RULES]
    for name, (source, extra) in objects.items():
        more = more_flags if name.startswith("cuda-") else ""
        lines.append(f"build {name}: cxx {source}\n  flags = {FLAGS.format(csrc=csrc)} {more} {extra}")
    lines += [f"build _C.so: link {' '.join(objects)}"]
    text = "\n".join(lines) + "\n"
    ninja_file = folder / "build.ninja"
    if not ninja_file.exists() or ninja_file.read_text() != text:
        ninja_file.write_text(text)
    ninja = [sys.executable, "-m", "ninja", "-k", "0", "-C", str(folder)]
    done = subprocess.run(ninja, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the CUDA emulation does not compile:\n{done.stdout}{done.stderr}")
    return folder / "_C.so"


def load(path: Path | None = None) -> ModuleType:
    """Imports a built module; without a path, that of this tree, built first."""
    path = path or build(ROOT / "build" / f"cuda-emulation-{sys.implementation.cache_tag}")
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
