"""python -m examples.translation: data in, the same curve after a kill, in two processes and on every backend."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_oracle

from tests.devices import device_or_skip

for library in ("tokenizers", "safetensors", "sacrebleu", "datasets", "matplotlib", "tensorboard"):
    pytest.importorskip(library, reason="pip install 'fastattn[examples]'")

from safetensors.torch import load_file, save_file

from examples.common import checkpoint, logs
from examples.common.batching import BatchPlan, pad
from examples.common.errors import UserError, require
from examples.common.training import Options, Trainer, learning_rate_at
from examples.translation import __main__ as command
from examples.translation import program
from fastattn.dispatch import backends
from fastattn.transformer import Seq2SeqTransformer

ROOT = Path(__file__).parents[1]
TINY = (
    "--d-model 32 --heads 2 --layers 1 --feedforward 32 --max-tokens 400 --validate-every 6 --checkpoint-every 3 "
    "--report-every 1 --warmup 2 --steps 8 --learning-rate 0.02 --cooldown 0"
).split()
DATA = ("--train-pairs", 500, "--held-out", 20, "--vocab-size", 320)


def run(*words: Any) -> Any:
    """The command, in this process."""
    args = command.parser().parse_args([str(w) for w in words])
    return getattr(program, args.command)(args)


def losses(out: Path) -> list[tuple[int, float]]:
    with open(out / "log.csv", newline="") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    run("prepare", "--out", out, *DATA)
    return out


@pytest.fixture
def out(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def unbroken(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, with dropout: what a broken one must repeat."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    shutil.copytree(prepared, out)
    run("train", "--out", out, *TINY, "--dropout", 0.2, "--log", "csv", "--log", "tensorboard")
    return out


# The whole path


def test_train_evaluate_translate(unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {p.name for p in unbroken.iterdir()} >= {"data", "model", "checkpoint.pt", "log.csv", "curves.png"}
    assert list((unbroken / "tensorboard").iterdir())
    curve = [loss for _, loss in losses(unbroken)]
    assert len(curve) == 8 and curve[-1] < curve[0] - 0.5
    result = run("evaluate", "--out", unbroken, "--limit", 6, "--beams", 2)
    rows = (unbroken / "test.translations.tsv").read_text().splitlines()
    assert len(rows) == 6 and all(row.count("\t") == 2 for row in rows)
    hypotheses, references = [r.split("\t")[2] for r in rows], [r.split("\t")[1] for r in rows]
    assert result == program.score(references, hypotheses)
    capsys.readouterr()
    run("translate", "--out", unbroken, "three hundred and forty-five", "--n-best", 2, "--beams", 3)
    best = capsys.readouterr().out.splitlines()
    assert len(best) == 2 and best[1].startswith("\t")


def test_score_is_sacrebleu_s() -> None:
    result = program.score(["eine Million eins", "der dritte"], ["eine Million eins", "der vierte"])
    assert result["exact"] == 50 and "tok:13a" in result["signature"]
    assert program.score(["a b c d e"], ["a b c d e"])["bleu"] == pytest.approx(100)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_demo(tmp_path: Path) -> None:
    """Trains, and translates what stands on standard input; a kill is made good, and what is trained stays."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()

    def demo(binaries: Path, typed: str = "") -> tuple[int, list[str]]:
        flags = f"--preset demo --train-pairs 300 --held-out 3 --vocab-size 280 {' '.join(TINY)}"
        words = [
            "make",
            "--no-print-directory",
            "--old-file=LICENSE",
            "demo",
            "STAMP=LICENSE",
            f"BIN={binaries}",
            f"DEMO_FLAGS={flags}",
        ]
        # Not those of the make that may have started the tests.
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(
            [*words, f"DEMO_OUT={tmp_path / 'demo'}"], cwd=ROOT, env=ours | {"OMP_NUM_THREADS": "1"},
            input=typed, text=True, stdout=subprocess.PIPE,
        )  # fmt: skip
        return done.returncode, done.stdout.splitlines()

    def stubbed(end: str) -> tuple[int, list[str]]:
        """With a python that only says what it was asked for."""
        stub.write_text(f'#!/bin/sh\necho "asked: $3"\n{end}\n')
        stub.chmod(0o755)
        status, said = demo(stub.parent)
        return status, [line.removeprefix("asked: ") for line in said if line.startswith("asked: ")]

    killed, asked = stubbed("kill -9 $$")
    assert killed and asked == ["train"]
    status, said = demo(Path(sys.executable).parent, "twelve\nthirteen\n")
    assert status == 0 and any(line.startswith("step      8 ") for line in said)
    assert [line.partition("\t")[0] for line in said[-2:]] == ["twelve", "thirteen"]
    assert stubbed("") == (0, ["evaluate", "translate", "translate"])


