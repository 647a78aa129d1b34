"""A thread's own random numbers: those of a seed, and nobody else's draws are disturbed."""

import random
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import stochastic_depth

import se_inject as si
from se_inject.random_numbers import OwnNumbers
from se_inject.testing import CHECKS, check_block
from tests.common import randomise

X = torch.linspace(-1, 1, 64).reshape(4, 16)
DRAWS = {
    "rand": lambda: torch.rand(3, 4),
    "randn": lambda: torch.randn(5, dtype=torch.float64),
    "randint": lambda: torch.randint(3, 70, (9,)),
    "randint of one": lambda: torch.randint(70, (9,)),
    "randperm": lambda: torch.randperm(20),
    "rand_like": lambda: torch.rand_like(X),
    "randn_like": lambda: torch.randn_like(X),
    "randint_like": lambda: torch.randint_like(X, 9),
    "normal": lambda: torch.normal(X, 2.0),
    "in place": lambda: torch.empty(7).uniform_(2, 3),
    "bernoulli": lambda: torch.bernoulli(X.abs()),
    "multinomial": lambda: X.abs().multinomial(3),
    "dropout": lambda: F.dropout(X, 0.3),
    "dropout of channels": lambda: F.dropout2d(X.reshape(2, 2, 4, 4), 0.5),
    "alpha dropout": lambda: F.alpha_dropout(X, 0.3, training=True),
    "rrelu": lambda: F.rrelu(X, training=True),
    "stochastic depth": lambda: stochastic_depth(X, 0.5, "row"),
    "attention": lambda: F.scaled_dot_product_attention(X[None], X[None], X[None], dropout_p=0.2),
    "recurrent": lambda: torch.lstm(
        X[:, None], (torch.zeros(2, 1, 2),) * 2, [torch.ones(8, 16), torch.ones(8, 2), torch.ones(8, 2), torch.ones(8, 2)],
        False, 2, 0.5, True, False, False,
    )[0],
    "gumbel": lambda: F.gumbel_softmax(X),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("grad", [False, True])
def test_the_numbers_are_those_of_the_seed(name, grad):
    X.requires_grad_(grad and name not in ("multinomial", "bernoulli"))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            expected = [DRAWS[name](), DRAWS[name]()]
        before = torch.get_rng_state()
        with OwnNumbers(5):
            found = [DRAWS[name](), DRAWS[name]()]
    finally:
        X.requires_grad_(False)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(*found)


@pytest.mark.parametrize("name", DRAWS)
def test_one_within_another_draws_its_own(name):
    def both(seed, inner):
        with OwnNumbers(seed):
            first = DRAWS[name]()
            within = None
            if inner:
                with OwnNumbers(5):
                    within = DRAWS[name]()
            return first, DRAWS[name](), within

    found = []
    thread = threading.Thread(target=lambda: found.append(both(3, True)), daemon=True)
    thread.start()
    thread.join(60)
    assert found, "it waits for itself"
    first, second, within = found[0]
    alone = both(3, False)
    assert torch.equal(first, alone[0]) and torch.equal(second, alone[1])
    assert torch.equal(within, both(5, False)[0])


class Drawing(nn.Module):
    """Draws in training, from torch's generator; and from Python's, if that is asked for."""

    def __init__(self, python=False):
        super().__init__()
        self.conv, self.norm, self.python = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), python

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        if self.training:
            x = F.dropout(x, 0.3, True) * torch.rand(x.shape[0], 1, 1, 1)
        return x * random.random() if self.python and self.training else x


IMAGES = torch.rand(2, 3, 12, 12)


@pytest.mark.parametrize("use", ["verify", "plan", "start", "zoo", "export"])
def test_another_thread_draws_what_it_would_alone(use, tmp_path):
    net = randomise(Drawing()).eval()
    injected = si.inject(net, IMAGES, at="*", init="paper" if use == "start" else "identity")
    from se_inject.plans import start_factors

    uses = {
        "verify": lambda: si.verify(net, injected, IMAGES).expect_passed(),
        "plan": lambda: si.plan(net, IMAGES, at="*").cost(),
        "start": lambda: start_factors(si.plan(net, IMAGES, at="*", init="paper").steps),
        "zoo": lambda: si.load("torchvision:squeezenet1_1"),
        "export": lambda: si.export(injected, tmp_path / "x.pt", (IMAGES,), force=True),
    }
    count, drawn, ended = 400, [], threading.Event()

    def draw():
        while len(drawn) < count or not ended.is_set():
            drawn.append(torch.rand(3).tolist())

    torch.manual_seed(11)
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(3):
            uses[use]()
    finally:
        ended.set()
        thread.join()
    torch.manual_seed(11)
    assert drawn == [torch.rand(3).tolist() for _ in range(len(drawn))]


@pytest.mark.parametrize("in_company", [False, True])
@pytest.mark.parametrize("python", [False, True])
def test_networks_that_draw_are_verified(python, in_company, monkeypatch):
    net = randomise(Drawing(python)).eval()
    injected = si.inject(net, IMAGES, at="*")
    states = torch.get_rng_state(), random.getstate()
    if in_company:
        monkeypatch.setattr("se_inject.random_numbers.is_alone", lambda: False)
    assert si.verify(net, injected, IMAGES).passed
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


EXPORTS = ("onnx", "pt2", "torchscript", "script", "compile", "export")
"""Torch's own compilers record the process's generator and put it back, whoever drew meanwhile."""


@pytest.mark.parametrize("block", ["se", "cbam"])
def test_checking_a_block_beside_a_thread_that_draws(block):
    seen: list[torch.Tensor] = []
    stop, state = threading.Event(), torch.get_rng_state()
    expected = [torch.rand(3) for _ in range(3000)]
    torch.set_rng_state(state)

    def draw():
        while not stop.is_set() and len(seen) < len(expected):
            seen.append(torch.rand(3))
            time.sleep(1e-4)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        check_block(block, skip=[name for name in CHECKS if name in EXPORTS])
    finally:
        stop.set()
        thread.join()
    assert len(seen) > 20
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=False))


def test_checking_a_block_leaves_the_generators():
    state = torch.get_rng_state()
    check_block("se")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_block_is_exported_beside_a_thread(monkeypatch):
    """Torch 2.9's tracing exporter, which falls in for its other one, fails while operators are given generators."""
    monkeypatch.setattr("se_inject.random_numbers.is_alone", lambda: False)
    check_block("cbam", skip=[name for name in CHECKS if name != "onnx"])
