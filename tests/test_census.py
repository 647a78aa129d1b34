"""A part of the census, one network for each kind of site; and what its committed results promise."""

import pytest

from tests.census import strangers
from tests.census.run import HERE, check_one, plan_one, read_results, representatives

PART = {
    "torchvision:squeezenet1_1": "concat",
    "torchvision:shufflenet_v2_x0_5": "concat",
    "timm:resnet10t": "residual",
    "timm:res2net50_48w_2s": "residual",
    "timm:mobilenetv3_small_050": "residual",
    "timm:repvgg_a0": "sum",
    "timm:lcnet_035": "conv",
    "timm:hrnet_w18_small": "residual",
}


@pytest.mark.parametrize("name", PART)
def test_planned(name):
    row = plan_one(name)
    assert PART[name] in row["sites"] and row["conv_share"] > 0.5


@pytest.mark.parametrize("name", PART)
def test_comes_out_the_same(name):
    row = check_one(name, with_onnx=name == "torchvision:squeezenet1_1")
    assert row["checked"], row["checks"]
    if "onnx" in row:
        assert row["onnx"] < 1e-3


def test_no_network_came_out_changed():
    rows = read_results(HERE / "results.jsonl")
    checked = {name for name, row in rows.items() if "checked" in row}
    assert len(rows) > 1400 and len(checked) > 250
    changed = [name for name in checked if rows[name]["checked"] is False]
    assert not changed
    assert checked <= set(representatives(rows).values())


def test_no_stranger_came_out_changed():
    rows = read_results(HERE / "strangers.jsonl")
    assert len(rows) > 100 and len({name.partition(":")[0] for name in rows}) > 10
    assert [name for name, row in rows.items() if strangers.is_changed(row)] == []
    assert all(strangers.why(row) or row["same"] for row in rows.values())
