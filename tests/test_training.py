"""Training an injected network: what is trainable, optimizers, averages, scalers, compiled steps, several processes."""

import contextlib
import copy
import os
import pickle
import socket
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torchvision
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock

import se_inject as si
from se_inject.errors import OptionError, SurgeryError
from tests.common import randomise

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def resnet(seed=0):
    torch.manual_seed(seed)
    return randomise(torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7), seed)


def injected(**options):
    return si.inject(resnet(), X, **({"stages": [2, 3]} | options))


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def changed(before, model):
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


def step(network, optimizer, x=X):
    optimizer.zero_grad()
    loss = network(x).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def new_keys(network):
    return {key for key in network.state_dict() if ".se." in key}


# -- what is trainable -------------------------------------------------------------------------------------


def test_only_the_blocks_learn_in_a_frozen_network():
    network = injected().train()
    assert si.freeze_backbone_(network) is network
    before = state(network)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step moves W2, the second W1
        step(network, optimizer)
    statistics = {key for key in before if key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert changed(before, network) == new_keys(network) | statistics


@pytest.mark.parametrize("block", ["se", "bam"])
def test_frozen_statistics_stay_bit_for_bit_also_after_train(block):
    network = injected(block=block)
    si.freeze_backbone_(network, batch_norm=True)
    before = state(network)
    optimizer = torch.optim.SGD(si.injected_parameters(network), lr=1.0)
    for _ in range(2):
        network.train()
        step(network, optimizer)
    learned = changed(before, network)
    assert learned <= new_keys(network)
    assert {key.rpartition(".")[2] for key in learned} >= {"weight", *(["running_var"] if block == "bam" else [])}
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {name for name, module in norms.items() if module.training} == {name for name in norms if ".se." in name}
    assert network.training
    assert network.layer2[0].training


def test_a_frozen_network_in_training_computes_what_it_computes_in_eval():
    network = si.freeze_backbone_(injected(), batch_norm=True)
    with torch.no_grad():
        assert torch.equal(network.train()(X), resnet().eval()(X))


def test_frozen_networks_are_copied_pickled_loaded_scripted_and_exported(tmp_path):
    network = si.freeze_backbone_(injected(), batch_norm=True).train()
    torch.save(network, tmp_path / "net.pt")
    made = [copy.deepcopy(network), pickle.loads(pickle.dumps(network)), si.load(tmp_path / "net.pt")]
    for twin in made:
        assert not any(module.training for module in twin.train().modules() if isinstance(module, nn.BatchNorm2d))
        assert type(twin.bn1) is type(network.bn1)
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in network.parameters()]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        for twin in (*made, torch.jit.script(network), torch.export.export(network.eval(), (X,)).module()):
            torch.testing.assert_close(twin(X), network(X), rtol=1e-6, atol=1e-6)
    assert isinstance(network.bn1, nn.BatchNorm2d)
    assert repr(network.bn1).startswith("FrozenBatchNorm2d(64")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("undo", [si.unfreeze_backbone_, si.eject_])
def test_frozen_statistics_thaw(undo, training):
    network = si.freeze_backbone_(injected(), batch_norm=True).train(training)
    undo(network)
    assert type(network.bn1) is nn.BatchNorm2d
    assert all(module.training is training for module in network.modules())


def test_thawing_lets_all_be_trained_and_freezing_again_thaws_nothing():
    network = si.freeze_backbone_(injected(block="bam"), batch_norm=True)
    network.requires_grad_(True)
    assert not network.train().bn1.training  # what torch alone can undo
    si.freeze_backbone_(network)
    assert not network.train().bn1.training and si.trainable(network).frozen_norms > 0
    si.unfreeze_backbone_(network, batch_norm=False)
    assert all(p.requires_grad for p in network.parameters()) and not network.bn1.training
    assert si.unfreeze_backbone_(network) is network
    before = state(network)
    assert str(si.trainable(network)).endswith("(100.0 %)")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):
        step(network, optimizer)
    assert changed(before, network) >= {*resnet().state_dict()}


def test_a_network_without_blocks_thaws():
    network = resnet().requires_grad_(False)
    network.register_parameter("count", nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False))
    si.unfreeze_backbone_(network)
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["count"]


