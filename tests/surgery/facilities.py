"""What torch and Python do with networks, each thing in a process of its own, an injected network first and alone.

A fresh interpreter imports what planning and the facilities import, and nothing else happens in it: for every facility
it forks a child, which prepares the network and uses the facility. What that gives must be what the original gives, to the bit. The
tests run most of them; ``python -m tests.surgery.facilities injected`` (or ``program``) all, inductor too (2 minutes).
"""

import contextlib
import copy
import importlib
import io
import os
import pickle
import sys
import tempfile
import traceback
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import se_inject as si
from se_inject.forwards import program_module


class Unit(nn.Module):
    """A residual unit that reads its mode, adds in place and has a keyword."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.training:
            y = y * 1.0
        y += x
        return torch.relu(y) * scale


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.unit1, self.unit2 = nn.Conv2d(3, 8, 3, stride=2), Unit(), Unit()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.unit2(self.unit1(self.stem(x)))
        return self.head(x.mean((2, 3)))


def image(batch=2):
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def network():
    """The original."""
    torch.manual_seed(0)
    model = Network()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def injected():
    """The original with blocks that begin as the identity."""
    return si.inject(network(), image())


def program():
    """A network whose forward came as data, with the original's parts."""
    x, y, z = ({"node": name} for name in "xyz")
    lines = [
        ["call", ["y"], "stem", [x], {}],
        ["call", ["y"], "unit1", [y], {}],
        ["call", ["y"], "unit2", [y], {}],
        ["method", ["z"], "mean", [y, {"tuple": [2, 3]}], {}],
        ["call", ["z"], "head", [z], {}],
        ["return", z],
    ]
    module = program_module("Network", "somewhere", [["x"]], lines)
    module._modules.update(network()._modules)
    return module.eval()


PREPARED = {"injected": injected, "program": program}


# -- facilities: each gives tensors and plain values -------------------------------------------------------


def call(net):
    return net(image())


def anomaly(net):
    with warnings.catch_warnings(), torch.autograd.detect_anomaly():
        net(image()).sum().backward()
    return net.stem.weight.grad


def anomaly_in_training(net):
    return anomaly(net.train())


def flop_counter(net):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        net(image())
    counts = counter.get_flop_counts()
    return {path: {str(op): count for op, count in counts[path].items()} for path in counts if path.endswith("conv1")}


def fake_tensors(net):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = net(mode.from_tensor(image()))
    return type(out).__name__, tuple(out.shape), out.dtype


def dispatch_mode(net):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names = []
    with Seen():
        out = net(image())
    return out, sum("convolution" in name and "conv2d" not in name for name in names) >= 5


def function_mode(net):
    from torch.overrides import TorchFunctionMode

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    names = []
    with Seen():
        out = net(image())
    return out, "conv2d" in names


def profiler(net):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], with_stack=True, record_shapes=True, with_modules=True) as seen:
        out = net(image())
    return out, any(event.key == "aten::conv2d" for event in seen.key_averages())


def vmap(net):
    return torch.vmap(lambda x: net(x[None])[0])(image(3))


def jvp(net):
    return torch.func.jvp(net, (image(),), (torch.ones_like(image()),))


def jacrev(net):
    return torch.func.jacrev(lambda x: net(x).sum(0))(image())


def jacfwd_over_jacrev(net):
    x = image(1)[..., :6, :6]
    return torch.func.jacfwd(torch.func.jacrev(lambda x: (net(x) ** 2).sum()))(x)


def per_sample_grad(net):
    parameters = {name: value.detach() for name, value in net.named_parameters() if name.startswith("stem")}

    def loss(parameters, x):
        return torch.func.functional_call(net, parameters, (x[None],)).sum()

    return torch.vmap(torch.func.grad(loss), (None, 0))(parameters, image(3))


def functional_call(net):
    return torch.func.functional_call(net, {"head.bias": torch.ones(5)}, (image(),))


def saved_tensor_hooks(net):
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        out = net(image())
    out.sum().backward()
    return net.stem.weight.grad


def save_on_cpu(net):
    with torch.autograd.graph.save_on_cpu():
        out = net(image())
    out.sum().backward()
    return net.stem.weight.grad


def _checkpoint(net, **options):
    from torch.utils.checkpoint import checkpoint

    x = net.stem(image().requires_grad_())
    x = checkpoint(net.unit2, checkpoint(net.unit1, x, **options), **options)
    x.sum().backward()
    return net.stem.weight.grad


def checkpoint_reentrant(net):
    return _checkpoint(net, use_reentrant=True)


def checkpoint(net):
    return _checkpoint(net, use_reentrant=False)


def checkpoint_in_training(net):
    return _checkpoint(net.train(), use_reentrant=False)


def _compile(net, backend, training=False):
    net = net.train(training)
    out = torch.compile(net, fullgraph=True, backend=backend)(image())
    out.sum().backward()
    return out, net.stem.weight.grad


def compile_eager(net):
    return _compile(net, "eager")


def compile_eager_in_training(net):
    return _compile(net, "eager", training=True)


def compile_aot_eager(net):
    return _compile(net, "aot_eager")


def compile_inductor(net):
    """Its kernels round as they like."""
    out, grad = _compile(net, "inductor")
    return torch.allclose(out, net(image()), atol=1e-5), grad.shape


def export(net):
    exported = torch.export.export(net, (image(),), strict=False)
    return exported.module()(image())


def export_strict(net):
    exported = torch.export.export(net, (image(),), strict=True)
    return exported.module()(image())


def export_dynamic(net):
    batch = torch.export.Dim("batch", min=2, max=8)
    exported = torch.export.export(net, (image(),), dynamic_shapes=({0: batch},), strict=False)
    return exported.module()(image(5))


