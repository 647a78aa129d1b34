"""The rows of a network's own modules: they add up, agree with closed forms, and mark the blocks."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import se_inject as si
from se_inject.cost import module_costs
from se_inject.tracing import observe_model

IMAGES = torch.rand(2, 3, 64, 64)


def rows(network, images=IMAGES):
    return {row.path: row for row in module_costs(network, observe_model(network, images)).rows}


def test_rows_agree_with_closed_forms_and_add_up():
    network = resnet18()
    found = rows(network)
    conv = found["layer2.0.conv1"]  # 64 → 128 channels, 3×3, to 8×8
    assert (conv.cost.params, conv.cost.macs) == (64 * 128 * 9, 64 * 128 * 9 * 8 * 8)
    assert (found["fc"].cost.params, found["fc"].cost.macs) == (512 * 1000 + 1000, 512 * 1000)
    assert conv.output[1:] == (128, 8, 8)
    for path, row in found.items():
        parts = [
            other for other in found.values() if other.path and other.path.rpartition(".")[0] == path and other != row
        ]
        if parts and path:
            assert sum(part.cost.macs for part in parts) == row.cost.macs, path
            assert sum(part.cost.params for part in parts) == row.cost.params, path
    whole = si.plan(network, IMAGES).cost().before
    assert found[""].cost == whole
    assert list(found)[:4] == ["", "conv1", "bn1", "relu"]


def test_blocks_are_marked_and_cost_what_the_plan_says():
    network = resnet18()
    plan = si.plan(network, IMAGES, stages=[3, 4])
    injected = plan.apply(network)
    found = rows(injected)
    report = plan.cost()
    for step, row in zip(plan.steps, report.rows, strict=True):
        assert (found[step.path].block, found[step.path].cost) == ("se", row.cost)
    assert found["layer4.0"].kind == "BasicBlock"
    assert found[""].cost == report.after
    assert sum(row.block is not None for row in found.values()) == 4
    assert {row.path for row in rows(network).values() if row.block} == set()


def test_a_module_that_is_called_twice_counts_twice_and_its_weights_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x))

    network = Twice()
    conv = rows(network)["conv"]
    assert (conv.calls, conv.cost.params, conv.cost.macs) == (2, 84, 2 * 81 * 64 * 64)


def test_depth_leaves_out_what_is_inside_but_no_block():
    injected = si.inject(resnet18(), IMAGES, stages=[4])
    table = module_costs(injected, observe_model(injected, IMAGES))
    shown = [row.path for row in table.within(1).rows]
    assert "layer4" in shown and "layer4.0" not in shown and "layer4.0.se" in shown
    assert [row.path for row in table.within(0).rows] == ["", "layer4.0.se", "layer4.1.se"]
    assert "◆ se" in str(table)
    assert repr(table).startswith("<ModuleCosts: ")


def test_nothing_is_left_on_the_network():
    network = resnet18()
    rows(network)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("style", ["csv", "markdown"])
def test_other_styles_have_no_indentation(style):
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3)))
    text = module_costs(network, observe_model(network, IMAGES)).text(style)
    assert "0.0" in text and "  0.0,Conv2d" not in text
