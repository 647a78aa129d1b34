"""Fine-tune a network with SE blocks on one process or on several, with checkpoints that either kind goes on from.

    python examples/finetune_distributed.py
    torchrun --nproc-per-node 2 examples/finetune_distributed.py --strategy fsdp --checkpoint run -o digits.onnx
    torchrun --nproc-per-node 4 examples/finetune_distributed.py --strategy ddp --checkpoint run --epochs 4

The blocks are put in before the network is wrapped (DDP) or sharded (FSDP2). A checkpoint is written by
torch.distributed.checkpoint after every epoch; it doesn't depend on the number of processes or on the strategy. At the
end the whole network is put together on the first process. On scikit-learn's digits, a few seconds an epoch.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, interpolate
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import se_inject as si


def digits() -> tuple[TensorDataset, TensorDataset]:
    """800 handwritten digits to learn from and 200 to test with, as three equal channels of 32×32."""
    data = load_digits()
    images = torch.tensor(data.images[:1000], dtype=torch.float32)[:, None] / 16
    images = interpolate(images, size=32, mode="bilinear").repeat(1, 3, 1, 1)
    labels = torch.tensor(data.target[:1000])
    return TensorDataset(images[:800], labels[:800]), TensorDataset(images[800:], labels[800:])


def injected() -> nn.Module:
    """The network, the same on every process. Yours would load its weights here, before the blocks are put in."""
    torch.manual_seed(0)
    network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    return si.inject(network, torch.zeros(2, 3, 32, 32), stages=[3, 4])


def distributed(network: nn.Module, strategy: str) -> nn.Module:
    """The network as it is trained: on several processes wrapped, or sharded stage by stage."""
    if not dist.is_initialized():
        return network
    if strategy == "ddp":
        return DistributedDataParallel(network)
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        fully_shard(stage)
    return fully_shard(network)


def average_statistics(network: nn.Module) -> None:
    """Batch normalisation's running statistics are each process's own: the mean of all is kept."""
    for buffer in network.buffers() if dist.is_initialized() else ():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


def train_epoch(network: nn.Module, optimizer: torch.optim.Optimizer, data: TensorDataset, epoch: int) -> None:
    """One pass over this process's share of the data."""
    sampler = DistributedSampler(data) if dist.is_initialized() else None
    if sampler is not None:
        sampler.set_epoch(epoch)
    shuffled = torch.Generator().manual_seed(epoch)
    for images, labels in DataLoader(data, 64, shuffle=sampler is None, sampler=sampler, generator=shuffled):
        optimizer.zero_grad()
        cross_entropy(network.train()(images), labels).backward()
        optimizer.step()
    average_statistics(network)


@torch.no_grad()
def loss_of(network: nn.Module, data: TensorDataset) -> float:
    """The same on every process: each calls the network on all of the data."""
    images, labels = data.tensors
    return cross_entropy(network.eval()(images), labels).item()


def last_checkpoint(folder: Path | None) -> Path | None:
    """The newest checkpoint that is complete: its metadata is written last."""
    done = [path.parent for path in folder.glob("epoch-*/.metadata")] if folder is not None else []
    return max(done, key=lambda path: int(path.name.removeprefix("epoch-")), default=None)


def say(text: str) -> None:
    """Print it once, not once a process."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--checkpoint", type=Path, help="a folder: one is written after every epoch, and the last gone on from"
    )
    parser.add_argument("-o", "--output", type=Path, help="export the network to this file at the end")
    options = parser.parse_args()
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")

    train_data, test_data = digits()
    bare = injected()
    network = distributed(bare, options.strategy)
    blocks = list(si.injected_parameters(bare))  # of the sharded network, if it is: after the wrapping
    own = {id(parameter) for parameter in blocks}
    others = [parameter for parameter in bare.parameters() if id(parameter) not in own]
    optimizer = torch.optim.AdamW([{"params": others, "lr": 1e-3}, {"params": blocks, "lr": 3e-3, "weight_decay": 0}])

    alone = not dist.is_initialized()
    first = 0
    if (checkpoint := last_checkpoint(options.checkpoint)) is not None:
        model_state, optimizer_state = get_state_dict(network, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "epochs": 0}
        dcp.load(state, checkpoint_id=checkpoint, no_dist=alone)
        set_state_dict(network, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        first = state["epochs"]
        say(f"resumed after epoch {first}: loss {loss_of(network, test_data):.6f}")
    for epoch in range(first, options.epochs):
        train_epoch(network, optimizer, train_data, epoch)
        say(f"epoch {epoch + 1}: loss {loss_of(network, test_data):.6f}")
        if options.checkpoint is not None:
            model_state, optimizer_state = get_state_dict(network, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state, "epochs": epoch + 1}
            dcp.save(state, checkpoint_id=options.checkpoint / f"epoch-{epoch + 1}", no_dist=alone)

    whole = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if alone or dist.get_rank() == 0:
        trained = injected()
        trained.load_state_dict(whole)
        say(f"put together: loss {loss_of(trained, test_data):.6f}")
        if options.output is not None:
            exported = si.export(trained, options.output, test_data.tensors[0][:2], dynamic_size=True, force=True)
            say(f"wrote {exported.path}: {exported.how}, input {exported.shapes[0]}")
    if not alone:
        dist.destroy_process_group()
        # torch's caches keep a sharded network's group, and a thread of gloo's that is still at work when Python ends
        # aborts the process (about once in a hundred runs): end it without Python's own end.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
