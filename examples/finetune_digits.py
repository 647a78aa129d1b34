"""Train a torchvision ResNet-18 a little on scikit-learn's digits, put SE blocks into it, and go on with those alone.

The backbone is frozen: only the SE blocks and the classifier learn, and the loss goes on from where it was, because
the blocks start as identities. Ends with an ONNX file. About 20 seconds on two CPU cores.

    python examples/finetune_digits.py
"""

import tempfile
from pathlib import Path

import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import se_inject as si


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1,797 handwritten digits, as three equal channels of 32×32."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=32, mode="bilinear").repeat(1, 3, 1, 1)
    return images, torch.tensor(data.target)


def train(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int, rate: float) -> None:
    """A few steps of Adam on whatever is not frozen."""
    optimizer = torch.optim.Adam((p for p in network.parameters() if p.requires_grad), lr=rate)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()


@torch.no_grad()
def loss_of(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return cross_entropy(network.eval()(images), labels).item()


def main() -> None:
    torch.manual_seed(0)
    images, labels = digits()
    held_out = images[1500:], labels[1500:]
    backbone = torchvision.models.resnet18(num_classes=10)
    train(backbone.train(), images[:1500], labels[:1500], steps=16, rate=1e-3)
    print(f"backbone alone           loss {loss_of(backbone, *held_out):.3f}")

    network = si.inject(backbone, images[:2], stages=[3, 4], reduction=16)
    print(f"with SE blocks, untrained loss {loss_of(network, *held_out):.3f}")

    network.requires_grad_(False)
    for parameter in (*si.injected_parameters(network), *network.fc.parameters()):
        parameter.requires_grad_(True)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    print(f"training {trainable:,} of {sum(p.numel() for p in network.parameters()):,} parameters")
    si.fuse_(network)  # each block takes over the addition and the ReLU behind it
    before = loss_of(network, *held_out)
    train(network.eval(), images[:1500], labels[:1500], steps=30, rate=3e-3)  # eval: BN statistics are frozen too
    after = loss_of(network, *held_out)
    print(f"with SE blocks, trained   loss {after:.3f}")
    assert after < before

    with tempfile.TemporaryDirectory() as folder:
        fast = si.for_inference(network, images[:2])  # norms folded, blocks fused; checked against the network
        exported = si.export(fast, Path(folder) / "digits.onnx", images[:2])
        print(f"wrote {exported.path.name}: {exported.how}")


if __name__ == "__main__":
    main()
