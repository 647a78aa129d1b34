"""Observing in one thread disturbs no other: outputs, gradients, plans, modes, random numbers, warnings, patches."""

import builtins
import contextlib
import logging
import random
import threading
import warnings

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.tracing import observe_model, training_graph

X = torch.rand(2, 3, 16, 16)


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5)

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            return x + self.drop(self.norm(self.conv(x)))
        return x + self.norm(self.conv(x)) if isinstance(x, torch.Tensor) else x


def network(units=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *[Unit() for _ in range(units)]).eval()


class Residual(nn.Module):
    """No question for the grad mode: its forward can be written down, in both modes."""

    def __init__(self):
        super().__init__()
        self.conv, self.p = nn.Conv2d(8, 8, 3, padding=1), 0.5

    def forward(self, x):
        y = self.conv(x)
        return x + nn.functional.dropout(y, self.p, self.training)


def residual_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *[Residual() for _ in range(3)]).eval()


@contextlib.contextmanager
def meanwhile(*works):
    """Other threads that do these again and again; what they raise is raised here."""
    stop, errors = threading.Event(), []

    def go(work):
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=go, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for error in errors:
        raise error


def patchable():
    return (
        builtins.isinstance,
        nn.Module.__call__,
        nn.Module.__getattr__,
        torch.is_grad_enabled,
        torch.autocast.__enter__,
        vars(torch.autograd.Function).get("apply"),
        [entry for entry in warnings.filters if type(entry[1]).__module__.startswith("se_inject")],
        list(logging.getLogger("torch._subclasses.fake_tensor").filters),
    )


@pytest.mark.parametrize("planned", ["the same", "another"])
def test_a_network_serves_while_one_is_planned(planned):
    served = network()
    other = served if planned == "the same" else network(5)
    with torch.no_grad():
        expected = served(X)
    before = patchable()

    def serve():
        with torch.no_grad():
            assert torch.equal(served(X), expected)
        assert all(module.training is False for module in served.modules())

    with meanwhile(serve):
        for _ in range(4):
            si.find_sites(other, X)
    assert patchable() == before
    assert torch.equal(served(X), expected)


def test_a_network_trains_while_it_is_planned():
    trained = residual_network()
    expected = [step.path for step in si.plan(residual_network(), X).steps]
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
    steps = []

    def train():
        trained.train()
        optimizer.zero_grad()
        trained(X).sum().backward()
        assert all(parameter.grad is not None for parameter in trained.parameters())
        assert trained.training and not any(parameter.is_meta for parameter in trained.parameters())
        optimizer.step()
        steps.append(1)

    with meanwhile(train):
        for _ in range(4):
            assert [step.path for step in si.plan(trained, X).steps] == expected
    assert steps


def test_two_threads_plan_and_every_plan_is_complete():
    one, other = residual_network(), network(5)
    plans = {id(one): si.plan(one, X).steps, id(other): si.find_sites(other, X).all_sites}
    before = patchable()

    def plan_other():
        assert si.find_sites(other, X).all_sites == plans[id(other)]

    with meanwhile(plan_other, plan_other):
        for _ in range(4):
            plan = si.plan(one, X)
            assert plan.steps == plans[id(one)]
            assert plan.apply(one) is not one
    assert patchable() == before


def test_random_numbers_of_other_threads_neither_repeat_nor_spoil_a_training_graph():
    """The generators are the process's: only where this thread drew are they put back."""
    expected = [step.path for step in si.plan(residual_network(), X).steps]
    torch.manual_seed(5)
    random.seed(5)
    alone = [(torch.rand(1).item(), random.random()) for _ in range(20_000)]
    torch.manual_seed(5)
    random.seed(5)
    drawn = []
    with meanwhile(lambda: drawn.append((torch.rand(1).item(), random.random()))):
        for _ in range(3):
            plan = si.plan(residual_network_of_this_thread, X)
            assert [step.path for step in plan.steps] == expected
            training_graph(plan.trace, plan.trace.graphs["1"])
    assert drawn
    assert drawn[:20_000] == alone[: len(drawn)]


residual_network_of_this_thread = residual_network()


def test_what_a_forward_draws_is_put_back_with_other_threads_alive():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(x) * random.random() * float(torch.rand(1))

    model = Draws()
    done = threading.Event()
    idle = threading.Thread(target=done.wait)
    idle.start()
    try:
        before = (torch.get_rng_state(), random.getstate())
        observe_model(model, X)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
    finally:
        done.set()
        idle.join()


def test_warnings_of_other_threads_are_heard():
    class Warns(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            warnings.warn("from the network", stacklevel=1)
            heard.append(threading.get_ident())
            other = threading.Thread(target=lambda: warnings.warn("from another thread", stacklevel=1))
            other.start()
            other.join()
            return self.conv(x)

    heard = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        observe_model(Warns(), X)
    assert heard
    assert {str(warning.message) for warning in caught} == {"from another thread"}


def test_patches_are_undone_whichever_thread_ends_last():
    before = patchable()
    inside, leave = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            inside.set()
            leave.wait(10)
            return self.conv(x)

    waiting = threading.Thread(target=observe_model, args=(Waits(), X))
    waiting.start()
    inside.wait(10)
    observe_model(residual_network(), X)  # begins second, ends first
    assert torch.is_grad_enabled()
    leave.set()
    waiting.join()
    assert patchable() == before


def test_patches_are_undone_when_the_forward_fails():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            raise KeyboardInterrupt

    before = patchable()
    with pytest.raises(KeyboardInterrupt):
        observe_model(Fails(), X)
    assert patchable() == before


def test_networks_serve_and_train_while_they_are_verified_and_costed():
    served, trained = residual_network(), residual_network()
    for module in trained.modules():
        module.p = 0.0
    plan = si.plan(served, X)
    injected = plan.apply(served)
    with torch.no_grad():
        expected = served(X)
    names = [sorted(vars(module)) for model in (served, injected, trained) for module in model.modules()]

    def serve():
        with torch.no_grad():
            assert torch.equal(served(X), expected)
            assert torch.equal(injected(X), expected)
        assert not any(module.training for model in (served, injected) for module in model.modules())

    def train():
        trained.train()
        trained(X).sum().backward()
        assert all(module.training for module in trained.modules())

    with meanwhile(serve, train):
        assert si.verify(served, injected, X).passed
        assert si.verify(trained, si.plan(trained, X).apply(trained), X).passed
        assert plan.cost(served).rows
    assert [sorted(vars(module)) for model in (served, injected, trained) for module in model.modules()] == names
