"""The Triton kernels in Triton's interpreter, on the CPU, against float64. `test_kernels.py` runs this in a process of its own.

TRITON_INTERPRET=1 python -m pytest -n 0 tests/kernels/interpreted.py
"""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import se_inject as si
from se_inject.blocks import SqueezeExcitation, fuse_block_, how_computed
from se_inject.kernels import dispatch, excite_from, launch, operators, plain_tail, programs, tail

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # Triton 3.5's

assert dispatch.State.interpreted, "run with TRITON_INTERPRET=1 from the start, as test_kernels.py does"


def relative(one, wanted):
    one, wanted = one.detach().double(), wanted.detach()
    return float((one - wanted).norm() / wanted.norm().clamp_min(1e-30))


def laid_out(tensor, last):
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return tensor.contiguous(memory_format=layout) if last and layout else tensor


def block_of(shape, seed=0, start=False, **options):
    torch.manual_seed(seed)
    block = SqueezeExcitation(shape[1], rank=len(shape) - 2, reduction=2, **options)
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    if block.fc1.bias is not None:
        nn.init.uniform_(block.fc1.bias, 0.5, 1.5)  # no unit is dead: nothing would come back through it
    if start:
        block.identity_init()
    fuse_block_(block)
    return block


def compare(block, shape, dtype, last, activation, adds):
    """Output and gradients of a block in kernels, against the same block in float64 and plain torch."""
    exact = copy.deepcopy(block).double()
    block = block.to(dtype)
    value, shortcut, grad = (laid_out(torch.randn(shape).to(dtype), last) for _ in range(3))
    value.requires_grad_()
    shortcut.requires_grad_(adds)
    wide = [tensor.detach().double().requires_grad_() for tensor in (value, shortcut)]
    wanted = exact(wide[0], wide[1] if adds else None, activation)
    wanted.backward(grad.double())
    out = block(value, shortcut if adds else None, activation)
    assert "se_inject_excite" in type(out.grad_fn).__name__
    assert out.stride() == value.stride()
    out.backward(grad)
    pairs = [(out, wanted), (value.grad, wide[0].grad)]
    pairs += [(shortcut.grad, wide[1].grad)] if adds else []
    pairs += [(p.grad, q.grad) for p, q in zip(block.parameters(), exact.parameters(), strict=True)]
    for one, other in pairs:
        assert one.dtype == dtype
        assert relative(one, other) <= TOLERANCE[dtype]


CASES = [
    ((2, 8, 5, 5), torch.float32, True, "relu", True),
    ((2, 8, 5, 5), torch.float32, False, "relu", True),
    ((10, 6, 3, 4), torch.float32, True, "silu", True),
    ((3, 5, 7), torch.float32, False, "hardswish", True),
    ((2, 4, 3, 2, 2), torch.float32, True, "gelu", True),
    ((2, 8, 5, 5), torch.float32, True, "none", True),
    ((2, 8, 5, 5), torch.float32, True, "relu", False),
    ((9, 4, 3, 3), torch.float32, False, "silu", False),
    ((2, 8, 5, 5), torch.float32, True, "none", False),
    ((2, 8, 5, 5), torch.float32, False, "relu6", True),
    ((1, 70, 9, 5), torch.float32, True, "relu", True),
    ((1, 3, 40, 30), torch.float32, False, "hardswish", True),
    ((2, 8, 5, 5), torch.float16, True, "relu", True),
    ((2, 8, 5, 5), torch.float16, False, "silu", True),
    ((9, 8, 5, 5), torch.bfloat16, True, "relu", True),
    ((1, 1, 1, 1), torch.float32, True, "relu", True),
]


@pytest.mark.parametrize("shape, dtype, last, activation, adds", CASES)
def test_output_and_gradients_against_float64(shape, dtype, last, activation, adds):
    compare(block_of(shape), shape, dtype, last, activation, adds)


