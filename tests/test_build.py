"""The build: what it compiles, what it compiles again, and what it says where a compiler is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)

needs_build_tools = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")


def csrc() -> list[Path]:
    return [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu")]


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``setup.py build_ext --inplace`` on a copy of the sources."""
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def compiled(done: subprocess.CompletedProcess[str]) -> set[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"\[\d+/\d+\] (\S+\.o)$", done.stdout, re.M))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What setup.py needs, with CPU kernels so small that they compile in a second."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    if (ROOT / "README.md").exists():
        shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "fastattn").mkdir()
    (tmp_path / "fastattn" / "__init__.py").touch()
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    for name in ("params.h", "check.h", "bindings.cpp", "cpu/attention.h"):
        shutil.copy(ROOT / "csrc" / name, tmp_path / "csrc" / name)
    (tmp_path / "csrc" / "cpu" / "attention.cpp").write_text(
        (ROOT / "tests" / "cuda_emulation" / "module.cpp").read_text()
    )
    for name in ("threads", "kernels"):
        (tmp_path / "csrc" / "cpu" / f"{name}.cpp").write_text('#include "cpu/attention.h"\n')
    return tmp_path


def test_csrc_knows_no_torch() -> None:
    for path in csrc():
        for header in INCLUDE.findall(path.read_text()):
            assert not header.startswith(("torch/", "ATen/", "c10/")), f"{path.name} includes {header}"
            assert "pybind11" not in header or path.name == "bindings.cpp", f"{path.name} includes {header}"


@needs_build_tools
@pytest.mark.slow
def test_builds_only_what_changed(project: Path) -> None:
    pytest.importorskip("pybind11")
    first = compiled(build(project, FASTATTN_CUDA="0"))
    assert {"bindings.o", "cpu-attention.o", "cpu-kernels-portable.o"} <= first
    assert list((project / "fastattn").glob("_C.*.so"))
    assert compiled(build(project, FASTATTN_CUDA="0")) == set()
    os.utime(project / "csrc" / "cpu" / "threads.cpp")
    assert compiled(build(project, FASTATTN_CUDA="0")) == {"cpu-threads.o"}
    os.utime(project / "csrc" / "check.h")
    assert compiled(build(project, FASTATTN_CUDA="0")) == {"bindings.o", "cpu-attention.o"}


def test_without_a_compiler_it_says_so_and_builds_no_extension(project: Path) -> None:
    done = build(project, FASTATTN_CPU="0")
    assert done.returncode == 0, done.stderr
    assert "WARNING: FASTATTN_CPU=0: no compiled kernels" in done.stderr
    done = build(project, PATH="/nonexistent", CXX="")
    assert done.returncode == 0, done.stderr
    assert "WARNING: no C++ compiler was found" in done.stderr
    assert not list((project / "fastattn").glob("_C.*"))


def setup_py(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` with the functions of setup.py in ``build``, in a process of its own."""
    prelude = "import setuptools; setuptools.setup = lambda **_: None; import setup as build; "
    return subprocess.run(
        [sys.executable, "-c", prelude + code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_asking_for_cuda_without_a_cuda_compiler_fails_clearly() -> None:
    done = setup_py("build.nvcc_candidates = lambda: []; build.find_nvcc()", FASTATTN_CUDA="1")
    assert done.returncode != 0
    assert "FASTATTN_CUDA=1, but no nvcc was found" in done.stderr
    done = setup_py("build.nvcc_candidates = lambda: []; print(build.find_nvcc())", FASTATTN_CUDA="")
    assert done.stdout.strip() == "None"


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"FASTATTN_CUDA": "off"}, "FASTATTN_CUDA must be 0, 1 or unset, got 'off'"),
        ({"FASTATTN_CPU": "no"}, "FASTATTN_CPU must be 0, 1 or unset, got 'no'"),
        ({"FASTATTN_CPU": "0", "FASTATTN_CUDA": "1"}, "FASTATTN_CUDA=1 asks for CUDA kernels, but FASTATTN_CPU=0"),
        ({"PATH": "/nonexistent", "CXX": "", "FASTATTN_CUDA": "1"}, "but no C++ compiler was found"),
        ({"CXX": "no-such-compiler -m64"}, "CXX is 'no-such-compiler -m64', but there is no program no-such-compiler"),
    ],
)
def test_what_cannot_be_meant_is_refused(environment: dict[str, str], message: str) -> None:
    done = setup_py("build.find_nvcc()", **{"FASTATTN_CPU": "", "FASTATTN_CUDA": "", **environment})
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler on this machine")
@pytest.mark.parametrize("arch", ["12345", "75", "8.0", "sm_90", "native"])
def test_an_architecture_that_nvcc_or_the_kernels_do_not_know_is_refused(arch: str) -> None:
    done = setup_py("build.find_nvcc()", FASTATTN_CUDA="1", FASTATTN_CUDA_ARCHS=f"80;{arch}")
    assert done.returncode != 0
    assert f"cannot build for {arch}" in done.stderr


@needs_build_tools
def test_a_compiler_that_knows_no_amx_builds_the_rest(tmp_path: Path) -> None:
    """As GCC before version 11: the unit is left out, and attention.cpp is told so."""
    pytest.importorskip("pybind11")
    old = tmp_path / "c++"
    old.write_text('#!/bin/sh\ncase "$*" in *-mamx*) echo unrecognized >&2; exit 1;; esac\nexec c++ "$@"\n')
    old.chmod(0o755)
    code = "print(build.ninja_file(build.find_cxx(), None, '_C.so'))"
    texts = {}
    for name, compiler in (("old", str(old)), ("new", "c++")):
        done = setup_py(code, CXX=compiler)
        assert done.returncode == 0, done.stderr
        texts[name] = done.stdout
        assert ("knows no amx" in done.stderr) == ("cpu-kernels-amx.o" not in done.stdout)
        assert ("-DFASTATTN_WITH_AMX" in done.stdout) == ("cpu-kernels-amx.o" in done.stdout)
    assert "cpu-kernels-portable.o" in texts["old"] and "amx" not in texts["old"].lower()
    for isa in ("avx512", "avx512_bf16"):
        assert texts["old"].count(f"cpu-kernels-{isa}.o") == texts["new"].count(f"cpu-kernels-{isa}.o")


def test_every_source_is_built() -> None:
    """Each .cpp and .cu of csrc stands in setup.py's lists, and each listed one exists."""
    done = setup_py("print(*{x.path for x in build.cpu_sources() + build.cuda_sources()}, sep='\\n')")
    listed = {*done.stdout.split(), "csrc/bindings.cpp"}
    assert listed == {p.relative_to(ROOT).as_posix() for p in csrc() if p.suffix != ".h"}
