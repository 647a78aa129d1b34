"""Train the blocks alone, keep them in a small file, and put them onto a fresh copy of the backbone.

python examples/adapter.py
"""

import tempfile
from pathlib import Path

import torch
import torchvision

import se_inject as si


def backbone() -> torch.nn.Module:
    """Stands for a pretrained network: the same weights each time."""
    torch.manual_seed(0)
    return torchvision.models.resnet18()


def main() -> None:
    x, labels = torch.randn(8, 3, 64, 64), torch.randint(0, 1000, (8,))
    network = si.inject(backbone(), x, stages=[3, 4])
    si.freeze_backbone_(network, batch_norm=True).train()
    print(si.trainable(network))
    si.fuse_(network)  # the blocks add and activate themselves: the same numbers, faster on a GPU

    optimizer = torch.optim.AdamW(si.injected_parameters(network), lr=0.01, weight_decay=0)
    for _ in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.3f} with a frozen backbone")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "se.safetensors"
        si.save_adapter(network, path)
        again = si.load_adapter(backbone(), path, strict=True)
        print(f"adapter of {path.stat().st_size / 1e6:.1f} MB")
    with torch.no_grad():
        assert torch.equal(again.eval()(x), network.eval()(x))
    print("the same output, bit for bit")


if __name__ == "__main__":
    main()
