"""Put SE blocks into a network of your own, look at what they cost, and write it to a file.

python examples/own_module.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import se_inject as si


class Block(nn.Module):
    """A residual block as people write it, with one ReLU for all and `+=`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x
        return self.relu(y)


class Net(nn.Module):
    """A stem, two stages and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.stage1 = nn.Sequential(Block(32), Block(32))
        self.down = nn.Conv2d(32, 64, 2, stride=2)
        self.stage2 = nn.Sequential(Block(64), Block(64))
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage1(self.stem(x))
        x = self.stage2(self.down(x))
        return self.head(x.mean((2, 3)))


def main() -> None:
    network = Net().eval()
    x = torch.randn(4, 3, 32, 32)

    plan = si.plan(network, x, stages=[2], reduction=8)
    print(plan)
    cost = plan.cost()
    print(f"\nparameters: {cost.before.params:,} + {cost.added.params:,}")

    injected = plan.apply(network)
    assert isinstance(injected, Net)
    assert torch.equal(injected(x), network(x)), "at the identity start nothing has changed"
    print("output unchanged, bit for bit:", si.verify(network, injected, x).passed)

    si.fuse_(injected)
    print(si.fused(injected))
    assert torch.equal(injected(x), network(x)), "fused, it is still the same"

    with tempfile.TemporaryDirectory() as folder:
        exported = si.export(injected, Path(folder) / "net-se.onnx", x)
        print(f"wrote {exported.path.name}: {exported.how}")


if __name__ == "__main__":
    main()