def test_norms_of_other_kinds_are_frozen_with_their_own_class():
    import timm

    network = timm.create_model("test_resnet")
    network = si.freeze_backbone_(si.inject(network, X), batch_norm=True).train()
    before = state(network)
    network(X)
    assert changed(before, network) == set()
    frozen = [module for module in network.modules() if type(module).__name__.startswith("Frozen")]
    assert len(frozen) == si.trainable(network).frozen_norms > 0


def test_freezing_needs_blocks():
    with pytest.raises(SurgeryError, match="no block"):
        si.freeze_backbone_(resnet())
    with pytest.raises(SurgeryError, match="no block"):
        list(si.injected_parameters(resnet()))


def test_the_line_about_resnet50():
    with torch.device("meta"):
        network = si.inject(torchvision.models.resnet50(), X)
    assert str(si.trainable(network)) == "trainable 28.1 M of 28.1 M (100.0 %)"
    si.freeze_backbone_(network)
    counted = si.trainable(network)
    assert (counted.params, counted.total) == (2_530_992, 28_088_024)
    assert str(counted) == "trainable 2.5 M of 28.1 M (9.0 %)"
    si.freeze_backbone_(network, batch_norm=True)
    assert str(si.trainable(network)).endswith(", statistics of 53 batch normalisations frozen")


# -- optimizers --------------------------------------------------------------------------------------------


def groups_of(kind, network, count):
    parameters = list(network.parameters())
    size = -(-len(parameters) // count)
    return kind([{"params": parameters[i : i + size], "lr": 0.1 / (i + 1)} for i in range(0, len(parameters), size)])


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_group_is_added_and_nothing_else_is_touched(kind, count, steps):
    network = resnet()
    optimizer = groups_of(kind, network, count)
    for _ in range(steps):
        step(network, optimizer)
    groups = [(id(group), dict(group), list(group["params"])) for group in optimizer.param_groups]
    held = {key: (id(value), dict(value)) for key, value in optimizer.state.items()}
    si.plan(network, X, stages=[3]).apply_(network)
    group = si.add_to_optimizer(optimizer, network, lr=0.5, weight_decay=0.0)
    assert [(id(g), dict(g), list(g["params"])) for g in optimizer.param_groups[:-1]] == groups
    assert {key: (id(value), dict(value)) for key, value in optimizer.state.items()} == held
    assert group is optimizer.param_groups[-1]
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.5, 0.0, 4)
    assert set(group) == set(optimizer.param_groups[0])
    before = state(network)
    step(network, optimizer)
    assert {"layer3.0.se.fc2.weight", "conv1.weight"} <= changed(before, network)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(network, optimizer)


def test_an_optimizer_with_names_gets_names():
    network = resnet()
    optimizer = torch.optim.SGD(network.named_parameters(), lr=0.1)
    si.plan(network, X, stages=[3]).apply_(network)
    group = si.add_to_optimizer(optimizer, network)
    assert group["param_names"] == [f"layer3.0.se.{n}.{kind}" for n in ("fc1", "fc2") for kind in ("weight", "bias")]


def test_what_is_not_added():
    network = injected()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    before = optimizer.state_dict()
    with pytest.raises(OptionError, match="8 of 8 injected parameters are in the optimizer already") as caught:
        si.add_to_optimizer(optimizer, network)
    assert "`layer2.0.se.fc1.weight`" in caught.value.seen
    with pytest.raises(OptionError, match="SGD has no option `momentun`") as caught:
        si.add_to_optimizer(torch.optim.SGD(network.fc.parameters()), network, momentun=0.9)
    assert caught.value.hint == "did you mean `momentum`?"
    with pytest.raises(SurgeryError, match="no block"):
        si.add_to_optimizer(optimizer, resnet())
    with pytest.raises(SurgeryError, match="no parameters"):
        si.add_to_optimizer(optimizer, si.inject(resnet(), X, block="simam"))
    assert optimizer.state_dict() == before


