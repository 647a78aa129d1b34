"""Train a small network with SE blocks on scikit-learn's digits, look at what its gates do, and drop what is not needed.

Draws the paper's Figure 6 for it (the gates of every block, by class), colours the network by how much each gate varies,
folds away the blocks whose gates hardly depend on the image, and compares the two networks. About 30 seconds.

    python examples/which_blocks_matter.py [FOLDER]     # keeps the pictures and the report in FOLDER
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models.resnet import BasicBlock

import se_inject as si


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1,797 handwritten digits of 8×8 pixels."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def network() -> nn.Module:
    """A residual network of three stages for images of 8×8 pixels."""

    def stage(before: int, after: int, stride: int) -> nn.Sequential:
        side = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        return nn.Sequential(BasicBlock(before, after, stride, side), BasicBlock(after, after))

    stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(stem, stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2), head)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    images, labels = digits()
    batches = [(images[i : i + 64], labels[i : i + 64]) for i in range(1200, 1797, 64)]  # held out
    plan = si.plan(network(), images[:2], reduction=4)
    assert plan.trace is not None
    model = plan.apply(plan.trace.model)

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(250):
        chosen = torch.randint(1200, (64,))
        optimizer.zero_grad()
        cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    model.eval()

    gates = si.excitations(model, batches, classes=[f"digit {number}" for number in range(10)])
    print(gates)
    gates.plot(folder / "gates.png", classes=["digit 0", "digit 1", "digit 7"], force=True)
    plan.draw(gates=gates).save(folder / "network.svg", force=True)

    before = copy.deepcopy(model)
    pruned = si.prune_blocks_(model, gates, tolerance=0.05)
    print(f"\n{pruned}\n")
    print(si.compare(before, model, batches))
    command = "python examples/which_blocks_matter.py FOLDER"
    si.report(plan, folder / "report.html", gates=gates, command=command, force=True)

    pruned.undo_(model, images[:2])
    with torch.no_grad():
        assert torch.equal(model(images[:8]), before(images[:8]))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
