"""Outputs of an author's classes, and autograd functions: kept as they are, or refused with the true reason."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import se_inject as si
from tests.census.strangers import unlike
from tests.common import randomise
from tests.networks.containers import MAKE, UNLIKE, Applies, Reads, Returns

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def built(kind, *args):
    torch.manual_seed(0)
    return randomise(kind(*args)).eval()


def called(network, *, training=False):
    torch.manual_seed(1)
    with torch.no_grad():
        return copy.deepcopy(network).train(training)(X)


@pytest.mark.parametrize("kind", [Returns, Reads])
@pytest.mark.parametrize("how", MAKE)
def test_the_class_and_all_that_it_holds_are_kept(how, kind):
    network = built(kind, how)
    injected = si.inject(network, X)
    assert [step.value for step in si.plan_of(injected).steps] == ["norm"] * (1 + (kind is Reads))
    for training in (False, True):
        assert unlike(called(network, training=training), called(injected, training=training)) == ""
    assert si.verify(network, injected, X).passed
    twin = pickle.loads(pickle.dumps(injected))
    assert unlike(called(network), called(twin)) == ""
    awake = si.inject(network, X, init="paper")
    assert unlike(called(network), called(awake)) != "" and type(called(network)) is type(called(awake))


@pytest.mark.parametrize("how", UNLIKE)
def test_a_container_that_its_contents_do_not_make_is_left_to_its_author(how):
    """The forward can't be written; the unit's branch is gated where it is made, and a place of the forward itself is refused."""
    network = built(Returns, how)
    (site,) = si.find_sites(network, X)
    assert (site.owner, site.value) == ("norm", None)
    injected = si.inject(network, X)
    for training in (False, True):
        assert unlike(called(network, training=training), called(injected, training=training)) == ""
    assert si.verify(network, injected, X).passed

    class Inside(Returns):
        def forward(self, x):
            x = self.stem(x)
            x = torch.relu(x + torch.tanh(self.conv(x)))
            return UNLIKE[how](x, x.mean((2, 3)))

    (missed,) = si.find_sites(built(Inside, how), X).missed
    name = type(called(network)).__name__
    assert missed.reason == f"its forward makes a `{name}`, which can't be made from its contents alone"


def test_classes_within_a_function_are_kept_in_this_process():
    class Local(dict):
        pass

    class Net(Returns):
        def forward(self, x):
            out = super().forward(x)
            return Local(out, last=out["features"])

    network = built(Net, "Box")
    injected = si.inject(network, X)
    assert type(called(injected)) is Local and unlike(called(network), called(injected)) == ""


def test_a_container_in_a_fresh_process(tmp_path):
    network = built(Reads, "Fields")
    torch.save(si.inject(network, X, init="paper"), tmp_path / "net.pt")
    expected = called(torch.load(tmp_path / "net.pt", weights_only=False))
    torch.save((X, expected["logits"]), tmp_path / "numbers.pt")
    script = (
        "import torch\n"
        f"x, expected = torch.load({str(tmp_path / 'numbers.pt')!r})\n"
        f"net = torch.load({str(tmp_path / 'net.pt')!r}, weights_only=False)\n"
        "out = net(x)\n"
        "assert torch.equal(out['logits'], expected) and type(out['backbone']).__name__ == 'Fields'\n"
        "assert out['backbone'].hidden is None and len(out['backbone']) == 2\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_strangers_file_names_no_class(tmp_path):
    import torchvision

    network = built(Returns, "Fields")
    injected = si.inject(network, X)
    body = type(injected)._se_inject_body
    assert "make:tests.networks.containers:Fields" in body
    from se_inject.loading.operators import is_allowed_function

    assert not is_allowed_function("make:tests.networks.containers:Fields") and not is_allowed_function("field")
    torch.save(injected, tmp_path / "net.pt")
    with pytest.raises(si.InjectError):
        si.load(tmp_path / "net.pt")
    assert isinstance(si.load(tmp_path / "net.pt", trust=["tests"]), Returns)
    assert torchvision.models.resnet.BasicBlock


@pytest.mark.parametrize(
    "name",
    ["make:subprocess:Popen", "make:torch.nn:Linear", "make:builtins:eval", "apply:torch:Tensor", "make:os:system"],
)
def test_only_containers_and_autograd_functions_can_be_named(name):
    from se_inject.forwards.vocabulary import function_named

    with pytest.raises(si.InjectError):
        function_named(name)


def test_an_autograd_function_is_one_call():
    network = built(Applies)
    injected = si.inject(network, X)
    assert [step.value for step in si.plan_of(injected).steps] == ["norm"]
    assert si.verify(network, injected, X).passed
    grads = []
    for each in (network, injected):
        each(X).square().sum().backward()
        grads.append([parameter.grad for name, parameter in each.named_parameters() if not name.startswith("se.")])
    assert all(map(torch.equal, *grads))
