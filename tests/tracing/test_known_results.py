"""Results that are known without a call have the shape, dtype and strides that torch gives."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from se_inject.tracing import known_results
from se_inject.tracing.known_results import result_of_function, result_of_module

FORMS = {
    "contiguous": lambda: torch.empty(2, 8, 6, 10, device="meta"),
    "channels last": lambda: torch.empty(2, 8, 6, 10, device="meta").to(memory_format=torch.channels_last),
    "permuted": lambda: torch.empty(2, 8, 6, 10, device="meta").permute(0, 2, 3, 1),
    "a slice": lambda: torch.empty(2, 16, 6, 10, device="meta")[:, ::2],
    "expanded": lambda: torch.empty(2, 8, 1, 1, device="meta").expand(2, 8, 6, 10),
    "half": lambda: torch.empty(2, 8, 6, 10, device="meta", dtype=torch.float16),
    "a vector": lambda: torch.empty(2, 8, device="meta"),
}


def form_of(x):
    return tuple(x.shape), x.dtype, x.stride(), x.device


@pytest.mark.parametrize("form", FORMS)
def test_functions_give_what_torch_gives(form):
    x = FORMS[form]()
    calls = [(function, (x,), {}) for function in known_results._UNARY]
    calls += [(function, (x, 2.0), {}) for function in known_results._BINARY]
    calls += [(function, (x, FORMS[form]()), {}) for function in known_results._BINARY]
    calls += [(operator.mul, (x, x[:, :, :1, :1] if x.dim() == 4 else x[:, :1]), {})]
    calls += [
        (operator.add, (x[:1], x), {}),
        (F.relu, (x,), {"inplace": True}),
        (F.gelu, (x,), {"approximate": "tanh"}),
    ]
    calls += [(F.layer_norm, (x, x.shape[-1:]), {}), (F.layer_norm, (x, list(x.shape[1:])), {})]
    calls += [(torch.cat, ([x, x[:, :3]], 1), {})]
    known = 0
    for function, args, kwargs in calls:
        result = result_of_function(function, args, kwargs)
        if result is not None:
            known += 1
            assert form_of(result) == form_of(function(*args, **kwargs)), (function, form)
    assert known >= 18


@pytest.mark.parametrize("form", FORMS)
def test_modules_give_what_torch_gives(form):
    x = FORMS[form]()
    modules = [kind() for kind in known_results._ACTIVATIONS] + [nn.LayerNorm(x.shape[-1]).to(x.dtype)]
    modules += [nn.BatchNorm2d(x.shape[1]).to(x.dtype)] if x.dim() == 4 else [nn.BatchNorm1d(8)]
    for module in modules:
        module.to("meta").eval()
        assert form_of(result_of_module(module, x)) == form_of(module(x)), (module, form)


def test_what_could_differ_is_asked_of_torch():
    x = torch.empty(2, 8, 6, 10, device="meta")
    whole = torch.empty(2, 8, 6, 10, device="meta", dtype=torch.int64)
    for function, args, kwargs in [
        (operator.truediv, (whole, 2), {}),  # becomes a float
        (operator.add, (whole, 1.5), {}),
        (operator.add, (x, x.half()), {}),
        (operator.add, (x, x[0]), {}),
        (operator.mul, (x, 1j), {}),
        (operator.add, (x[:, :, :1], x[:, :, :, :1]), {}),  # larger than both
        (torch.add, (x, x), {"out": x}),
        (F.layer_norm, (x, (7,)), {}),  # an error
        (torch.cat, ([x, x.half()], 1), {}),
        (torch.cat, ([x, x], -1), {}),
    ]:
        assert result_of_function(function, args, kwargs) is None, function
    assert result_of_module(nn.BatchNorm2d(7).to("meta"), x) is None
    assert result_of_module(nn.ReLU(), whole) is None
