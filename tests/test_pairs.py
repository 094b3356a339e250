"""The case list holds every feature and every pair of features; the kernels for every device take them all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch

from fastattn.dispatch import get_backend
from tests.cases import CASES, Case

FEATURES: dict[str, Callable[[Case], object]] = {
    "causal": lambda c: c.causal,
    "window": lambda c: c.window,
    "offset": lambda c: c.offset is not None,
    "scale": lambda c: c.softmax_scale is not None,
    "grouped heads": lambda c: c.heads_q != c.heads_k,
    "other head dim of values": lambda c: c.head_dim_qk != c.head_dim_v,
    "mask": lambda c: c.mask,
    "bias": lambda c: c.bias,
    "dropout": lambda c: 0 < c.dropout_p < 1,
    "softcap": lambda c: c.softcap,
    "alibi": lambda c: c.alibi,
    "sinks": lambda c: c.sinks,
    "segments": lambda c: c.segments,
    "prefix": lambda c: c.prefix,
    "packed": lambda c: c.lengths_q,
    "used": lambda c: c.used_k,
    "leftpad": lambda c: c.leftpad,
    "paged": lambda c: c.page_size,
    "splits": lambda c: c.num_splits > 1,
    "strides": lambda c: c.layout != "bhsd",
}

#: Pairs that no call can have.
EXCLUDED = {
    frozenset({"packed", "leftpad"}): "packed sequences have no padding",
    frozenset({"strides", "paged"}): "pages are laid out as (page, row, head, feature)",
    frozenset({"strides", "packed"}): "packed rows are laid out as (row, head, feature)",
}

#: The fields of a case that are sizes or data, or say how the case is tested.
OTHER = {
    "name", "batch", "seqlen_q", "seqlen_k", "blind_rows", "grad_layout", "grad_lse", "magnitude", "bias_dtype",
    "sinks_dtype", "lengths_k",
}  # fmt: skip


def pairs_of(case: Case) -> set[frozenset[str]]:
    has = [name for name, test in FEATURES.items() if test(case)]
    return {frozenset(pair) for pair in itertools.combinations(has, 2)}


def test_every_pair_of_features_is_in_the_case_list() -> None:
    covered = set().union(*map(pairs_of, CASES))
    wanted = {frozenset(pair) for pair in itertools.combinations(FEATURES, 2)}
    missing = sorted(tuple(sorted(pair)) for pair in wanted - covered - EXCLUDED.keys())
    assert not missing, f"{len(missing)} pairs of features are in no case: {missing}"
    assert not covered & EXCLUDED.keys(), "excluded, and yet in a case"


def test_every_field_of_a_case_is_a_feature_or_named() -> None:
    """A field that is added to Case without a feature here would never be asked for in pairs."""
    plain = Case("plain")
    others = {
        "heads_k": 1, "head_dim_v": 5, "softmax_scale": 0.1, "offset": 0, "mask": (0,) * 4, "bias": (0,) * 4,
        "dropout_p": 0.1, "softcap": 1.0, "alibi": "heads", "segments": "batch", "prefix": (1, 1), "causal": True,
        "lengths_q": (1, 1), "used_k": (1, 1), "leftpad": (1, 1), "page_size": 4, "num_splits": 2, "sinks": True,
        "layout": "bshd", "window": (1, 1), "heads_q": 4, "head_dim_qk": 8,
    }  # fmt: skip
    assert others.keys() | OTHER == {field.name for field in fields(Case)}
    for name, value in others.items():
        case = Case(**{**vars(plain), name: value})
        assert any(test(case) for test in FEATURES.values()), name


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_no_kernel_refuses_a_case(backend: str) -> None:
    """On the device that it is for, but for what the contract limits: head dims, and float64 in Triton."""
    device, found = "cpu" if backend == "cpu" else "cuda", {}
    for case in CASES:
        spec = replace(case.make(torch.bfloat16).spec(), device=device)
        found[case.name] = get_backend(backend).unsupported_reasons(spec)
    assert not {name: reasons for name, reasons in found.items() if reasons}
