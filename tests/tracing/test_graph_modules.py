"""Graph modules and feature extractors are injected, verified, copied and pickled like any module, and keep their blocks."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

import se_inject as si
from tests.common import randomise
from tests.tracing.test_borders import tensors

X = torch.rand(2, 3, 32, 32)

MAKE = {
    "traced": lambda: torch.fx.symbolic_trace(resnet18()),
    "extractor": lambda: create_feature_extractor(resnet18(), {"layer2": "a", "layer4": "b"}),
    "timm": lambda: timm.create_model("resnet18", features_only=True, feature_cfg={"feature_cls": "fx"}),
}


def equal(one, other):
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", MAKE)
def test_graph_modules(name):
    torch.manual_seed(0)
    model = randomise(MAKE[name]()).eval()
    plan = si.plan(model, X)
    assert len(plan.steps) == 8
    after = plan.apply(model)
    assert type(after(X)) is type(model(X))
    assert equal(after(X), model(X))
    assert si.verify(model, after, X).passed
    for step in plan.steps:
        nn.init.normal_(after.get_submodule(step.path).fc2.weight)
    trained = after(X)
    assert not equal(trained, model(X))
    for twin in (copy.deepcopy(after), pickle.loads(pickle.dumps(after)), after.train().eval()):
        assert equal(twin(X), trained)
        assert len(si.plan_of(twin).steps) == 8
    assert equal(si.eject_(after)(X), model(X))


@pytest.mark.parametrize("name", MAKE)
def test_more_blocks_in_an_injected_graph_module(name):
    """A feature extractor has a graph for each mode, and neither has the blocks of the first time."""
    torch.manual_seed(0)
    model = randomise(MAKE[name]()).eval()
    first = si.inject(model, X, stages=[1])
    for step in si.plan_of(first).steps:
        nn.init.normal_(first.get_submodule(step.path).fc2.weight)
    second = si.inject(first, X, stages=[3])
    assert len(si.plan_of(second).steps) == 4
    assert not equal(first(X), model(X))
    assert equal(second(X), first(X))
    assert equal(second.train()(X), first.train()(X))
    assert si.verify(first.eval(), second.eval(), X).passed


def test_torch_runs_the_graph_with_its_blocks():
    """``torch.export`` and interpreters run the graph of a graph module, not its forward."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), Unit(8), Unit(8), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1))
    model = randomise(torch.fx.symbolic_trace(plain)).eval()
    after = si.inject(model, X)
    for step in si.plan_of(after).steps:
        nn.init.normal_(after.get_submodule(step.path).fc2.weight)
    trained = after(X)
    assert not torch.allclose(trained, model(X), atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(after)
    for run in (
        torch.export.export(after, (X,)).module(),
        torch.fx.Interpreter(after).run,
        torch.fx.GraphModule(after, after.graph),
        torch.fx.symbolic_trace(after),
        torch.compile(after, backend="eager", fullgraph=True),
        scripted,
        torch.fx.Interpreter(copy.deepcopy(after)).run,
    ):
        assert torch.allclose(run(X), trained, atol=1e-6)
    assert "se_1_norm2" in after.code
    eager, interpreted = after.train(), torch.fx.Interpreter(after)
    torch.manual_seed(1)
    expected = eager(X)
    torch.manual_seed(1)
    assert torch.equal(interpreted.run(X), expected)
    assert "se_1_norm2" not in si.eject_(after).code
    assert torch.equal(torch.fx.Interpreter(after.eval()).run(X), after(X))


def test_a_new_graph_would_lose_the_blocks_and_is_refused():
    after = si.inject(torch.fx.symbolic_trace(resnet18()).eval(), X)
    with pytest.raises(RuntimeError, match="eject_"):
        after.graph = torch.fx.Graph()
    with pytest.raises(RuntimeError, match="eject_"):
        after.graph = copy.deepcopy(after.graph)
    next(node for node in after.graph.nodes if node.op == "call_module").target = "layer1.0.conv1"
    with pytest.raises(RuntimeError, match="eject_"):
        after.recompile()


class Unit(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class Leaves(torch.fx.Tracer):
    def is_leaf_module(self, module, path):
        return isinstance(module, Unit | torch.fx.GraphModule) or super().is_leaf_module(module, path)


@pytest.mark.parametrize("inner", ["graph module", "in a graph module", "plain"])
def test_graph_modules_within_graph_modules(inner):
    """torch writes the forwards of all of them anew when it copies or pickles the outer one."""
    torch.manual_seed(0)
    unit = {"graph module": torch.fx.symbolic_trace, "plain": lambda unit: unit}.get(
        inner, lambda unit: torch.fx.symbolic_trace(nn.Sequential(unit))
    )
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), unit(Unit(8)), unit(Unit(8)), nn.AdaptiveAvgPool2d(1))
    model = randomise(torch.fx.GraphModule(plain, Leaves().trace(plain))).eval()
    after = si.inject(model, X)
    assert si.verify(model, after, X).passed
    blocks = [after.get_submodule(step.path) for step in si.plan_of(after).steps]
    assert len(blocks) == 2
    for block in blocks:
        nn.init.normal_(block.fc2.weight)
    trained = after(X)
    assert not torch.equal(trained, model(X))
    after.recompile()  # of a graph that is what it was: nothing is lost
    for twin in (after, copy.deepcopy(after), pickle.loads(pickle.dumps(after)), copy.deepcopy(copy.deepcopy(after))):
        assert torch.equal(twin(X), trained)
        assert len(si.plan_of(twin).steps) == 2
    assert torch.equal(si.eject_(copy.deepcopy(after))(X), model(X))


class OfText(nn.Module):
    """A unit whose forward was made from text, in globals without a name: it has no `__module__`."""

    exec("def forward(self, x): return torch.relu(self.norm(self.conv(x)) + x)", {"torch": torch}, vars())

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)


def test_a_forward_of_no_module():
    assert OfText.forward.__module__ is None
    network, x = nn.Sequential(nn.Conv2d(3, 8, 3), randomise(OfText())).eval(), torch.rand(2, 3, 16, 16)
    injected = si.inject(network, x)
    assert [step.value for step in si.plan_of(injected).steps] == ["norm"]
    assert si.verify(network, injected, x).passed
