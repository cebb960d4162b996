"""Attention layers in one network: the same start, and what they cost."""

from __future__ import annotations

import pytest
import torch
from timm.layers import SqueezeExcite
from torch import nn

from benchmarks.claims.layers import Layer, costs_table, macs, parameters, started, times

pytestmark = pytest.mark.usefixtures("one_thread")


class Small(nn.Module):
    """Two convolutions, and an attention between them; its weights are drawn between theirs."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.attn = layer(8) if layer else nn.Identity()
        self.second = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.attn(self.first(x)))


class Replaced(Small):
    """Lacks a convolution where it has attention."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        if layer:
            del self.second


def test_networks_begin_with_the_same_weights():
    plain, own, other = started(Small, None, 3), started(Small, SqueezeExcite, 3), started(Small, SqueezeExcite, 4)
    for name, weight in plain.state_dict().items():
        assert torch.equal(own.state_dict()[name], weight)
    assert not torch.equal(own.state_dict()["second.weight"], other.state_dict()["second.weight"])
    with pytest.raises(ValueError, match=r"lacks second\.weight, second\.bias: insert"):
        started(Replaced, SqueezeExcite, 0)


def test_costs_are_those_of_the_layers():
    model = Small(None)
    assert parameters(model) == 3 * 8 * 9 + 8 + 8 * 4 + 4
    assert macs(model, torch.zeros(1, 3, 6, 5)) == 30 * (3 * 8 * 9 + 8 * 4)


def test_models_run_in_turns_and_the_first_turn_does_not_count():
    calls = []
    models = {name: nn.Identity() for name in "ab"}
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: calls.append(name))
    found = times(models, torch.zeros(1), turns=3)
    assert calls == list("abababab") and [len(own) for own in found.values()] == [3, 3]
    assert min(map(min, found.values())) > 0


def test_the_table_of_costs_has_a_row_for_each_layer():
    images = torch.zeros(2, 3, 8, 8)
    table = costs_table("title", Small, {"none": None, "SE": SqueezeExcite}, images, turns=2)
    assert [row[0] for row in table.rows] == ["none", "SE"] and table.rows[0][3] == "1.00"
    assert table.rows[1][1] == f"{parameters(Small(SqueezeExcite)) / 1e3:.1f} k"
    assert table.header[3] == "forward time, batch 2, over none"
