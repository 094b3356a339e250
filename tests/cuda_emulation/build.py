"""Compiles the CUDA kernels as ordinary C++ against the headers of this folder, into a module like ``fastattn._C``."""

from __future__ import annotations

import importlib.util
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
FLAGS = f"-O1 -std=c++17 -fPIC -fvisibility=hidden -Wno-unknown-pragmas -I{HERE} -I{ROOT / 'csrc'}"
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


def sources() -> dict[str, tuple[str, str]]:
    """Object name -> (source, flags)."""
    found = {
        "module.o": (f"{HERE}/module.cpp", ""),
        **{f"probes-{path.stem}.o": (str(path), "") for path in sorted((HERE / "probes").glob("*.cu"))},
        **{f"emulator-{path.stem}.o": (str(path), "-O2") for path in sorted((HERE / "emulator").glob("*.cpp"))},
        "bindings.o": (f"{ROOT}/csrc/bindings.cpp", BINDINGS),
    }
    for source in _setup().cuda_sources():
        defines = " ".join(f"-D{name}={value}" for name, value in source.defines.items())
        found[source.object] = (f"{ROOT}/{source.path}", defines)
    return found


def load() -> ModuleType:
    """Builds what has changed, with ninja, and imports it."""
    folder = ROOT / "build" / f"cuda-emulation-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    objects = sources()
    lines = [RULES]
    lines += [f"build {name}: cxx {source}\n  flags = {FLAGS} {extra}" for name, (source, extra) in objects.items()]
    lines += [f"build _C.so: link {' '.join(objects)}"]
    text = "\n".join(lines) + "\n"
    ninja_file = folder / "build.ninja"
    if not ninja_file.exists() or ninja_file.read_text() != text:
        ninja_file.write_text(text)
    done = subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the CUDA emulation does not compile:\n{done.stdout}{done.stderr}")
    spec = importlib.util.spec_from_file_location("_C", folder / "_C.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
