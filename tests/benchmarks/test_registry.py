"""The registry: every case once, all of them there, and filters that keep what they say."""

import itertools

import pytest
from small_cases import CPU

from echolora_kernels.benchmarks.cases import DROPOUTS, DTYPES, KINDS, METHODS, RANKS, Filters, registry
from echolora_kernels.models import MODELS

TIMED = {"smollm2", "llama2-7b", "llama3-8b"}


def test_names_are_unique_and_nothing_is_missing():
    cases = registry(["8x4x2"])
    assert len({case.name for case in cases}) == len(cases)
    assert {case.kind for case in cases} == set(KINDS)
    options = set(itertools.product(METHODS, RANKS, DROPOUTS, (False, True), DTYPES))
    for model in (*TIMED, "custom"):
        layers = [case for case in cases if case.model == model and case.kind == "layer"]
        for part in {case.part for case in layers}:
            own = [case for case in layers if case.part == part]
            assert {(c.method, c.rank, c.dropout, c.echo, c.dtype) for c in own} == options
    assert set(RANKS) == {8, 16, 64, 128} and set(DROPOUTS) == {0.0, 0.1}


@pytest.mark.parametrize(
    ("model", "part", "d_in", "widths"),
    [
        ("llama2-7b", "down", 11008, (4096,)),
        ("llama3-8b", "qkv", 4096, (4096, 1024, 1024)),
        ("llama3-8b", "gate_up", 4096, (14336, 14336)),
        ("smollm2", "k", 576, (192,)),
    ],
)
def test_shapes_of_the_models(model, part, d_in, widths):
    for case in Filters(model=[model], part=[part], kind=["layer"]).keep(registry(), CPU):
        assert (case.d_in, case.widths) == (d_in, widths)


def test_filters_keep_what_all_of_them_name():
    filters = Filters(cases=["smollm2/*", "*/q/*"], rank=[16, 64], dtype=["bf16"], echo=[False])
    kept = filters.keep(registry(), CPU)
    assert {case.rank for case in kept} == {16, 64} and {case.dtype for case in kept} == {"bf16"}
    assert {case.kind for case in kept} == {"layer", "quantised"}  # the others have no echo to be on or off
    assert all(case.name.startswith("smollm2/") or "/q/" in case.name for case in kept)
    assert {case.model for case in kept} == TIMED < set(MODELS)


def test_the_quick_part_has_some_of_every_kind():
    assert {case.kind for case in Filters(quick=True).keep(registry(), CPU)} == set(KINDS)


def test_what_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="cases: got 'smolm/\\*', which matches none of"):
        Filters(cases=["smolm/*"]).keep(registry(), CPU)
    with pytest.raises(ValueError, match="no case is left"):
        Filters(kind=["loss"], rank=[8]).keep(registry(), CPU)
    for text in ("3x4", "3x4x0", "3x4x5+", "axbxc"):
        with pytest.raises(ValueError, match="wants ROWSxD_INxD_OUT"):
            registry([text])


def test_custom_shapes():
    cases = registry(["24x40x32+16"], rows=None)
    assert {(case.rows, case.d_in, case.widths) for case in cases if case.model == "custom"} == {(24, 40, (32, 16))}
