"""Golden recordings: runs every probe on a GPU and keeps inputs and outputs, to hold the emulator to them.

    python -m tests.cuda_emulation.record

needs a GPU, a torch that sees it, and nvcc. A file in ``recordings/`` is one GPU model.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.cuda_emulation import probe as probing
from tests.cuda_emulation.build import HERE, ROOT, _setup
from tests.cuda_emulation.probe import Probe

FOLDER = HERE / "recordings"


def recordings() -> list[Path]:
    return sorted(FOLDER.glob("*.npz"))


def read(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Probe -> its inputs and outputs, int32."""
    with np.load(path) as arrays:
        names = {key.rsplit("/", 1)[0] for key in arrays.files if key.endswith("/out")}
        return {n: (torch.from_numpy(arrays[f"{n}/in"]), torch.from_numpy(arrays[f"{n}/out"])) for n in sorted(names)}


def write(path: Path, probes: list[Probe], outs: dict[str, Tensor], about: dict[str, str]) -> Path:
    """``about``: what ran, kept beside the numbers."""
    arrays = {}
    for probe in probes:
        arrays[f"{probe.name}/in"], arrays[f"{probe.name}/out"] = probe.words.numpy(), outs[probe.name].numpy()
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)
    return path


def compile_probes(folder: Path, capability: tuple[int, int]) -> Path:
    """The probes for this GPU; those of Hopper instructions only where it has them."""
    nvcc = _setup().find_nvcc()
    if nvcc is None:
        raise SystemExit("recording needs nvcc: set CUDA_HOME, or put it on PATH")
    arch = "90a" if capability == (9, 0) else "{}{}".format(*capability)
    library = folder / "probes.so"
    sources = [HERE / "probes" / f"{name}.cu" for name in ("probes", "sm80", *(["sm90"] if arch == "90a" else []))]
    command = [nvcc.path, "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-shared"]
    command += ["-Xcompiler=-fPIC", f"-I{ROOT / 'csrc'}", f"-I{HERE}", *map(str, sources), "-o", str(library)]
    if arch != "90a":
        command.append("-DFASTATTN_PROBES_SM80_ONLY")
    subprocess.run(command, check=True)
    return library


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: nothing to record")
    capability = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    probes = [p for p in probing.probes() if capability == (9, 0) or not p.sm90]
    outs, wrong = {}, []
    with tempfile.TemporaryDirectory() as folder:
        function = probing.declare(ctypes.CDLL(str(compile_probes(Path(folder), capability))))
        for probe in probes:
            out = torch.full_like(probe.expected, -1).cuda()
            on_device = Probe(probe.name, probe.words.cuda(), probe.expected, probe.tolerance)
            probing.run(function, on_device, out)
            torch.cuda.synchronize()
            outs[probe.name] = out.cpu()
            try:
                probe.check(outs[probe.name], probe.expected, "the definition")
            except AssertionError as error:
                wrong.append(str(error))
    about = {"device": name, "capability": "{}.{}".format(*capability), "cuda": str(torch.version.cuda)}
    path = write(FOLDER / (re.sub(r"\W+", "-", name.lower()) + ".npz"), probes, outs, about)
    print(f"{path}: {len(probes)} probes on {name}")
    for message in wrong:
        print(f"WRONG {message}", file=sys.stderr)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