@pytest.mark.parametrize(("init", "gate"), [("identity", 1.0), ("paper", 0.5)])
def test_weight_decay_pulls_the_gate_to_where_the_docstring_says(init, gate):
    network = injected(stages=[3], init=init).eval()
    block = network.layer3[0].se
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.uniform_(-1, 1)
    optimizer = torch.optim.SGD(network.fc.parameters(), lr=0.1)
    si.add_to_optimizer(optimizer, network, lr=1.0, weight_decay=0.5)
    for _ in range(60):
        for parameter in block.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    x = torch.rand(2, 256, 4, 4) + 0.5
    torch.testing.assert_close(block(x) / x, torch.full_like(x, gate))


# -- averages, scalers, compiled steps ---------------------------------------------------------------------


def test_an_exponential_moving_average():
    network = injected().train()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    expected = state(network)
    for number in range(3):
        step(network, optimizer)
        average.update_parameters(network)
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                expected[key] = value.clone() if number == 0 else expected[key].lerp(value, 0.1)
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[key])
    assert [step.path for step in si.plan_of(average.module).steps] == ["layer2.0.se", "layer3.0.se"]
    assert not torch.equal(average.module.layer2[0].se.fc2.weight, network.layer2[0].se.fc2.weight)


def test_a_gradient_scaler_steps_as_if_it_were_not_there():
    scaled, plain = injected().train(), injected().train()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for network in (scaled, plain):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = network(X).square().mean()
            if network is scaled:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
    before = state(injected())
    assert new_keys(scaled) <= changed(before, scaled)
    assert scaler.get_scale() == 1024.0
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(scaled.state_dict()[key], value, rtol=1e-3, atol=1e-5)


def test_a_gradient_scaler_leaves_out_a_step_that_overflows():
    network = injected().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = network(X).square().mean()
    scaler.scale(loss).backward()
    before = state(network)
    scaler.step(optimizer)
    scaler.update()
    assert changed(before, network) == set()
    assert scaler.get_scale() == 2.0**59


