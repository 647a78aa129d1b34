"""TorchScript in processes in which torch has freed operators: it leaves their addresses in its list."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import se_inject as si

LIBRARY = torch.library.Library("se__scripting", "DEF")
LIBRARY.define("f(Tensor x) -> Tensor")
LIVING = torch.ops.se__scripting.f


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.size = nn.Conv2d(3, 4, 3), (2, 2)

    def forward(self, x):
        return F.max_pool2d(self.conv(x), self.size)


@pytest.fixture
def listed(monkeypatch):
    table = dict(torch.jit._builtins._get_builtin_table())
    monkeypatch.setattr(torch.jit._builtins, "_builtin_table", table)
    return table


@pytest.mark.parametrize(
    "namespace", ["se__scripting", "se__gone"], ids=["of another overload", "of a library that is gone"]
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_lies_where_a_freed_operator_was(namespace, listed, tmp_path):
    network, x = Pooled().eval(), torch.rand(2, 3, 8, 8)
    listed[id(network.size)] = f"{namespace}::f"
    with pytest.raises(RuntimeError, match="builtin cannot be used as a value"):
        torch.jit.script(network)
    exported = si.export(network, tmp_path / "network.ts", x)
    assert "scripted" in exported.how
    assert torch.equal(torch.jit.load(tmp_path / "network.ts")(x), network(x))
    assert listed[id(LIVING._op)] == "se__scripting::f"


SCRIPT = """
import sys, warnings, weakref
warnings.simplefilter("ignore")
import torch
freed, alive, register = [], [], torch.jit._builtins._register_builtin
def watch(operator, name):
    register(operator, name)
    alive.append(weakref.ref(operator, lambda _: freed.append(name)))
torch.jit._builtins._register_builtin = watch
import se_inject as si
network, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU()), torch.rand(2, 3, 8, 8)
injected = si.inject(network, x)
assert si.verify(network, injected, x).passed
for suffix in (".onnx", ".pt2", ".ts"):
    si.export(injected, sys.argv[1] + suffix, x)
print(len(alive) > 100, freed)
"""


def test_nothing_of_ours_frees_an_operator(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "network")], capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "True []", done.stdout + done.stderr
