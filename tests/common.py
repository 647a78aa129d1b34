"""What several test files need: networks by name, weights that hide nothing, outputs, and comparisons to the bit."""

import dataclasses
import inspect
import random
import warnings

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

TIMM_NAMES = {
    "cbam": {"fc1": "channel.fc1", "fc2": "channel.fc2", "conv": "spatial.conv.conv", "norm": "spatial.conv.bn"},
    "coord": {"conv": "conv1", "norm": "bn1", "rows": "conv_h", "columns": "conv_w"},
    "gc": {"attention": "conv_attn", "fc1": "mlp_add.fc1", "norm": "mlp_add.norm", "fc2": "mlp_add.fc2"},
    "gc scale": {"attention": "conv_attn", "fc1": "mlp_scale.fc1", "norm": "mlp_scale.norm", "fc2": "mlp_scale.fc2"},
}
"""The layers of blocks that timm has under other names: ours → timm's."""


def build(name):
    """A network with random weights from ``torchvision:NAME`` or ``timm:NAME``."""
    library, _, short = name.partition(":")
    if library == "timm":
        return timm.create_model(short)
    options = {"init_weights": True} if short in ("googlenet", "inception_v3") else {}
    if "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(short)).parameters:
        options["weights_backbone"] = None
    return torchvision.models.get_model(short, weights=None, **options)


def randomise(model, seed=0):
    """Random normalisation statistics, affine parameters and layer scales: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            if (
                isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)
                and module.weight is not None
            ):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma", "layer_scale")):
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def outputs(model, *args, seed=0, **kwargs):
    """All tensors a call returns, with the random generator at a fixed point; its buffers are left as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(seed)
    with torch.no_grad():
        result = torch.func.functional_call(model, buffers, args, kwargs)
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def difference(one, other, where="output"):
    """Empty if two results are the same bit for bit, in the same structure, layout and format."""
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor) or (one.dtype, one.shape, one.device) != (
            other.dtype,
            other.shape,
            other.device,
        ):
            return f"{where}: {describe(one)} became {describe(other)}"
        if one.stride() != other.stride():
            return f"{where}: strides {one.stride()} became {other.stride()}"
        return "" if torch.equal(one, other) else f"{where}: differs by {(one - other).abs().max():.3g}"
    if type(one) is not type(other):
        return f"{where}: a {type(one).__name__} became a {type(other).__name__}"
    if dataclasses.is_dataclass(one):
        one, other = vars(one), vars(other)
    if isinstance(one, dict):
        if list(one) != list(other):
            return f"{where}: {list(one)} became {list(other)}"
        return "".join(difference(one[key], other[key], f"{where}[{key}]") for key in one)
    if isinstance(one, tuple | list):
        if len(one) != len(other):
            return f"{where}: {len(one)} became {len(other)}"
        return "".join(difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True)))
    return "" if one == other else f"{where}: {one} became {other}"


def describe(value):
    return (
        f"{tuple(value.shape)} {value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
    )


def write(network, path, how, args=(IMAGES,), **options):
    """A network's program in a file: scripted, traced or exported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "scripted":
            torch.jit.save(torch.jit.script(network), path)
        elif how == "traced":
            torch.jit.save(torch.jit.trace(network, args, check_trace=False, strict=False), path)
        else:
            torch.export.save(torch.export.export(network, args, strict=False, **options), path)
    return path


def same(one, other):
    """Whether two results have the same numbers, whatever holds them."""
    leaves, others = tree_leaves(one), tree_leaves(other)
    return len(leaves) == len(others) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(leaves, others, strict=True)
    )


def same_state(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


def portrait(model):
    """All that a look must not change: identities of what is in every module, flags, contents, random generators."""
    modules = [
        (path, type(module), {key: id(value) for key, value in vars(module).items()}, contents(module))
        for path, module in model.named_modules(remove_duplicate=False)
    ]
    state = [(key, value._version, value.clone()) for key, value in model.state_dict(keep_vars=True).items()]
    return modules, state, torch.get_rng_state(), random.getstate(), torch.is_grad_enabled()


def contents(module):
    return {
        key: [id(item) for item in (value.values() if isinstance(value, dict) else value)]
        for key, value in vars(module).items()
        if isinstance(value, dict | list | set)
    }


def same_portrait(one, other):
    (modules, state, generator, python, grad), (modules2, state2, generator2, python2, grad2) = one, other
    assert modules == modules2
    for (key, version, value), (key2, version2, value2) in zip(state, state2, strict=True):
        assert (key, version) == (key2, version2)
        assert torch.equal(value, value2), key
    assert torch.equal(generator, generator2)
    assert python == python2
    assert grad == grad2