@pytest.mark.parametrize("frozen", [False, True])
def test_a_compiled_training_step(frozen):
    networks = [injected().train() for _ in range(2)]
    losses = []
    for network, compile in zip(networks, (lambda n: n, lambda n: torch.compile(n, backend="aot_eager")), strict=True):
        if frozen:
            si.freeze_backbone_(network, batch_norm=True)
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
        run = compile(network)
        losses.append([step(run, optimizer) for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert new_keys(networks[1]) <= changed(state(injected()), networks[1])
    for one, other in zip(networks[0].state_dict().values(), networks[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# -- blocks off ----------------------------------------------------------------------------------------------


def strong(**options):
    """Blocks that change much, with statistics of their own."""
    network = injected(**options).eval()
    torch.manual_seed(3)
    for parameter in si.injected_parameters(network):
        nn.init.normal_(parameter, std=0.5)
    return randomise(network, 1)


def without(network):
    return si.eject_(copy.deepcopy(network))


@pytest.mark.parametrize("options", [{}, {"block": "bam", "position": "post"}, {"position": "pre"}])
@pytest.mark.parametrize("training", [False, True])
def test_blocks_are_off_inside_and_on_outside(options, training):
    network = strong(**options).train(training)
    plain, before = without(network), state(network)
    classes = [type(module) for module in network.modules()]
    blocks = {key for key in before if key not in plain.state_dict()}
    with si.disabled(network) as same:
        assert same is network
        with si.disabled(network), torch.no_grad():
            assert torch.equal(network(X), plain(X))
        assert torch.equal(network(X), plain(X))
        loss = network(X).square().mean()
        loss.backward()
        assert not changed(before, network) & blocks
        twins = [copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    assert all(parameter.grad is None for parameter in si.injected_parameters(network))
    assert [type(module) for module in network.modules()] == classes
    for twin in (network, *twins):
        assert [type(module) for module in twin.modules()] == classes
        assert not torch.equal(twin.eval()(X), plain.eval()(X))


def test_fused_blocks_are_off_too():
    network = strong()
    plain, expected = without(network), network(X)
    si.fuse_(network)
    with si.disabled(network), torch.no_grad():
        assert torch.equal(network(X), plain(X))
    torch.testing.assert_close(network(X), expected)
    assert torch.equal(si.unfuse_(network)(X), expected)


def test_an_exception_leaves_the_blocks_on():
    network = strong()
    expected = network(X)
    with pytest.raises(ZeroDivisionError), si.disabled(network):
        1 / 0  # noqa: B018
    assert torch.equal(network(X), expected)
    with pytest.raises(SurgeryError), si.disabled(resnet()):
        pass


def test_other_threads_have_the_blocks_on():
    network = strong()
    plain = without(network)
    expected = {True: plain(X), False: network(X)}
    barrier, wrong = threading.Barrier(4), []

    def work(off):
        barrier.wait()
        for _ in range(10):
            with si.disabled(network) if off else contextlib.nullcontext(), torch.no_grad():
                if not torch.equal(network(X), expected[off]):
                    wrong.append(off)

    threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert type(network.layer2[0].se).__name__ == "SqueezeExcitation" and not vars(type(network.layer2[0].se)).get(
        "_se_inject_always_on"
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo of torch 2.9 asks for it
def test_a_compiled_network_is_compiled_again_without_blocks():
    network = strong()
    plain = without(network)
    compiled = torch.compile(network, backend="eager")
    expected = compiled(X)
    for _ in range(2):
        with si.disabled(network):
            assert torch.equal(compiled(X), plain(X))
        assert torch.equal(compiled(X), expected)
    torch._dynamo.reset()


def test_what_is_exported_inside_has_no_blocks_and_what_was_before_has(tmp_path):
    network = strong()
    plain = without(network)
    before = torch.export.export(network, (X,)).module()
    with si.disabled(network):
        inside = torch.export.export(network, (X,)).module()
        assert not torch.equal(before(X), network(X))
    torch.testing.assert_close(inside(X), plain(X))


# -- several processes -------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def sharded(rank, port, folder, results):
    """Train on two processes, save a checkpoint, load it into a fresh network, and compare."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    network = injected().eval()  # or else each process has running statistics of its own
    before = state(network)
    fully_shard(network, mesh=mesh)
    step(network, torch.optim.SGD(network.parameters(), lr=0.1), X + rank)
    dcp.save({"model": get_model_state_dict(network)}, checkpoint_id=folder)
    expected = network(X).detach()

    fresh = fully_shard(injected(), mesh=mesh)
    loaded = {"model": get_model_state_dict(fresh)}
    dcp.load(loaded, checkpoint_id=folder)
    set_model_state_dict(fresh, loaded["model"])
    full = {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in loaded["model"].items()
    }
    results[rank] = (
        torch.equal(fresh.eval()(X).detach(), expected),
        list(full) == list(before),
        all(not torch.equal(full[key], before[key]) for key in new_keys(fresh) if "fc2" in key),
    )
    dist.destroy_process_group()
    os._exit(0)  # see examples/finetune_distributed.py: a thread of gloo's may abort an ordinary end


def test_a_distributed_checkpoint_is_loaded_back(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(sharded, (free_port(), tmp_path / "checkpoint", results), nprocs=2)
        assert dict(results) == {0: (True, True, True), 1: (True, True, True)}


def test_a_distributed_checkpoint_of_one_process_gives_the_same_network(tmp_path):
    network = injected()
    with torch.no_grad():
        for parameter in si.injected_parameters(network):
            parameter.uniform_(-1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is one process only
        dcp.save(network.state_dict(), checkpoint_id=tmp_path / "checkpoint", no_dist=True)
        loaded = injected().state_dict()
        dcp.load(loaded, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    other = injected()
    other.load_state_dict(loaded)
    assert changed(state(network), other) == set()


class NormActivation(nn.BatchNorm2d):
    """A normalisation that is an owner itself."""

    def forward(self, x):
        return super().forward(x).relu()


def test_frozen_statistics_of_a_module_that_holds_a_block(tmp_path):
    network = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), NormActivation(8), nn.Conv2d(8, 8, 3), NormActivation(8)))
    images = torch.rand(2, 3, 12, 12)
    injected = si.freeze_backbone_(si.inject(network, images), batch_norm=True).train()
    again = pickle.loads(pickle.dumps(injected))
    assert torch.equal(again(images), injected(images))
    assert again.state_dict().keys() == injected.state_dict().keys()
    assert torch.equal(again[1].running_mean, network[1].running_mean)
    for each in (injected, again):
        si.eject_(each)
        assert [type(module) for module in each.modules()] == [type(module) for module in network.modules()]
        assert torch.equal(each.eval()(images), network.eval()(images))
