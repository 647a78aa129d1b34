"""Ordinary calls of torch in a unit don't cost it its place; where one does, the reason is in plain words."""

import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import Variable

import se_inject as si
import se_inject.tracing.observer
from tests.common import randomise

X = torch.rand(2, 3, 16, 16)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")

    @torch.jit.script
    def add_relu(a, b):
        return torch.relu(a + b)


class Unit(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.conv, self.norm, self.call = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), call

    def forward(self, x):
        return self.call(self.norm(self.conv(x)), x)


def network(call):
    torch.manual_seed(0)
    return randomise(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Unit(call))).eval()


CALLS = {
    "torch.zeros of sizes": lambda y, x: y + torch.zeros(x.shape[0], 1, *x.shape[2:], device=x.device) + x,
    "torch.ones of sizes": lambda y, x: y * torch.ones(x.shape[0], 1, 1, 1) + x,
    "an unbound method": lambda y, x: torch.Tensor.add(y, x),
    "two unbound methods": lambda y, x: torch.Tensor.add(torch.Tensor.mul(y, 2), x),
    "a scripted function": add_relu,
    "Variable": lambda y, x: y + x + Variable(x),
    "torch.as_tensor": lambda y, x: y + torch.as_tensor(x),
    "torch.tensor of a shape": lambda y, x: y + x * torch.tensor(x.shape)[1],
    "text in text": lambda y, x: y + (x.double().float() if "Double" in x.type() else x),
    "an operator by name": lambda y, x: torch.ops.aten.add(y, x),
    "several of these": lambda y, x: torch.Tensor.add(add_relu(y, torch.zeros(x.shape[0], 1, 1, 1)), Variable(x)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize("name", CALLS)
def test_ordinary_calls(name):
    model = network(CALLS[name])
    expected = [model(torch.rand(batch, 3, 12, 16, generator=torch.Generator().manual_seed(1))) for batch in (1, 3)]
    plan = si.plan(model, X)
    assert [step.owner for step in plan.steps] == ["1"]
    after = plan.apply(model)
    for batch, output in zip((1, 3), expected, strict=True):
        x = torch.rand(batch, 3, 12, 16, generator=torch.Generator().manual_seed(1))
        assert torch.equal(after(x), output)
    assert si.verify(model, after, X).passed
    names = ("zeros", "ones", "tensor")
    assert all(type(getattr(torch, each)).__name__ == "builtin_function_or_method" for each in names)
    assert "add" not in vars(torch.Tensor)
    assert "__new__" not in vars(Variable)


REFUSED = {
    "numpy": lambda y, x: y + x + torch.from_numpy(x.detach().numpy()),
    "a number of a tensor": lambda y, x: y + x * float(x.mean()),
    "a list in Python": lambda y, x: y + x * [1.0, 2.0][x.shape[0] - 2],
}


@pytest.mark.parametrize("name", REFUSED)
def test_reasons_are_in_plain_words(name):
    (refusal,) = (item for item in si.find_sites(network(REFUSED[name]), X).refused if item.address == "1")
    assert "test_ordinary_calls.py" in refusal.reason
    assert not any(word in refusal.reason for word in ("Proxy", "proxy", "fx", "node"))


class Remembers(nn.Module):
    """A grid is kept by the size that it was made for; what a child returns is kept by a hook."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.norm, self.how, self.kept = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), how, {}
        self.conv.register_forward_hook(lambda module, inputs, output: self.kept.update(out=output))

    def forward(self, x):
        if self.how == "hook":
            self.kept.clear()
            self.conv(x)
            return torch.relu(x + self.norm(self.kept["out"]))
        if x.shape[-1] not in self.kept:
            self.kept[x.shape[-1]] = torch.linspace(0, 1, x.shape[-1], device=x.device).expand_as(x)
        return torch.relu(x + self.norm(self.conv(x + self.kept[x.shape[-1]])))


@pytest.mark.parametrize("how", ["hook", "cache"])
def test_a_value_that_is_kept_in_an_attribute_is_the_reason(how, caplog):
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Remembers(how))).eval()
    (refusal,) = (item for item in si.find_sites(model, X).refused if item.address == "1")
    assert "into `self.kept`" in refusal.reason and "test_ordinary_calls.py" in refusal.reason
    assert not caplog.records


def test_code_in_c_is_not_told_that_a_proxy_is_a_tensor():
    """It would take the proxy's memory for a tensor's: an autograd function or an extension ended the process."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    refused = si.find_sites(network(lambda y, x: torch._C._functorch.unwrap_if_dead(y) + x), X).refused
    assert [item.address for item in refused] == ["1"]
    applies = network(lambda y, x: Double.apply(y) + x)
    assert si.verify(applies, si.inject(applies, X), X).passed


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x * 16) / 16

    @staticmethod
    def backward(ctx, gradient):
        return gradient


fine, coarse = Rounded.apply, Rounded.apply


class TwiceApplied(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), how
        self.first, self.second = Rounded.apply, Rounded.apply

    def forward(self, x):
        a, b = {"one": (Rounded.apply,) * 2, "globals": (fine, coarse), "own": (self.first, self.second)}[self.how]
        return torch.relu(x + b(self.norm(self.conv(a(x)))))


@pytest.mark.parametrize("how", ["one", "globals", "own"])
def test_an_autograd_function_that_is_applied_under_several_names(how, monkeypatch):
    """The edited forward, which a file's network is observed by, has a name of its own for each application."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), TwiceApplied(how), TwiceApplied(how))).eval()
    plan = si.plan(model, X)
    assert [step.path for step in plan.steps] == ["1.se", "2.se"]
    after = plan.apply(model)
    asked = []
    remedy = se_inject.tracing.observer.helper_for
    monkeypatch.setattr(se_inject.tracing.observer, "helper_for", lambda error: asked.append(error) or remedy(error))
    for injected in (after, pickle.loads(pickle.dumps(after))) if how != "own" else (after,):
        found = si.find_sites(injected, X)
        assert [(site.address, site.blocks) for site in found.all_sites][1:] == [
            ("1.apply#2", ("1.se",)),
            ("2.apply#2", ("2.se",)),
        ]
        assert not found.refused
    assert len(asked) <= 8  # one a unit and an observation
    assert type(Rounded.apply) is type(fine) and fine == Rounded.apply and "apply" not in vars(Rounded)
    assert si.verify(model, after, X).passed


class Asks(nn.Module):
    def __init__(self, question):
        super().__init__()
        self.conv, self.question = nn.Conv2d(8, 8, 3, padding=1), question

    def forward(self, x):
        y = self.conv(x)
        return x + y if self.question(x) else y


def matches(x):
    match x:
        case torch.Tensor():
            return True
    return False


QUESTIONS = {
    "plain": lambda x: isinstance(x, torch.Tensor),
    "tuple": lambda x: isinstance(x, (list, torch.Tensor)),
    "not": lambda x: not isinstance(x, (list, tuple)),
    "is_tensor": torch.is_tensor,
    "comprehension": lambda x: all(isinstance(each, torch.Tensor) for each in [x, x]),
    "nested": lambda x: isinstance([x][0], type(torch.zeros(1))),
    "match": matches,
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_isinstance_is_answered_for_the_value(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Asks(QUESTIONS[name])).eval()
    assert [site.kind for site in si.find_sites(model, X)] == ["residual"]
