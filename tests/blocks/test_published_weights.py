"""Weights of SE under the names that others gave it: they load strictly, and give what the others' modules give."""

import pytest
import torch
from timm.layers import SEModule
from timm.layers.squeeze_excite import SqueezeExciteCl
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn
from torchvision.ops import SqueezeExcitation as TorchvisionSE

import se_inject as si
from se_inject.blocks.squeeze_excitation import SqueezeExcitation
from se_inject.errors import LoadError
from tests.common import build


def made(**options):
    return SqueezeExcitation(16, **options)


class Elsewhere(nn.Module):
    """SE as others write it down: two layers under some names, convolutions or matrices."""

    def __init__(self, names, matrices, bias):
        super().__init__()
        for name, sizes in zip(names, ((16, 4), (4, 16)), strict=True):
            layer = nn.Linear(*sizes, bias=bias) if matrices else nn.Conv2d(*sizes, 1, bias=bias)
            parent = self
            *path, last = name.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            parent.add_module(last, layer)
        self.layers = [self.get_submodule(name) for name in names]

    def forward(self, x):
        z = x.mean((2, 3)) if isinstance(self.layers[0], nn.Linear) else x.mean((2, 3), keepdim=True)
        s = self.layers[1](self.layers[0](z).clamp(min=0)).sigmoid()
        return x * s.flatten(1)[:, :, None, None]


PUBLISHED = {
    "timm, efficientnet": (SqueezeExcite(16, 0.25), 1e-12),
    "timm": (SEModule(16, 0.25, rd_divisor=1), 0),
    "timm, matrices": (SqueezeExciteCl(16, 0.25, rd_divisor=1), None),
    "torchvision": (TorchvisionSE(16, 4), 0),
    "pytorchcv": (Elsewhere(("conv1", "conv2"), False, True), 1e-12),
    "OpenMMLab": (Elsewhere(("conv1.conv", "conv2.conv"), False, True), 1e-12),
    "moskomule": (Elsewhere(("fc.0", "fc.2"), True, False), 1e-12),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_under_other_peoples_names_load_strictly(name):
    theirs, tolerance = PUBLISHED[name]
    theirs = theirs.double().eval()
    bias = any(key.endswith("bias") for key in theirs.state_dict())
    ours = made(reduction=4, bias=bias).double()
    weights = theirs.state_dict()
    kept = {key: tensor.clone() for key, tensor in weights.items()}
    ours.load_state_dict(weights, strict=True)
    assert weights.keys() == kept.keys()  # the caller's dictionary is not touched
    x = torch.randn(3, 16, 5, 4, dtype=torch.float64)
    if tolerance is None:  # timm's has the channels last
        torch.testing.assert_close(ours(x), theirs(x.movedim(1, -1)).movedim(-1, 1), rtol=0, atol=1e-12)
    else:
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=tolerance)
    assert list(ours.state_dict()) == list(made(reduction=4, bias=bias).state_dict())


def test_a_weight_that_is_missing_or_has_another_size_is_still_told():
    theirs = SqueezeExcite(16, 0.25).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for fc1\.weight"):
        made(reduction=2).load_state_dict(theirs)
    del theirs["conv_expand.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .fc2.bias"):
        made(reduction=4).load_state_dict(theirs)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        made(reduction=4, bias=False).load_state_dict(SqueezeExcite(16, 0.25).state_dict())


def test_a_checkpoint_in_a_file_with_other_names_goes_into_an_injected_network(tmp_path):
    ours = si.inject(build("timm:resnet18"), torch.randn(2, 3, 64, 64), reduction=4, bias=False, init="paper")
    other = {"fc1.weight": "fc.0.weight", "fc2.weight": "fc.2.weight"}
    wanted = {key: torch.randn_like(t) if t.is_floating_point() else t for key, t in ours.state_dict().items()}
    theirs = {}
    for key, tensor in wanted.items():
        head, _, tail = key.partition(".se.")
        theirs[f"module.{head}.se.{other[tail]}" if tail else f"module.{key}"] = tensor.flatten(1) if tail else tensor
    torch.save({"state_dict": theirs}, tmp_path / "net.pth")
    si.load_weights_(ours, tmp_path / "net.pth")
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in ours.state_dict().items())
    theirs["module.layer1.0.se.fc.0.weight"] = torch.zeros(3, 3)
    torch.save(theirs, tmp_path / "bad.pth")
    with pytest.raises(LoadError):
        si.load_weights_(ours, tmp_path / "bad.pth")
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in ours.state_dict().items())
