"""Build of ``fastattn._C``: CPU kernels always, CUDA kernels where a CUDA compiler is found. No torch is needed.

Environment:
    FASTATTN_CPU=0            no compiled code at all: Triton and reference kernels only
    FASTATTN_CUDA=0 | 1       leave the CUDA kernels out, or fail without a CUDA compiler (default: build if found)
    FASTATTN_CUDA_ARCHS       architectures, e.g. "80;90" (default: those of DEFAULT_CUDA_ARCHS that nvcc knows)
    FASTATTN_SM90_VARIANTS=1  every variant of the Hopper forward, for timing: see csrc/cuda/sm90/tiles.h
    FASTATTN_SANITIZE         e.g. "address,undefined": host code with these sanitizers
    FASTATTN_JOBS             parallel compilations (default: one per core)
    CXX, CUDA_HOME            compilers
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = (80, 90, 100, 120)

COMPILE_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-pthread"]
# No -ffast-math: NaN and infinity have meaning here. These two only drop errno and traps.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
CPU_ISAS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512_FLAGS,
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16"],
    "amx": [*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


@dataclass(frozen=True)
class Source:
    """One compilation: a source file, what is defined for it, and how its object is called."""

    path: str
    defines: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    hopper: bool = False  #: for sm_90a alone

    @property
    def object(self) -> str:
        parts = [Path(self.path).with_suffix("").as_posix().removeprefix("csrc/").replace("/", "-")]
        return "-".join(parts + [re.sub(r"\W", "", v) for v in self.defines.values()]) + ".o"

    @property
    def is_cuda(self) -> bool:
        return self.path.endswith(".cu")


def cpu_isas(cxx: list[str]) -> dict[str, list[str]]:
    """The instruction sets of this processor's kind that the compiler knows: GCC knows AMX from version 11 on."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"portable": []}
    isas = {}
    for isa, flags in CPU_ISAS.items():
        command = [*cxx, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
        if subprocess.run(command, capture_output=True).returncode == 0:
            isas[isa] = flags
        else:
            say(f"WARNING: {' '.join(cxx)} knows no {isa} ({' '.join(flags)}): the kernels are built without it")
    return isas


def cpu_sources(isas: dict[str, list[str]] = CPU_ISAS) -> list[Source]:
    built = tuple(f"-DFASTATTN_WITH_{isa.upper()}" for isa in isas if isa != "portable")
    return [
        Source("csrc/cpu/attention.cpp", flags=built),
        Source("csrc/cpu/threads.cpp"),
        *(
            Source("csrc/cpu/kernels.cpp", {"FASTATTN_CPU_ISA": isa}, tuple(KERNEL_FLAGS + flags))
            for isa, flags in isas.items()
        ),
    ]


def cuda_sources(hopper: bool = True) -> list[Source]:
    """float32 without tensor cores, 16-bit types with them; what each kernel is for stands in attention.cu."""
    sources = [Source("csrc/cuda/attention.cu", flags=("-DFASTATTN_WITH_SM90",) if hopper else ())]
    for direction in ("forward", "backward"):
        for dim in ("64", "128", "256"):
            sources.append(Source(f"csrc/cuda/simt/{direction}.cu", _defines("float", dim)))
    for dtype in ("Half", "BFloat16"):
        sources.append(Source("csrc/cuda/sm80/prepare.cu", _defines(dtype)))
        for dim in ("32", "64", "96", "128", "192", "256"):
            sources.append(Source("csrc/cuda/sm80/forward.cu", _defines(dtype, dim)))
            for kernel in ("dkdv", "dq"):
                sources.append(Source(f"csrc/cuda/sm80/{kernel}.cu", _defines(dtype, dim, "false")))
        for dim in ("64", "128", "256"):
            sources.append(Source("csrc/cuda/sm80/forward_general.cu", _defines(dtype, dim)))
            for kernel in ("dkdv", "dq"):
                sources.append(Source(f"csrc/cuda/sm80/{kernel}.cu", _defines(dtype, dim, "true")))
    for dtype in ("Half", "BFloat16", "float"):
        sources.append(Source("csrc/cuda/simt/dbias.cu", _defines(dtype)))
    return sources + (hopper_sources() if hopper else [])


def hopper_sources() -> list[Source]:
    timed = ("-DFASTATTN_SM90_VARIANTS",) if os.environ.get("FASTATTN_SM90_VARIANTS") == "1" else ()
    sources = [Source(f"csrc/cuda/sm90/{name}.cu", flags=timed, hopper=True) for name in ("dispatch", "dispatch_fp8")]
    for dim in ("64", "128", "256"):
        sources.append(Source("csrc/cuda/sm90/forward_fp8.cu", _defines("E4M3", dim), timed, hopper=True))
    kernels = {
        "forward": (64, 96, 128, 192, 256),
        "backward": (64, 128, 192, 256),
        "dq": (64, 128, 192, 256),
        "decode": (64, 128, 256),
    }
    for kernel, dims in kernels.items():
        for dtype in ("Half", "BFloat16"):
            for dim in dims:
                sources.append(Source(f"csrc/cuda/sm90/{kernel}.cu", _defines(dtype, str(dim)), timed, hopper=True))
    return sources


def _defines(*values: str) -> dict[str, str]:
    return dict(zip(("FASTATTN_DTYPE", "FASTATTN_HEAD_DIM", "FASTATTN_GENERAL"), values, strict=False))


def say(message: str) -> None:
    print(f"fastattn: {message}", file=sys.stderr, flush=True)


def switch(name: str) -> str:
    """An environment variable that is 0, 1 or not set ("")."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"fastattn: {name} must be 0, 1 or unset, got {value!r}")
    return value


def find_cxx() -> list[str] | None:
    """The C++ compiler as a command, or None."""
    if platform.system() not in ("Linux", "Darwin"):
        return None
    if asked := os.environ.get("CXX", "").split():
        if shutil.which(asked[0]) is None:
            raise SystemExit(f"fastattn: CXX is {' '.join(asked)!r}, but there is no program {asked[0]}")
        return asked
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler, the folders with its libraries, and the architectures to build for."""

    path: str
    library_dirs: tuple[str, ...]
    archs: tuple[str, ...]

    @property
    def has_hopper(self) -> bool:
        return any(a in ("90", "90a") for a in self.archs)

    def arch_flags(self, hopper: bool) -> list[str]:
        """Machine code for every architecture, and PTX of the lowest: that runs on all newer ones too.

        Compiled to PTX once for the architectures before sm_90 and once for those from it on, which no kernel so far
        tells apart: machine code is then made from two compilations rather than from one for each architecture.
        """
        if hopper:  # wgmma and setmaxnreg are in sm_90a only, which runs on nothing else
            return ["-gencode=arch=compute_90a,code=sm_90a"]

        def number(arch: str) -> int:
            return int(re.sub(r"\D", "", arch))

        def virtual(arch: str) -> str:
            if not arch.isdigit():  # 90a, 100f: its instructions are in no other PTX
                return arch
            return min((a for a in self.archs if a.isdigit() and (number(a) < 90) == (number(arch) < 90)), key=number)

        flags = [f"-gencode=arch=compute_{virtual(a)},code=sm_{a}" for a in self.archs]
        lowest = min(self.archs, key=number)
        return [*flags, f"-gencode=arch=compute_{lowest},code=compute_{lowest}"]


def nvcc_candidates() -> list[Path]:
    """Where a CUDA compiler may be: CUDA_HOME, PATH, the nvidia-cuda-nvcc package."""
    found = []
    if os.environ.get("CUDA_HOME"):
        found.append(Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc")
    if on_path := shutil.which("nvcc"):
        found.append(Path(on_path))
    # Build isolation hides the environment's packages from sys.path, not from sysconfig.
    for site in dict.fromkeys([sysconfig.get_paths()["purelib"], *sys.path]):
        found.extend(sorted(Path(site or ".").glob("nvidia/*/bin/nvcc")))
    return [path for path in found if path.is_file()]


def find_nvcc() -> Nvcc | None:
    """The CUDA compiler to use, or None; raises where FASTATTN_CUDA=1 asks for one in vain."""
    wanted = switch("FASTATTN_CUDA")
    if wanted == "0":
        return None
    candidates = nvcc_candidates()
    if not candidates:
        if wanted == "1":
            raise SystemExit(
                "fastattn: FASTATTN_CUDA=1, but no nvcc was found in CUDA_HOME/bin, on PATH or in the package "
                "nvidia-cuda-nvcc; install one, or unset FASTATTN_CUDA to build without CUDA kernels"
            )
        return None
    nvcc = str(candidates[0])
    known = re.findall(r"compute_(\w+)", _output(nvcc, "--list-gpu-arch"))
    asked = os.environ.get("FASTATTN_CUDA_ARCHS", "")
    archs = [a for a in re.split(r"[;,\s]+", asked) if a] or [str(a) for a in DEFAULT_CUDA_ARCHS if str(a) in known]
    known = [a for a in known if int(re.sub(r"\D", "", a)) >= min(DEFAULT_CUDA_ARCHS)]
    if unknown := [a for a in archs if re.sub(r"[af]$", "", a) not in known]:
        raise SystemExit(
            f"fastattn: FASTATTN_CUDA_ARCHS: cannot build for {', '.join(unknown)}; {nvcc} and these kernels know "
            f"{', '.join(known)} (80 stands for compute capability 8.0)"
        )
    if not archs:
        message = f"{nvcc} knows none of the architectures {DEFAULT_CUDA_ARCHS}"
        if wanted == "1":
            raise SystemExit(f"fastattn: FASTATTN_CUDA=1, but {message}")
        say(f"WARNING: {message}: no CUDA kernels")
        return None
    top = re.findall(r"^#\$ TOP=(.*)$", _output(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", "x.o"), re.M)
    home = Path(top[-1] if top else Path(nvcc).parents[1])
    libraries = [p for p in (home / "lib64", home / "lib", *home.glob("targets/*/lib")) if p.is_dir()]
    return Nvcc(nvcc, tuple(str(p.resolve()) for p in libraries), tuple(dict.fromkeys(archs)))


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"fastattn: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def pybind11_include() -> Path:
    """pybind11's headers, copied under build/: build isolation brings them in a folder that changes every time."""
    import pybind11

    target = ROOT / "build" / f"pybind11-{pybind11.__version__}"
    if not target.exists():
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copytree(pybind11.get_include(), partial)
        partial.rename(target)
    return target


# ptxas tells each kernel's registers and spills; all of it goes to a log beside the object, spills to the terminal.
NINJA_RULES = """\
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $out
rule nvcc
  command = $nvcc $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || {{ cat $out.log; exit 1; }}; $
    grep -E -B2 '[1-9][0-9]* bytes spill' $out.log; grep -E '(warning|Warning)' $out.log; true
  depfile = $out.d
  deps = gcc
  description = $out
rule link
  command = $cxx $in -o $out $flags
  description = $out
"""


def ninja_file(cxx: list[str], nvcc: Nvcc | None, output: str) -> str:
    """The text of build.ninja; paths are relative to the build folder, sources absolute."""
    sanitize = [f"-fsanitize={s}" for s in (os.environ.get("FASTATTN_SANITIZE", ""),) if s]
    include = f"-I{ROOT / 'csrc'}"
    host = [*COMPILE_FLAGS, include, *sanitize, *(["-g", "-fno-omit-frame-pointer"] if sanitize else [])]
    device = [
        include,
        "-O3",
        "-std=c++17",
        "-Xptxas=-v",
        "-Xfatbin=-compress-all",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-pthread",
    ]
    bindings = [f"-isystem {pybind11_include()}", f"-isystem {sysconfig.get_paths()['include']}"]
    link = ["-shared", "-pthread", *sanitize]
    if platform.system() == "Darwin":
        link += ["-undefined dynamic_lookup"]
    else:
        link += ["-Wl,--gc-sections", "-Wl,--exclude-libs,ALL", "-ldl"]
    # Baseline code first: of an inline function that several objects have, the linker keeps the first one it sees,
    # and that must not be one compiled for AVX-512.
    sources = [Source("csrc/bindings.cpp"), *cpu_sources(cpu_isas(cxx))]
    if nvcc:
        sources += cuda_sources(nvcc.has_hopper)
        bindings += ["-DFASTATTN_WITH_CUDA", f'-DFASTATTN_CUDA_ARCHS=\\"{",".join(nvcc.archs)}\\"']
        link += [*(f"-L{d}" for d in nvcc.library_dirs), "-lcudart_static", "-lrt"]
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {' '.join(cxx)}",
        f"nvcc = {nvcc.path if nvcc else ''}",
        NINJA_RULES.format(),
    ]
    for source in sources:
        defines = [f"-D{name}={value}" for name, value in source.defines.items()]
        common = [*device, *nvcc.arch_flags(source.hopper)] if nvcc and source.is_cuda else host
        extra = bindings if source.path == "csrc/bindings.cpp" else []
        lines += [
            f"build {source.object}: {'nvcc' if source.is_cuda else 'cxx'} {ROOT / source.path}",
            f"  flags = {' '.join([*common, *source.flags, *extra, *defines])}",
        ]
    lines += [
        f"build {output}: link {' '.join(s.object for s in sources)}",
        f"  flags = {' '.join(link)}",
        f"default {output}",
    ]
    return "\n".join(lines) + "\n"


class NinjaBuildExt(build_ext):
    """Builds the one extension with ninja, in a folder under build/ that is kept for the next build."""

    def build_extension(self, ext: Extension) -> None:
        cxx, nvcc = find_cxx(), find_nvcc()
        assert cxx is not None
        say(f"CPU kernels with {' '.join(cxx)}; " + (
            f"CUDA kernels for {', '.join(nvcc.archs)} with {nvcc.path}" if nvcc
            else "no CUDA kernels (no CUDA compiler found, or FASTATTN_CUDA=0)"
        ))  # fmt: skip
        sanitize = os.environ.get("FASTATTN_SANITIZE", "").replace(",", "-")
        folder = ROOT / "build" / "-".join(filter(None, ["ninja", sys.implementation.cache_tag, sanitize]))
        target = Path(self.get_ext_fullpath(ext.name))
        write_if_changed(folder / "build.ninja", ninja_file(cxx, nvcc, target.name))
        jobs = ["-j", os.environ["FASTATTN_JOBS"]] if "FASTATTN_JOBS" in os.environ else []
        subprocess.run([*ninja_command(), "-C", str(folder), *jobs], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target.name, target)


def ninja_command() -> list[str]:
    try:
        import ninja  # noqa: F401
    except ImportError:
        return ["ninja"]
    return [sys.executable, "-m", "ninja"]


class CleanBuildPy(build_py):
    """Starts from an empty staging folder: what was left there by an earlier build would be installed too."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        elif not self.distribution.ext_modules:
            for stale in (ROOT / "fastattn").glob("_C.*.so"):
                stale.unlink()
        super().run()


def extensions() -> list[Extension]:
    why = "FASTATTN_CPU=0" if switch("FASTATTN_CPU") == "0" else None
    if why is None and find_cxx() is None:
        why = "no C++ compiler was found"
    if why is not None:
        if switch("FASTATTN_CUDA") == "1":
            raise SystemExit(f"fastattn: FASTATTN_CUDA=1 asks for CUDA kernels, but {why}: nothing can be compiled")
        say(f"WARNING: {why}: no compiled kernels; Triton and the reference remain")
        return []
    return [Extension("fastattn._C", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuildExt, "build_py": CleanBuildPy})