def symbolic_trace(net):
    return torch.fx.symbolic_trace(net)(image())


def feature_extraction(net):
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(net, {"unit1": "a", "head": "b"})(image())


def fuse_by_fx(net):
    from torch.fx.experimental.optimization import fuse

    return torch.allclose(fuse(net)(image()), net(image()), atol=1e-5)


def make_fx(net):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(net)(image())(image())


def functionalize(net):
    return torch.func.functionalize(net)(image())


def script(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(net)(image())


def trace(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net, image())(image(5))


def package(net):
    from torch.package import PackageExporter, PackageImporter

    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with PackageExporter(data) as exporter:
            exporter.extern(["torch.**", "se_inject.**", "tests.**", "numpy.**"])
            exporter.save_pickle("model", "model.pkl", net)
        data.seek(0)
        return PackageImporter(data).load_pickle("model", "model.pkl")(image())


def cloudpickle(net):
    import cloudpickle as library

    return pickle.loads(library.dumps(net))(image())


def pickles(net):
    return [pickle.loads(pickle.dumps(net, protocol=protocol))(image()) for protocol in (2, 4, 5)]


def save(net):
    data = io.BytesIO()
    torch.save(net, data)
    data.seek(0)
    return torch.load(data, weights_only=False)(image())


def deepcopy_of_a_copy(net):
    return copy.deepcopy(copy.deepcopy(net))(image()), copy.copy(net)(image())


def _answer(net, x, results):
    torch.set_num_threads(1)
    results.put(net(x).detach().numpy())


def spawn(net):
    """What multiprocessing starts anew imports everything by name."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_answer, args=(net, image(), results))
    process.start()
    out = torch.from_numpy(results.get(timeout=120))
    process.join()
    return out


class _Images(torch.utils.data.Dataset):
    def __init__(self, net):
        self.net = net

    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.set_num_threads(1)
        return self.net(image(4)[index : index + 1])[0].detach()


def data_loader(net):
    loader = torch.utils.data.DataLoader(_Images(net), batch_size=2, num_workers=2)
    return list(loader)


def threads(net):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(net, [image()] * 4))


def plan_again(net):
    """Of its sites the original has those that are taken already."""
    si.plan(net, image(), at="stem", name="another")
    return net(image())


def autocast(net):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net(image()).shape


def hooks(net):
    seen = []
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    net.unit1.register_full_backward_hook(lambda module, grads, out: seen.append(out[0]))
    net(image()).sum().backward()
    return seen


def warnings_as_errors(net):
    """Python's warning machinery looks into the frame that warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return net(image())


def inference_mode(net):
    with torch.inference_mode():
        return net(image()).clone()


def swa(net):
    average = torch.optim.swa_utils.AveragedModel(net)
    average.update_parameters(net)
    return average(image())


def parametrized(net):
    torch.nn.utils.parametrizations.weight_norm(net.unit1.conv1)
    return net(image())


FACILITIES = {
    function.__name__: function
    for function in (
        call, anomaly, anomaly_in_training, flop_counter, fake_tensors, dispatch_mode, function_mode, profiler, vmap, jvp,
        jacrev, jacfwd_over_jacrev, per_sample_grad, functional_call, saved_tensor_hooks, save_on_cpu, checkpoint_reentrant,
        checkpoint, checkpoint_in_training, compile_eager, compile_eager_in_training, compile_aot_eager, compile_inductor,
        export, export_strict, export_dynamic, symbolic_trace, feature_extraction, fuse_by_fx, make_fx, functionalize,
        script, trace, package, cloudpickle, pickles, save, deepcopy_of_a_copy, spawn, data_loader, threads, plan_again,
        autocast, hooks, warnings_as_errors, inference_mode, swa, parametrized,
    )
}  # fmt: skip


# -- processes ---------------------------------------------------------------------------------------------


def in_a_child(compute):
    """What a function gives in a forked process, in which nothing else has happened."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                data = io.BytesIO()
                torch.save(compute(), data)
                file.write(data.getvalue())
                file.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        file.seek(0)
        data = file.read()
        return torch.load(io.BytesIO(data), weights_only=False) if data else f"died: {status}"


def answer(prepare, name):
    """What a facility gives for a network; an error as its text."""
    try:
        return FACILITIES[name](prepare())
    except BaseException as error:
        return f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error)[-4:])}"


def same(one, other):
    """Whether two results are, to the bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


MODULES = (
    "cloudpickle",
    "se_inject.plans",
    "se_inject.verification",
    "torch._dynamo",
    "torch._dynamo.backends.debugging",
    "torch._functorch.aot_autograd",
    "torch.export",
    "torch.fx.experimental.symbolic_shapes",
    "torch.package",
    "torch.utils.flop_counter",
)
"""What the children would each import: a second and a half."""


def main(kind, *names):
    """Compare a kind of network with the original under these facilities, or all; print those in which they differ."""
    torch.set_num_threads(1)
    for name in MODULES:
        importlib.import_module(name)
    names = names or tuple(FACILITIES)
    got = {name: in_a_child(lambda name=name: answer(PREPARED[kind], name)) for name in names}
    expected = in_a_child(lambda: {name: answer(network, name) for name in names})
    for name in names:
        if type(expected[name]) is str or not same(got[name], expected[name]):
            print(f"{kind}, {name}: {got[name]}\n   the original: {expected[name]}")
    print(f"{len(names)} compared")


if __name__ == "__main__":
    from tests.surgery import facilities  # so that the networks' classes have a name to be found by

    facilities.main(*sys.argv[1:])
