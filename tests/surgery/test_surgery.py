"""What people do with an injected network: compile, script, export, distribute, pickle, checkpoint."""

import copy
import inspect
import os
import pickle
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

import se_inject as si
from se_inject.errors import SurgeryError
from se_inject.surgery import swap as surgery
from tests.common import build, outputs, randomise

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def injected():
    """ResNet-18 with gates that are not one."""
    network = si.inject(randomise(build("torchvision:resnet18")), stages=[3, 4]).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in si.injected_parameters(network):
            parameter.normal_(0, 0.2, generator=generator)
    return network


@pytest.mark.parametrize(
    ("error", "raised"),
    [(RuntimeError("in the middle"), SurgeryError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["a failure", "Ctrl-C"],
)
def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch, error, raised):
    network = randomise(build("torchvision:resnet18"))
    plan = si.plan(network)
    kinds, keys = [type(m) for m in network.modules()], list(network.state_dict())
    real, calls = nn.Module.__setattr__, []

    def failing(module, name, value):
        if name == "__class__":
            calls.append(module)
            if len(calls) == 3:
                raise error
        real(module, name, value)

    monkeypatch.setattr(nn.Module, "__setattr__", failing)
    with pytest.raises(raised, match=None if raised is KeyboardInterrupt else "can't take another forward"):
        plan.apply_(network)
    monkeypatch.undo()
    assert [type(m) for m in network.modules()] == kinds
    assert list(network.state_dict()) == keys
    assert surgery.steps_of(network) == ()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script_trace_and_export_compute_the_same(injected):
    expected = injected(X)
    x5 = torch.randn(5, 3, 64, 64)
    for made in (
        torch.jit.script(injected),
        torch.jit.trace(injected, X),
        torch.export.export(injected, (X,)).module(),
    ):
        torch.testing.assert_close(made(X), expected)
    torch.testing.assert_close(torch.jit.script(injected)(x5), injected(x5))


def test_compile_computes_the_same(injected):
    compiled = torch.compile(copy.deepcopy(injected), backend="aot_eager")
    torch.testing.assert_close(compiled(X), injected(X))


def test_a_pickle_computes_the_same_in_a_fresh_process(injected, tmp_path):
    (tmp_path / "net.pickle").write_bytes(pickle.dumps((injected, X, injected(X).detach())))
    code = (
        "import pickle, torch; net, x, y = pickle.load(open('net.pickle', 'rb'))\n"
        "torch.set_num_threads(1); print(torch.equal(net(x), y), type(net.layer4[0]).__mro__[1].__name__)"
    )
    told = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True)
    assert told.split() == ["True", "BasicBlock"]


@pytest.mark.parametrize("change", [lambda m: m.bfloat16(), lambda m: m.to(memory_format=torch.channels_last)])
def test_blocks_take_dtype_and_memory_format_of_what_is_around(change):
    network = change(randomise(build("torchvision:resnet18")))
    near = network.layer4[0].conv1.weight
    x = X.to(near.dtype)
    made = si.inject(network, stages=[4])
    assert {p.dtype for p in si.injected_parameters(made)} == {near.dtype}
    assert all(torch.equal(a, b) for a, b in zip(outputs(network, x), outputs(made, x), strict=True))


def test_activation_checkpointing_gives_the_same_gradients(injected):
    def gradients(run):
        injected.zero_grad()
        run(injected.layer3(injected.layer2(injected.layer1(injected.maxpool(injected.conv1(X)))))).sum().backward()
        return [p.grad.clone() for p in injected.layer4.parameters()]

    plain = gradients(injected.layer4)
    again = gradients(lambda x: checkpoint(injected.layer4, x, use_reentrant=False))
    assert plain
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_equal_blocks_share_one_class_and_show_their_source(injected):
    first, second = injected.layer4[0], injected.layer4[1]
    other = si.inject(build("torchvision:resnet18"), stages=[4]).layer4[1]
    assert type(second) is not type(first)
    assert type(si.inject(build("torchvision:resnet18"), stages=[4]).layer4[1]) is type(other)
    assert "self.se(" in inspect.getsource(type(second).forward)


def worker(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for kind in ("ddp", "fsdp2"):
        torch.manual_seed(0)
        network = si.inject(randomise(build("torchvision:resnet18")), stages=[4]).eval()
        if kind == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(network)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            wrapped = fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
        wrapped(X + rank).sum().backward()
        reached = all(p.grad is not None for name, p in wrapped.named_parameters() if ".se." in name)
        results[kind, rank] = reached and isinstance(network.layer4[0], torch.nn.Module)
    dist.destroy_process_group()
    os._exit(0)  # see examples/finetune_distributed.py: a thread of gloo's may abort an ordinary end


def test_two_processes_train_it():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (port, results), nprocs=2)
        assert dict(results) == {(kind, rank): True for kind in ("ddp", "fsdp2") for rank in (0, 1)}
