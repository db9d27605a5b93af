"""What a fused model calls of ours."""

import pytest

from echolora_kernels.integrations import fused, grouped


@pytest.fixture
def groups(monkeypatch):
    """The projections of every call of our group operator by fused layers, which few rows suffice for."""
    monkeypatch.setattr(grouped, "MIN_ROWS", 1)
    made, operator = [], grouped.echo_lora_linear_group

    def together(x, projections, **named):
        made.append(projections)
        return operator(x, projections, **named)

    monkeypatch.setattr(grouped, "echo_lora_linear_group", together)
    return made


@pytest.fixture
def calls(monkeypatch, groups):
    """The arguments of every computation of a fused layer by our operators, alone or in a group."""
    made, operator, together = [], fused.echo_lora_linear, grouped.echo_lora_linear_group
    monkeypatch.setattr(fused, "echo_lora_linear", lambda x, **named: made.append(named) or operator(x, **named))

    def group(x, projections, **named):
        made.extend(vars(projection) | named for projection in projections)
        return together(x, projections, **named)

    monkeypatch.setattr(grouped, "echo_lora_linear_group", group)
    return made
