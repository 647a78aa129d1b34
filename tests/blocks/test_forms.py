"""Forms that blocks have in files alone, for runtimes that get others wrong: the same numbers, and not in eager."""

import pytest
import torch
from torch import nn

from se_inject.blocks import build_block

X = torch.randn(3, 16, 7, 9, generator=torch.Generator().manual_seed(0))


def strong(name, **options):
    torch.manual_seed(1)
    block = build_block(name, 16, (7, 9), options, "paper").eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def operators(block):
    program = torch.export.export(block, (X,), strict=False)
    return {str(node.target).removeprefix("aten.").split(".")[0] for node in program.graph.nodes}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options", "without"),
    [
        ("se", {"gate": "hard_sigmoid"}, "hardsigmoid"),  # OpenCV
        ("ese", {}, "hardsigmoid"),
        ("se", {"squeeze": "max"}, "amax"),  # ncnn, ONNX Runtime's quantiser
        ("srm", {}, "stack"),  # OpenVINO
    ],
)
def test_the_form_of_files_computes_the_same_to_the_bit(name, options, without):
    block = strong(name, **options)
    expected = block(X)
    assert without not in operators(block)
    assert torch.equal(torch.export.export(block, (X,), strict=False).module()(X), expected)
    assert torch.equal(torch.jit.trace(block, X)(X), expected)
    assert torch.equal(torch.jit.script(block)(X), expected)


def test_equal_maxima_share_the_gradient_in_eager():
    block = strong("se", squeeze="max")
    x = torch.zeros(1, 16, 2, 2, requires_grad=True)
    block.squeezed(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 0.25))


def test_srm_is_the_sum_over_its_styles():
    block = strong("srm")
    mean = X.mean((2, 3))
    deviation = ((X - mean[..., None, None]).square().mean((2, 3)) + 1e-5).sqrt()
    styles = (torch.stack([mean, deviation], 2) * block.weight).sum(2)
    torch.testing.assert_close(block(X), X * torch.sigmoid(block.norm(styles))[..., None, None])
