"""The Triton kernels where the one case list does not reach: NaN kept apart, extremes, splits, what is compiled in."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from fastattn import reference
from fastattn.backends.base import Tensors
from fastattn.backends.triton import TritonBackend
from fastattn.spec import AttentionSpec
from tests.tolerance import assert_close_to_oracle, assert_rounded_alike

BACKEND = TritonBackend()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(BACKEND.unavailable_reason() is not None, reason=str(BACKEND.unavailable_reason()))

CASES: dict[str, dict] = {
    "causal": {"window": (None, 0)},
    "window": {"window": (9, 4), "offset": 3},
    "mask": {"mask": (2, 2, 37, 41)},
    "mask_of_keys": {"mask": (2, 1, 1, 41)},
    "bias": {"bias": (2, 2, 37, 41)},
    "segments": {"segments": True, "window": (None, 0), "softcap": 2.0},
    "dropout": {"dropout_p": 0.6, "window": (None, 0), "bias": (1, 2, 37, 41), "heads_k": 1},
}


def build(dtype: torch.dtype, bshd: bool = False, **changes) -> tuple[AttentionSpec, Tensors]:
    sizes = {
        "batch": 2,
        "heads_q": 2,
        "heads_k": 2,
        "seqlen_q": 37,
        "seqlen_k": 41,
        "head_dim_qk": 16,
        "head_dim_v": 16,
    }
    fields = {**sizes, "softmax_scale": 0.3, "dtype": dtype, "device": DEVICE, "needs_grad": True, **changes}
    if fields.get("bias"):
        fields.update(bias_dtype=dtype, needs_bias_grad=True)
    spec = AttentionSpec(**fields)
    torch.manual_seed(len(str(changes)))

    def draw(heads: int, seqlen: int, dim: int) -> Tensor:
        if bshd:
            return torch.randn(spec.batch, seqlen, heads, dim).transpose(1, 2).to(DEVICE, dtype)
        return torch.randn(spec.batch, heads, seqlen, dim).to(DEVICE, dtype)

    q = draw(spec.heads_q, spec.seqlen_q, spec.head_dim_qk)
    k = draw(spec.heads_k, spec.seqlen_k, spec.head_dim_qk)
    v = draw(spec.heads_k, spec.seqlen_k, spec.head_dim_v)
    rest = {}
    if spec.mask:
        rest["mask"] = (torch.rand(spec.mask) < 0.6).to(DEVICE)
    if spec.bias:
        bias = torch.randn(spec.bias)
        bias[torch.rand(spec.bias) < 0.1] = -math.inf
        rest["bias"] = bias.to(DEVICE, dtype)
    if spec.segments:
        of_q, of_k = (torch.randint(0, 3, (2, n)).sort()[0].int() for n in (spec.seqlen_q, spec.seqlen_k))
        rest.update(q_segments=of_q.to(DEVICE), k_segments=of_k.to(DEVICE))
    if spec.dropout_p:
        rest["dropout_seed"] = torch.tensor([0x1234_5678_9ABC], device=DEVICE)
    return spec, Tensors(q, k, v, **rest)


def visibility(spec: AttentionSpec, t: Tensors) -> Tensor:
    """(batch, heads_q, seqlen_q, seqlen_k) on the CPU."""
    t = Tensors(*(x if x is None else x.cpu() for x in t))
    visible = reference.visible_keys(
        spec.seqlen_q,
        spec.seqlen_k,
        spec.window,
        spec.offset,
        t.mask,
        t.bias,
        torch.device("cpu"),
        q_segments=t.q_segments,
        k_segments=t.k_segments,
    )
    return visible.expand(spec.batch, spec.heads_q, -1, -1)


def run(spec: AttentionSpec, t: Tensors, grad_out: Tensor, grad_lse: Tensor | None = None) -> tuple[Tensor, ...]:
    out, lse = BACKEND.forward(spec, t)
    return out, lse, *BACKEND.backward(spec, t, grad_out, grad_lse, out, lse)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("where", ["q", "k", "v", "grad_out"])
def test_nonfinite_reaches_only_what_sees_it(case: str, where: str) -> None:
    """One row is poisoned; whatever does not see it must be what it is without the poison."""
    poison = (math.nan, math.inf, -math.inf)[(list(CASES).index(case) + "qkvg".index(where[0])) % 3]
    spec, t = build(torch.float32, **CASES[case])
    grad_out = torch.randn(spec.batch, spec.heads_q, spec.seqlen_q, spec.head_dim_v, device=DEVICE)
    clean = run(spec, t, grad_out)
    victims = {"q": t.q, "k": t.k, "v": t.v, "grad_out": grad_out}
    victims[where][0, 0, 17, 3] = poison
    dirty = run(spec, t, grad_out)
    seen = visibility(spec, t)
    hit_rows = torch.zeros(spec.batch, spec.heads_q, spec.seqlen_q, dtype=torch.bool)
    if where in "kv":
        hit_rows[0, : spec.group_size] = seen[0, : spec.group_size, :, 17]
    else:
        hit_rows[0, 0, 17] = True
    # A row that is hit may hand anything on to all keys it sees.
    hit_keys = (hit_rows[..., None] & seen).any(2).unflatten(1, (spec.heads_k, spec.group_size)).any(2)
    hit_pairs = hit_rows[..., None] & seen
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dbias"), clean, dirty, strict=True):
        if a is None:
            continue
        if name == "dbias":
            fine = ~hit_pairs
            for dim, size in enumerate(a.shape):
                fine = fine.all(dim, keepdim=True) if size == 1 else fine
        else:
            fine = ~(hit_keys if name in ("dk", "dv") else hit_rows)
        if name == "out":
            assert b.cpu()[fine].isfinite().all()
            if where == "v":
                got = b.cpu()[0, : spec.group_size, :, 3][hit_rows[0, : spec.group_size]]
                same = got.isnan() if math.isnan(poison) else got == poison
                assert (same | (spec.dropout_p > 0)).all()
        assert_rounded_alike(b.cpu()[fine], a.cpu()[fine], name)


def test_bias_of_finfo_min_gives_mean_of_values() -> None:
    spec, t = build(torch.float32, bias=(1, 1, 37, 41))
    t.bias.fill_(torch.finfo(torch.float32).min)
    out, lse = BACKEND.forward(spec, t)
    naive, oracle = (v.mean(2, keepdim=True).expand_as(out) for v in (t.v, t.v.double()))
    assert_close_to_oracle(out, naive, oracle)
    assert lse.isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
def test_a_sink_of_minus_infinity_is_none(splits: int) -> None:
    """In rows that see keys, and in one that sees nothing; in the kernel, and where splits are put together."""
    spec, t = build(torch.float32, mask=(2, 2, 5, 41), seqlen_q=5, num_splits=splits, needs_grad=False)
    t.mask[:, :, 2] = False
    sinks = torch.full((2,), -math.inf, device=DEVICE)
    without = BACKEND.forward(spec, t)
    withal = BACKEND.forward(AttentionSpec(**{**vars(spec), "sinks": True}), t._replace(sinks=sinks))
    assert not withal[0][:, :, 2].any() and (withal[1][:, :, 2] == -math.inf).all()
    for a, b in zip(withal, without, strict=True):
        assert_rounded_alike(a, b)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_bias_gives_nan_in_its_rows_only(value: float) -> None:
    spec, t = build(torch.float32, bias=(1, 1, 37, 41))
    t.bias[0, 0, 5, 30] = value
    out, _ = BACKEND.forward(spec, t)
    assert out[:, :, 5].isnan().all()
    assert out[:, :, torch.arange(37) != 5].isfinite().all()


def test_expanded_gradient_and_output_layout() -> None:
    spec, t = build(torch.float32, bshd=True, window=(None, 0))
    grad_out = torch.tensor(1.0, device=DEVICE).expand(spec.batch, spec.heads_q, spec.seqlen_q, spec.head_dim_v)
    got, want = run(spec, t, grad_out), run(spec, t, grad_out.contiguous())
    assert got[0].transpose(1, 2).is_contiguous() and got[2].transpose(1, 2).is_contiguous()
    for a, b in zip(got[:5], want[:5], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_splits_and_packed_heads_change_nothing(seqlen_q: int) -> None:
    """However many programs share the keys, more than there are tiles of them included."""
    spec, t = build(torch.float32, heads_q=6, seqlen_q=seqlen_q, seqlen_k=150, window=(90, 0), offset=145, softcap=3.0)
    results = [BACKEND.forward(AttentionSpec(**{**vars(spec), "num_splits": n}), t) for n in (1, 2, 9)]
    for out, lse in results[1:]:
        assert_rounded_alike(out, results[0][0], "out")
        assert_rounded_alike(lse, results[0][1], "lse")


def test_descriptors_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that reads through tensor descriptors, which the table of the interpreter has none of."""
    from dataclasses import replace

    from fastattn.backends.triton import configs

    spec, t = build(torch.float32, window=(None, 0), head_dim_qk=48)
    grad_out = torch.randn(2, 2, 37, 16, device=DEVICE)
    plain = run(spec, t, grad_out)
    monkeypatch.setattr(configs, "INTERPRETER", replace(configs.INTERPRETER, descriptors=True))
    monkeypatch.setattr("fastattn.backends.triton.launch._describable", described := _Counted())
    for a, b in zip(run(spec, t, grad_out)[:5], plain[:5], strict=True):
        assert torch.equal(a, b)
    assert described.calls or DEVICE == "cuda"


