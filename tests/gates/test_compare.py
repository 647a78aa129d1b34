"""Two networks on the same data: against sklearn-like counting by hand, McNemar's error, and bad questions."""

import copy
import json
import math

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import se_inject as si
from se_inject.cli.entry import cli
from se_inject.errors import DataError
from se_inject.gates import comparison_data
from tests.common import portrait, same_portrait
from tests.gates.test_excitations import Net, examples, in_batches, injected


def test_counts_are_those_by_hand():
    a, b = injected(seed=0), injected(seed=3)
    images, labels = examples(60)
    found = si.compare(a, b, in_batches(images, labels))
    with torch.no_grad():
        x, y = a(images), b(images)
    right = [(each.argmax(1) == labels) for each in (x, y)]
    assert found.examples == 60
    assert found.agreement == pytest.approx((x.argmax(1) == y.argmax(1)).double().mean().item())
    assert found.right == pytest.approx([each.double().mean().item() for each in right])
    assert found.only == (int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum()))
    paired = right[1].double() - right[0].double()
    assert found.difference == pytest.approx(paired.mean().item())
    assert found.error == pytest.approx(paired.std(correction=0).item() / math.sqrt(60))
    assert found.change == pytest.approx(((x - y).norm() / x.norm()).item(), rel=1e-4)
    assert found.blocks == (3, 3)


def test_a_network_is_itself():
    model = injected()
    found = si.compare(model, copy.deepcopy(model), in_batches(*examples()))
    assert (found.change, found.agreement, found.difference, found.error, found.only) == (0, 1, 0, 0, (0, 0))
    assert found.is_noise
    assert "noise" in str(found)


def test_fresh_blocks_change_nothing():
    plain = Net()
    found = si.compare(plain, si.inject(plain, torch.empty(2, 3, 12, 12)), in_batches(*examples()))
    assert found.change == 0
    assert found.blocks == (0, 3)
    assert found.params[1] - found.params[0] == si.plan(plain, torch.empty(2, 3, 12, 12)).cost().added.params


class Says(nn.Module):
    """A network that knows some of the answers."""

    def __init__(self, known):
        super().__init__()
        self.known, self.weight = known, nn.Parameter(torch.ones(()))

    def forward(self, x):
        number = x[:, 0, 0, 0].long()
        return (
            nn.functional.one_hot(torch.where(number < self.known, number % 3, (number + 1) % 3), 3).float()
            * self.weight
        )


def test_a_difference_is_more_than_noise_if_it_is_large():
    images = torch.arange(100.0).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    batches = [(images, torch.arange(100) % 3)]
    small, large = (si.compare(Says(50), Says(50 + more), batches) for more in (2, 20))
    assert (small.difference, large.difference) == (pytest.approx(0.02), pytest.approx(0.2))
    assert small.is_noise
    assert not large.is_noise
    assert large.error == pytest.approx(math.sqrt(0.2 * 0.8 / 100))
    assert "more than noise" in str(large)


def test_without_labels_and_without_scores():
    found = si.compare(injected(), injected(seed=1), [examples()[0]])
    assert (found.right, found.is_noise) == (None, None)
    assert found.agreement is not None
    assert "no labels: accuracy is not known" in str(found)
    conv = nn.Conv2d(3, 4, 1)
    found = si.compare(conv, conv, [examples()[0]])
    assert found.agreement is None
    assert "not scores of classes" in str(found)
    json.dumps(comparison_data(found), allow_nan=False)


def test_bad_questions_change_nothing():
    a, b = injected(), injected(seed=1)
    images, labels = examples()
    other = Net(classes=4)
    before = portrait(a), portrait(b)
    with pytest.raises(DataError, match="can't be compared"):
        si.compare(a, other, [images])
    with pytest.raises(DataError, match="not a class"):
        si.compare(a, b, [(images, labels + 1)])
    with pytest.raises(DataError, match="no example"):
        si.compare(a, b, [])
    with pytest.raises(DataError, match="fails on the data"):
        si.compare(a, b, [torch.ones(2, 5, 12, 12)])
    same_portrait(before[0], portrait(a))
    same_portrait(before[1], portrait(b))


def test_latency_beside():
    found = si.compare(injected(), injected(seed=1), [examples(4)], latency_seconds=0.05)
    assert found.latency is not None
    assert "rounds in turns" in str(found)


def test_the_command(tmp_path):
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torchvision.models.resnet import BasicBlock\nimport se_inject as si\n"
        "def net():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), BasicBlock(8, 8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())\n"
        "def with_blocks():\n    return si.inject(net(), torch.empty(2, 3, 12, 12), init='paper')\n"
        "def data():\n    torch.manual_seed(0)\n    return [(torch.randn(9, 3, 12, 12), torch.arange(9) % 8)]\n"
    )
    place = f"{tmp_path}/nets.py"
    command = ["compare", f"{place}:net", f"{place}:with_blocks", "--data", f"{place}:data"]
    done = CliRunner().invoke(cli, [*command, "--latency"])
    assert done.exit_code == 0, done.output
    assert "A  Sequential: " in done.output
    assert "1 block" in done.output
    assert "± " in done.output
    done = CliRunner().invoke(cli, [*command, "--json"])
    assert json.loads(done.stdout)["blocks"] == [0, 1]
