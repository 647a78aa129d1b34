"""A twin does what the network does, and nothing that it stores reaches the network."""

import collections
import functools
import threading
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import se_inject as si
from se_inject.tracing import observe_model, rehearsed, standing_in, twin_of
from tests.common import difference, randomise

X = torch.rand(2, 3, 8, 8)


class Keeps(nn.Module):
    """Stores in attributes of every kind what its forward sees."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("seen", torch.zeros(1))
        self.tensor = torch.ones(3)
        self.list, self.dict, self.set = [], {"in": {"deep": []}}, set()
        self.counter, self.space = collections.Counter(), types.SimpleNamespace(values=[])
        self.lock = threading.Lock()
        self.same = self.list
        self.hidden = [nn.Conv2d(3, 3, 1)]

    def forward(self, x):
        with self.lock:
            self.last = x
            self.seen += 1
            self.tensor += 1
            self.list.append(x)
            self.dict["in"]["deep"].append(x)
            self.set.add(len(self.list))
            self.counter["calls"] += 1
            self.space.values.append(x)
            assert self.same is self.list
        return self.conv(x) + self.hidden[0](x) * 0


def state(module):
    return {
        "last": hasattr(module, "last"),
        "seen": module.seen.item(),
        "tensor": module.tensor.tolist(),
        "containers": [len(module.list), len(module.dict["in"]["deep"]), len(module.set), len(module.counter)],
        "space": len(module.space.values),
        "training": [each.training for each in module.modules()],
        "attributes": sorted(vars(module)),
    }


def test_nothing_that_a_twin_stores_reaches_the_network():
    model = Keeps()
    before = state(model)
    twin = rehearsed(model)
    with torch.no_grad():
        assert torch.equal(twin(X), model.conv(X))
        twin(X)
    twin.eval()
    assert state(model) == before
    assert state(twin)["containers"] == [2, 2, 2, 1]
    assert twin.lock is model.lock, "what can't be copied is shared"
    assert twin.conv.weight is model.conv.weight
    assert twin.seen is not model.seen


def test_observing_a_network_that_deepcopy_refuses_changes_nothing():
    model = Keeps()
    before = state(model)
    trace = observe_model(model, X)
    assert trace.calls == {"": 1, "conv": 1}
    assert state(model) == before


def test_a_twin_asks_for_each_tensor_once_wherever_it_is_held():
    model = Keeps()
    model.shared = model.conv.weight
    asked = []
    twin = twin_of(model, lambda tensor: (asked.append(id(tensor)), tensor.detach().clone())[1])
    assert len(asked) == len(set(asked))
    expected = [model.conv.weight, model.conv.bias, model.seen, model.tensor, *model.hidden[0].parameters()]
    assert set(asked) == {id(tensor) for tensor in expected}
    assert twin.shared is twin.conv.weight


def test_no_number_is_copied_for_a_twin_on_meta():
    model = nn.Sequential(*[nn.Conv2d(256, 256, 3) for _ in range(4)])
    model.extra = {"weights": [torch.zeros(1000, 1000)]}
    with standing_in(model, "meta") as (twin, _):
        assert all(tensor.is_meta for tensor in (*twin.parameters(), twin.extra["weights"][0]))
        assert not any(tensor.is_meta for tensor in model.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("normalised", [nn.utils.weight_norm, parametrizations.weight_norm, nn.utils.spectral_norm])
def test_normalised_weights(normalised):
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (normalised(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2))

        def forward(self, x):
            return x + self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    model = nn.Sequential(normalised(nn.Conv2d(3, 8, 3, padding=1)), Unit(), Unit()).eval()
    model(X)  # from now on, old weight_norm holds tensors that deepcopy refuses
    expected = model(X)
    plan = si.plan(model, X)
    assert [step.path for step in plan.steps] == ["1.se", "2.se"]
    assert torch.equal(rehearsed(model)(X), expected)


def hooked(how):
    """A network with a hook that holds on to the network, and to a list outside of it."""
    model, features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), []
    if how == "closure":
        model[0].register_forward_hook(lambda module, args, output: features.append(model[0].weight * output.mean()))
    elif how == "default":
        model[0].register_forward_hook(lambda module, args, output, into=features: into.append(output))
    elif how == "partial":
        model[0].register_forward_hook(functools.partial(lambda into, *given: into.append(given[-1]), features))
    else:
        holder = types.SimpleNamespace(features=features)
        holder.hook = types.MethodType(lambda self, *given: self.features.append(given[-1]), holder)
        model[0].register_forward_hook(holder.hook)
    return model, features


@pytest.mark.parametrize("how", ["closure", "default", "partial", "method"])
def test_hooks_are_the_twins(how):
    model, features = hooked(how)
    observe_model(model, X)
    assert features == []
    rehearsed(model)(X)
    assert features == []
    model(X)
    assert len(features) == 1


def test_a_twin_of_a_network_of_each_kind_computes_the_same():
    import torchvision

    for name in ("resnet18", "googlenet", "shufflenet_v2_x0_5"):
        torch.manual_seed(0)
        options = {"init_weights": False} if name == "googlenet" else {}
        model = randomise(torchvision.models.get_model(name, weights=None, **options)).eval()
        x = torch.rand(1, 3, 64, 64)
        assert not difference(model(x), rehearsed(model)(x))


def test_gradients_reach_the_network_through_a_twin_and_replaced_parameters_do_not():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    other = torch.zeros_like(model[0].weight)
    twin = rehearsed(model, {id(model[0].weight): other})
    twin(X).sum().backward()
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None
    assert twin[0].weight is other