class _Counted:
    calls = 0

    def __call__(self, x: Tensor) -> bool:
        self.calls += 1
        return True


def test_number_of_splits() -> None:
    from fastattn.backends.triton.launch import choose_splits

    assert choose_splits(programs=110, tiles=1000, processors=132) == 1
    assert choose_splits(programs=1, tiles=1, processors=132) == 1
    for programs in (1, 7, 40, 100):
        splits = choose_splits(programs, tiles=1024, processors=132)
        waves = programs * splits / 132
        assert splits <= 128 and waves / math.ceil(waves) >= 0.75
    assert choose_splits(programs=16, tiles=512, processors=132) == 7, "the least that all but fills one wave"


def test_reasons() -> None:
    spec, _ = build(torch.float64, head_dim_qk=600, head_dim_v=520)
    reasons = "\n".join(BACKEND.unsupported_reasons(spec))
    assert "float64" in reasons and "head_dim_qk 600: at most 576" in reasons and "head_dim_v 520" in reasons


def test_configuration_is_one_line() -> None:
    spec, _ = build(torch.bfloat16, window=(None, 0), bias=(1, 1, 1, 41), softcap=2.0)
    text = BACKEND.configuration(spec)
    assert "\n" not in text
    for word in ("forward", "dkdv", "dbias", "has_hi", "softcap", "bias by key"):
        assert word in text