# The same curve


def test_resume_after_a_kill_gives_the_same_curve(out: Path, unbroken: Path) -> None:
    words = [
        sys.executable, "-m", "examples.translation", "train", "--out", out, *TINY, "--dropout", "0.2", "--log", "csv"
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(list(map(str, words)), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (out / "checkpoint.pt").exists() or len(losses(out)) < 4:  # dies after step 3's checkpoint
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = checkpoint.load(checkpoint.find(out))
    assert state["step"] in (3, 6)
    run("train", "--out", out, *TINY, "--dropout", 0.2, "--log", "csv", "--resume")
    threads = torch.get_num_threads()
    expected = losses(unbroken)
    if threads == 1:  # the same arithmetic in the process that was killed
        assert losses(out) == expected
    else:
        assert [s for s, _ in losses(out)] == [s for s, _ in expected]
        assert [v for _, v in losses(out)] == pytest.approx([v for _, v in expected], rel=1e-4)


def test_stopped_and_resumed_is_bit_for_bit_unbroken(out: Path, unbroken: Path) -> None:
    words = ("train", "--out", out, *TINY, "--dropout", 0.2, "--log", "csv")
    run(*words, "--stop-at", 5)  # beyond the checkpoint of step 3: two rows are to be forgotten
    with pytest.raises(UserError, match="--resume goes on with it"):
        run(*words)
    assert run(*words, "--resume") == [loss for _, loss in losses(unbroken)][3:]
    assert losses(out) == losses(unbroken)
    one, two = (checkpoint.load(folder / "checkpoint.pt") for folder in (out, unbroken))
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in two["model"])


def test_two_processes_train_like_one_that_accumulates(out: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(out, alone)
    expected = run("train", "--out", alone, *TINY, "--dropout", 0, "--steps", 4, "--accumulate", 4)
    words = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "examples.translation", "train", "--out", out, *TINY, "--dropout", "0", "--steps", "4",
        "--accumulate", "2", "--device", "cpu",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(list(map(str, words)), cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    found = [loss for _, loss in losses(out)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(checkpoint.load(out / "checkpoint.pt")["random"]) == 2
    with pytest.raises(UserError, match="of 2 processes, not 1"):
        run("train", "--out", out, *TINY, "--dropout", 0, "--steps", 5, "--accumulate", 2, "--resume")


@pytest.mark.parametrize("attention", ["auto", "cpu", "triton", "cuda"])
def test_every_backend_trains_the_same(
    attention: str, prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps with dropout: no further from float64 than the naive attention is."""
    device = device_or_skip(attention) if attention != "auto" else "cpu"
    calls: Counter[str] = Counter()

    def counted(name: str, forward: Any) -> Any:
        return lambda *args: calls.update([name]) or forward(*args)

    for name, backend in backends().items():
        monkeypatch.setattr(backend, "forward", counted(name, backend.forward))
    found = run(
        "compare", "--out", prepared, "--attentions", attention, "--device", device, *TINY, "--steps", 5, "--heads", 1,
        "--dropout", 0.1, "--max-tokens", 40,  # a pair each: Triton's interpreter is slow
    )  # fmt: skip
    oracle, naive, actual = (torch.tensor(found[n], dtype=torch.float64) for n in ("float64", "naive", attention))
    assert oracle.unique().numel() == 5
    fused = "cpu" if attention == "auto" else attention
    assert calls == {"reference": 2 * calls[fused], fused: 5 * 3}  # of each layer: encoder, decoder, cross
    assert_close_to_oracle(actual.float(), naive.float(), oracle, "loss")
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[0] == attention and float(row[1]) == pytest.approx(found[attention][0])
    assert float(row[3]) == pytest.approx((actual - oracle).abs().max().item(), rel=0.05)


def test_bfloat16_follows_float32(out: Path, unbroken: Path) -> None:
    found = run("train", "--out", out, *TINY, "--dropout", 0.2, "--precision", "bfloat16")
    assert found == pytest.approx([loss for _, loss in losses(unbroken)], rel=2e-2)
    assert found != [loss for _, loss in losses(unbroken)]


# Batches and rates


def test_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [tuple(row) for row in torch.randint(1, 40, (500, 2), generator=generator).tolist()]
    plan = BatchPlan(lengths, 300, seed=1, pool=200)
    first = plan.epoch(0)
    assert sorted(i for batch in first for i in batch) == list(range(500))
    sizes = [sum(max(lengths[i][side] for i in batch) for side in (0, 1)) * len(batch) for batch in first]
    assert max(sizes) <= 300 and sum(sizes) < 1.35 * sum(map(sum, lengths))  # little of it is padding
    assert plan.epoch(0) == first and plan.epoch(1) != first
    assert BatchPlan([(500, 1), (1, 1)], 300, seed=1).epoch(0).count([0]) == 1
    for start in (0, 3, len(first) + 2):
        stream = plan.batches(start)
        everything = [(e, b) for e in range(3) for b in plan.epoch(e)]
        assert [next(stream) for _ in range(5)] == everything[start : start + 5]
    assert pad([[1], [2, 3]], 0).tolist() == [[1, 0], [2, 3]]


def test_learning_rate() -> None:
    options = Options(steps=1000, learning_rate=2.0, warmup=100)
    for step, rate in ((1, 0.02), (50, 1.0), (100, 2.0), (400, 1.0), (900, 2 / 3)):
        assert learning_rate_at(step, options) == pytest.approx(rate)
    cooled = Options(steps=1000, learning_rate=2.0, warmup=100, cooldown=0.2)
    assert learning_rate_at(900, cooled) == pytest.approx(2 / 3 * 101 / 200) and learning_rate_at(1001, cooled) == 0


@pytest.mark.parametrize(("clip", "norm"), [(1.0, 1.0), (20.0, 13.0), (0.0, 13.0)])
def test_the_gradient_is_clipped(clip: float, norm: float, tmp_path: Path) -> None:
    """The mean over all that counts in the batches of a step; the log keeps the norm from before."""

    class Slope(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3))

        def forward(self, batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            return len(batch) * self.weight @ torch.tensor([3.0, 4.0, 12.0]), torch.tensor(len(batch))

    objective, norms = Slope(), []
    options = Options(steps=2, accumulate=2, clip=clip)
    trainer = Trainer(objective, lambda batch: batch, BatchPlan([(1,)] * 7, 3, seed=0), options, tmp_path)
    trainer.optimiser.register_step_pre_hook(lambda *_: norms.append(objective.weight.grad.norm().item()))
    trainer.run()
    assert norms == pytest.approx([norm, norm])
    assert [float(row["gradient_norm"]) for row in logs.read(tmp_path / "log.csv")] == pytest.approx([13, 13])


def test_the_best_model_is_kept(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([50.0, 60.0, 40.0])
    monkeypatch.setattr(program, "score", lambda *_: {"bleu": next(scores)})
    run("train", "--out", out, *TINY, "--steps", 3, "--validate-every", 1, "--checkpoint-every", 1)
    assert json.loads((out / "model" / "score.json").read_text())["bleu"] == 60
    kept = Seq2SeqTransformer.from_pretrained(out / "model").state_dict()
    second = checkpoint.load(out / "checkpoint.previous.pt")
    assert second["step"] == 2 and all(torch.equal(second["model"][f"model.{name}"], p) for name, p in kept.items())


# Bad input


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_corrupt_checkpoint_is_told_and_nothing_is_lost(damage: str, out: Path, unbroken: Path) -> None:
    shutil.copytree(unbroken, out, dirs_exist_ok=True)
    path = out / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    left = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    words = ("train", "--out", out, *TINY, "--dropout", 0.2, "--log", "csv", "--resume")
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged.*checkpoint\.previous\.pt"):
        run(*words)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == left
    path.unlink()  # as the message advises
    assert run(*words) == [loss for _, loss in losses(unbroken)][6:]


def test_bad_use(unbroken: Path, tmp_path: Path) -> None:
    long = "three hundred " * 400
    for words, message in (
        (("translate", "--out", unbroken, "one", long), "sentence 2 has .* tokens, the model accepts"),
        (("translate", "--out", unbroken, " "), "sentence 1 is empty"),
        (("translate", "--out", unbroken, "one", "--n-best", 9), "--n-best 9"),
        (("translate", "--out", tmp_path / "none", "one"), "run train first"),
        (("evaluate", "--out", tmp_path / "none"), "run prepare first"),
        (("train", "--out", tmp_path / "none", "--data", "files"), "--src FILE"),
        (("prepare", "--out", tmp_path / "none", "--vocab-size", 60_000), "50,000"),
        (("prepare", "--out", tmp_path / "none", "--vocab-size", 10), "262"),
        (("train", "--out", unbroken, "--steps", 0), "--steps: must be at least 1, got 0"),
        (("train", "--out", unbroken, *TINY, "--seed", 9, "--resume"), "trained with seed = 0, not 9"),
        (("train", "--out", unbroken, *TINY, "--d-model", 16, "--resume"), "model of other sizes"),
        (("train", "--out", unbroken, "--report-every", 0), "--report-every: must be at least 1"),
        (("train", "--out", unbroken, "--learning-rate", 0), "must be finite, from 0 to inf and not 0"),
        (("train", "--out", unbroken, "--label-smoothing", 1), "--label-smoothing: must be"),
        (("train", "--out", unbroken, "--device", "abacus"), "--device abacus"),
        (("train", "--out", unbroken, "--heads", 5, "--resume"), "5"),
        (("prepare", "--out", unbroken), "other data need another --out"),
        (("translate", "--out", unbroken, "--length-penalty", "nan", "one"), "got nan"),
        (("translate", "--out", unbroken, "one", "tw\udcffo"), "sentence 2 is not UTF-8"),
    ):
        with pytest.raises(UserError, match=message):
            run(*words)
    with pytest.raises(UserError, match=r"--attention cpu: backend 'cpu' cannot run this call .*640: at most 576"):
        run("compare", "--out", unbroken, *TINY, "--d-model", 640, "--heads", 1, "--attentions", "cpu", "--steps", 1)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--attention cuda cannot run here"):
            run("train", "--out", tmp_path / "none", "--attention", "cuda")


def test_a_step_that_is_not_finite_stops_the_run(out: Path) -> None:
    with pytest.raises(UserError, match=r"step \d is not finite .* lower --learning-rate"):
        run("train", "--out", out, *TINY, "--learning-rate", 1e30, "--warmup", 1, "--clip", 0, "--checkpoint-every", 1)
    parameters = checkpoint.load(out / "checkpoint.pt")["model"].values()
    assert all(p.isfinite().all() for p in parameters)


def test_checkpoints_know_their_data(out: Path, unbroken: Path) -> None:
    shutil.copytree(unbroken, out, dirs_exist_ok=True)
    path = out / "data" / "train.safetensors"
    tensors = load_file(path)
    tensors["src_ends"][0] -= 1
    save_file(tensors, path)
    words = ("train", "--out", out, *TINY, "--dropout", 0.2, "--steps", 9, "--resume")
    with pytest.raises(UserError, match="trained on other data"):
        run(*words)
    run("prepare", "--out", out, *DATA)  # the same again
    assert len(run(*words)) == 1


@pytest.mark.parametrize("end", ["", EOFError])
def test_sentences_are_typed(
    end: Any, unbroken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal one after the other, until an empty line or the end of input; an error does not end it."""
    typed = iter(["one", "three hundred " * 400, "two", end])

    def answer(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    run("translate", "--out", unbroken, "--beams", 1)
    first, one, error, two = capsys.readouterr().out.splitlines()
    assert first.startswith("Type") and error.startswith("error: sentence 1 has") and not (one + two).count("error")
    assert next(typed, None) is None


def test_missing_library_and_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"sacrebleu is not installed.*pip install 'fastattn\[examples\]'"):
        require("sacrebleu")
    done = subprocess.run(
        [sys.executable, "-m", "examples.translation", "evaluate", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not json.dumps(done.stdout).count("Traceback")