@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid", "tanh", "relu"])
@pytest.mark.parametrize("batch, inner, bias", [(2, "silu", True), (9, "hard_swish", False), (2, "gelu", False)])
def test_gates_and_inner_activations(gate, batch, inner, bias):
    shape = (batch, 6, 3, 4)
    compare(block_of(shape, gate=gate, activation=inner, bias=bias), shape, torch.float32, True, "relu", True)
    started = block_of(shape, start=True, gate=gate, activation=inner, bias=bias)
    compare(started, shape, torch.float32, True, "relu", True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cuts bfloat16 off: see gpu.py
@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid", "tanh", "relu"])
def test_at_the_start_the_output_is_bit_equal(gate, dtype):
    for batch in (2, 9):
        block = block_of((batch, 8, 4, 4), start=True, gate=gate).to(dtype)
        value, shortcut = (torch.randn(batch, 8, 4, 4).to(dtype) for _ in range(2))
        assert torch.equal(block(value, shortcut, "relu"), torch.relu(value + shortcut))
        assert torch.equal(block(value), value)


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("adds", [False, True])
def test_the_tail_behind_a_gate_of_somebody_s(activation, adds):
    value, shortcut = (torch.randn(2, 6, 3, 5, requires_grad=True) for _ in range(2))
    gate = torch.rand(2, 6, 1, 1, requires_grad=True)
    inputs = [value, gate, *([shortcut] if adds else [])]
    out = tail(value, gate, shortcut if adds else None, activation)
    assert "se_inject_tail" in type(out.grad_fn).__name__
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = plain_tail(wide[0], wide[1], wide[2] if adds else None, activation)
    grad = torch.randn_like(value)
    found, others = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(wanted, wide, grad.double())
    for one, other in zip((out, *found), (wanted, *others), strict=True):
        assert relative(one, other) < 1e-6


@pytest.mark.parametrize("batch", [2, 9])
def test_the_squeeze_of_another_value(batch):
    block = block_of((batch, 6, 4, 5))
    source, value, shortcut = torch.randn(batch, 6, 8, 10), torch.randn(batch, 6, 4, 5), torch.randn(batch, 6, 4, 5)
    weights = (block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias)
    for last in (False, True):
        with torch.no_grad():
            given = [laid_out(tensor, last) for tensor in (source, value, shortcut)]
            out = excite_from(*given, weights, ("relu", "sigmoid", False), "relu")
            gate = copy.deepcopy(block).double().gate(source.double())
        assert relative(out, plain_tail(value.double(), gate, shortcut.double(), "relu")) < 1e-6
        assert excite_from(*given, weights, ("relu", "sigmoid", False), "relu") is None  # no gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [3, 9])
def test_without_gradients_in_the_dtype_of_the_weights(batch, dtype):
    block = block_of((batch, 70, 6, 5), gate="tanh").to(dtype)
    value, shortcut = (torch.randn(batch, 70, 6, 5).to(dtype) for _ in range(2))
    with torch.no_grad():
        out = block(value, shortcut, "silu")
        wanted = copy.deepcopy(block).double()(value.double(), shortcut.double(), "silu")
    assert out.dtype == dtype
    assert relative(out, wanted) <= {**TOLERANCE, torch.float16: 1e-3}[dtype]


class Launches(TorchDispatchMode):
    """Counts what would be launched on a GPU: kernels, and torch's operators but for views and empty tensors."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        for name in ("squeeze", "bottleneck", "tail", "tail_with_gate", "tail_backward", "value_backward"):
            monkeypatch.setattr(programs, name, self.counted(name, getattr(programs, name)))

    def counted(self, name, kernel):
        class Counted:
            def __getitem__(_, grid):
                self.names.append(name)
                return self.outside(kernel[grid])

        return Counted()

    def outside(self, function):
        def run(*args, **options):
            with _disable_current_modes():  # the interpreter works with tensors of its own
                return function(*args, **options)

        return run

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not operator.is_view and "empty" not in operator.name():
            self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype, batch, most", [(torch.float32, 9, 6), (torch.float16, 9, 7), (torch.float16, 2, 3)])
def test_launches_of_a_block_in_inference(monkeypatch, dtype, batch, most):
    block = block_of((batch, 128, 6, 5)).to(dtype)
    e = operators._excitation(
        block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias, "relu", "sigmoid", True
    )
    value = torch.randn(batch, 128, 6, 5).to(dtype)
    with torch.no_grad(), Launches(monkeypatch) as launches:
        launch.excite_from(value, value, value, e, "relu")
    assert len(launches.names) <= most, launches.names


def test_launches_of_a_block_in_a_training_step(monkeypatch):
    """Under autocast: the value is narrow, the weights are not."""
    block = block_of((9, 128, 6, 5))
    e = operators._excitation(
        block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias, "relu", "sigmoid", True
    )
    value = torch.randn(9, 128, 6, 5).bfloat16()
    with torch.no_grad(), Launches(monkeypatch) as launches:
        out, *kept = launch.excite(value, value, e, "relu")
    assert len(launches.names) <= 6, launches.names
    monkeypatch.undo()
    with torch.no_grad(), Launches(monkeypatch) as launches:
        launch.excite_backward(value, value, out, *kept, e, "relu", True)
    assert len(launches.names) <= 11, launches.names


def test_kernels_are_launched_on_the_device_of_the_value(monkeypatch):
    """Triton takes the current device otherwise, and cards don't read each other's memory."""
    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: seen.append(tensor) or contextlib.nullcontext())
    value = torch.randn(2, 4, 3, 3)
    tail(value, torch.rand(2, 4, 1, 1), None, "relu")
    assert len(seen) == 1
    assert seen[0].data_ptr() == value.data_ptr()


def test_torch_checks_the_operators():
    value, shortcut = (torch.randn(2, 4, 3, 3, requires_grad=True) for _ in range(2))
    gate = torch.rand(2, 4, 1, 1, requires_grad=True)
    block = block_of((2, 4, 3, 3))
    weights = (block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    warnings.simplefilter("ignore")  # it looks at the gradients of copies
    torch.library.opcheck(torch.ops.se_inject.tail.default, (value, gate, shortcut, "relu"), test_utils=checks)
    arguments = (laid_out(value.detach(), True).requires_grad_(), shortcut, *weights, "relu", "sigmoid", True, "silu")
    torch.library.opcheck(torch.ops.se_inject.excite.default, arguments, test_utils=checks)


def test_gradients_of_gradients():
    block = block_of((2, 4, 3, 3))
    exact = copy.deepcopy(block).double()
    value, shortcut = (torch.randn(2, 4, 3, 3) for _ in range(2))
    for activation in ("relu", "silu", "none"):
        results = []
        for each in (block, exact):
            v, s = (tensor.to(each.fc1.weight.dtype).requires_grad_() for tensor in (value.clone(), shortcut.clone()))
            first = torch.autograd.grad(each(v, s, activation).square().sum(), (v, s), create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in first), (v, s, *each.parameters())))
        for one, other in zip(*results, strict=True):
            assert relative(one, other) < 1e-5


def test_values_that_are_not_dense_and_that_are_nothing():
    block = block_of((2, 6, 4, 4))
    exact = copy.deepcopy(block).double()
    base = torch.randn(2, 6, 8, 8)
    for value in (base[:, :, ::2, ::2], base[:1, :, :1, :1].expand(2, 6, 4, 4), base.transpose(2, 3), base[:0]):
        out = block(value, value * 2, "relu")
        torch.testing.assert_close(out.double(), exact(value.double(), value.double() * 2, "relu"))
    with torch.inference_mode():
        value = torch.randn(2, 6, 4, 4)
        assert torch.equal(block(value, None, "relu"), block(value.clone(), None, "relu"))
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    shortcut = torch.randn(2, 6, 4, 4, requires_grad=True)
    block(value, shortcut, "relu").sum().backward()
    assert shortcut.grad is not None
    narrow = block(base, base.mean((2, 3), keepdim=True), "relu")
    torch.testing.assert_close(narrow.double(), exact(base.double(), base.mean((2, 3), keepdim=True).double(), "relu"))


def test_what_has_no_kernel_computes_the_same():
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU()

        def forward(self, x):
            return self.act(self.norm(self.conv(x)) + x)

    x = torch.randn(2, 3, 8, 8)
    options = ({"squeeze": "max"}, {"squeeze": "std", "norm": True}, {"block": "eca"}, {"block": "nosqueeze"}, {})
    for chosen in options:
        torch.manual_seed(0)
        plain = si.inject(nn.Sequential(nn.Conv2d(3, 6, 1), Unit(), Unit()), x, **chosen)
        for parameter in si.injected_parameters(plain):
            nn.init.normal_(parameter, 0, 0.3)
        fused = si.fuse_(copy.deepcopy(plain))
        results = []
        for network in (plain, fused):
            out = network(x)
            results.append([out, *torch.autograd.grad(out.square().mean(), list(network.parameters()))])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        said = str(si.fused(fused))
        assert ("one kernel operator" in said) == (chosen == {})
        assert ("squeeze `max`" in said) == (chosen == {"squeeze": "max"})


def test_a_scale_in_between():
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv2d(6, 6, 3, padding=1), nn.Parameter(torch.rand(6, 1, 1) + 0.5)

        def forward(self, x):
            return torch.relu(self.scale * self.conv(x) + x)

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    before = nn.Sequential(nn.Conv2d(3, 6, 1), Unit(), Unit())
    plain = si.inject(before, x)
    fused = si.fuse_(copy.deepcopy(plain))
    assert "tail in a kernel; gate by torch: a scale in between" in str(si.fused(fused))
    assert torch.equal(fused(x), before(x))
    for parameter in si.injected_parameters(plain):
        nn.init.normal_(parameter, 0, 0.3)
    fused.load_state_dict(plain.state_dict())
    results = []
    for network in (plain, fused):
        out = network(x)
        results.append([out, *torch.autograd.grad(out.square().mean(), list(network.parameters()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_autocast_and_compile():
    block = block_of((2, 6, 4, 4))
    value, shortcut = (torch.randn(2, 6, 4, 4) for _ in range(2))
    exact = copy.deepcopy(block).double()(value.double(), shortcut.double(), "relu")
    with torch.autocast("cpu", torch.bfloat16):
        half = value.bfloat16().requires_grad_()
        out = block(half, shortcut.bfloat16(), "relu")
        assert out.dtype == torch.bfloat16
        assert "se_inject_excite" in type(out.grad_fn).__name__
        out.sum().backward()
    assert block.fc1.weight.grad.dtype == torch.float32
    assert relative(out, exact) < 2e-2
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    given = value.clone().requires_grad_()
    out = compiled(given, shortcut, "relu")
    out.sum().backward()
    assert relative(out, exact) < 1e-6
    assert given.grad is not None
    code = str(torch._dynamo.export(block)(given, shortcut, "relu").graph_module.code)
    assert "se_inject" not in code  # inductor fuses torch's own with what is before the block


def test_no_more_is_kept_for_backward_than_unfused():
    def kept(function):  # parameters live anyway
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
        ):
            function()
        return sum(size for address, size in storages.items() if address not in own)

    block = block_of((4, 16, 16, 16))
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    value, shortcut = (torch.randn(4, 16, 16, 16, requires_grad=True) for _ in range(2))
    for activation in ("relu", "silu", "none"):
        gate = type(block)._se_inject_unfused.gate
        fused = kept(lambda a=activation: block(value, shortcut, a))
        assert fused <= kept(lambda a=activation, g=gate: plain_tail(value, g(block, value), shortcut, a))


def test_a_kernel_that_fails_is_said_once_and_torch_does_its_work(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(launch, "excite", broken)
    monkeypatch.setattr(operators, "_failed", set())
    block = block_of((2, 6, 4, 4))
    value, shortcut = (torch.randn(2, 6, 4, 4, requires_grad=True) for _ in range(2))
    with pytest.warns(RuntimeWarning, match="no such instruction") as seen:
        outs = [block(value, shortcut, "relu") for _ in range(3)]
    assert len(seen) == 1
    wanted = copy.deepcopy(block).double()(value.double(), shortcut.double(), "relu")
    assert relative(outs[2], wanted) < 1e-6


def test_without_triton_all_works_unfused(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(dispatch.State, "why_not", None)
    dispatch.prepare()
    block = block_of((2, 6, 4, 4))
    assert how_computed(block) == "triton is not installed"
    out = block(torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4), "relu")
    assert "se_inject" not in type(out.grad_fn).__name__
