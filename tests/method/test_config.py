"""Layer numbers, validation, and the routing schedule."""

import dataclasses
import itertools

import pytest

from echolora_kernels import EchoConfig
from echolora_kernels.method.route import echo_probability, routed


@pytest.mark.parametrize(("depth", "source", "target"), [
    (32, (24, 25, 26, 27), (4, 5, 6, 7)),
    (30, (22, 23, 24, 25), (3, 4, 5, 6)),
    (16, (12, 13), (2, 3)),
    (4, (3,), (0,)),
    (2, (1,), (0,)),
])  # fmt: skip
def test_default_layers_scale_with_depth(depth, source, target):
    assert EchoConfig().layers(depth) == (source, target)


def test_negative_layers_count_from_the_end():
    config = EchoConfig(source_layers=[-5, -8, -7, -6], target_layers=(4, -28))
    assert config.layers(33) == ((25, 26, 27, 28), (4, 5))


@pytest.mark.parametrize(("choices", "depth", "words"), [
    ({"source_layers": [8], "target_layers": [2]}, 8, ["source_layers", "8"]),
    ({"source_layers": [-9], "target_layers": [2]}, 8, ["source_layers", "-9"]),
    ({"source_layers": [6], "target_layers": [9]}, 8, ["target_layers", "9"]),
    ({"source_layers": [3, 5], "target_layers": [3]}, 8, ["target_layers", "[3]", "below 3"]),
    ({"source_layers": [3, 5], "target_layers": [1, 4]}, 8, ["target_layers", "below 3"]),
    ({"source_layers": [2], "target_layers": [5]}, 8, ["target_layers", "below 2"]),
    ({"source_layers": [7, -1], "target_layers": [0]}, 8, ["source_layers", "once"]),
    ({}, 1, ["target_layers", "1 blocks"]),
])  # fmt: skip
def test_layers_that_cannot_be_are_refused(choices, depth, words):
    with pytest.raises(ValueError) as error:
        EchoConfig(**choices).layers(depth)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(("field", "value"), [
    ("source_layers", []), ("source_layers", ["1"]), ("target_layers", [1.0]), ("target_modules", []),
    ("source_pooling", "max"), ("site", "input"), ("dora_echo", "both"), ("kd_detach", "yes"),
    ("step_mode", "two pass"), ("echo_start_probability", 1.1), ("echo_end_probability", -0.1),
    ("echo_end_probability", float("nan")), ("bottleneck", 0), ("bottleneck", 1.5), ("total_steps", 0),
    ("norm_eps", 0.0), ("norm_eps", float("inf")), ("kd_weight", -1.0), ("kd_weight", float("inf")),
    ("kd_weight", "1"), ("kd_temperature", 0.0), ("kd_temperature", float("inf")), ("seed", -1), ("seed", 1.0),
    ("scale", float("nan")), ("gate_bias", "x"), ("bottleneck", True), ("detach_source", "no"), ("answer_mask", 1),
])  # fmt: skip
def test_every_field_is_validated(field, value):
    with pytest.raises(ValueError, match=field):
        EchoConfig(**{field: value})


def test_a_single_name_is_not_a_sequence_of_names():
    with pytest.raises(TypeError, match="target_modules"):
        EchoConfig(target_modules="q_proj")


def test_an_echo_inside_the_magnitude_needs_the_output_site():
    with pytest.raises(ValueError, match="dora_echo"):
        EchoConfig(dora_echo="inside", site="rank")


def test_every_field_is_documented():
    for field in dataclasses.fields(EchoConfig):
        assert f"\n        {field.name}: " in EchoConfig.__doc__, field.name


def test_plain_values_give_the_configuration_back():
    config = EchoConfig(source_layers=(5,), target_layers=(1, 2), target_modules=("q_proj",), kd_weight=0.5)
    assert EchoConfig(**config.to_dict()) == config


def test_the_probability_falls_linearly_and_then_stays():
    config = EchoConfig(total_steps=100)
    assert [echo_probability(config, step) for step in (0, 50, 100, 1000)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_routing_follows_its_probability_and_nothing_else():
    config = EchoConfig(echo_start_probability=0.3, echo_end_probability=0.3, total_steps=1, seed=7)
    draws = [routed(config, step) for step in range(20_000)]
    assert sum(draws) / len(draws) == pytest.approx(0.3, abs=0.015)
    pairs = [a and b for a, b in itertools.pairwise(draws)]
    assert sum(pairs) / len(pairs) == pytest.approx(0.09, abs=0.01)
    assert draws[:500] == [routed(config, step) for step in range(500)]
    assert draws[:500] != [routed(dataclasses.replace(config, seed=8), step) for step in range(500)]


def test_certain_routing_is_certain():
    always, never = (EchoConfig(echo_start_probability=p, echo_end_probability=p) for p in (1.0, 0.0))
    assert all(routed(always, step) and not routed(never, step) for step in range(2000))
