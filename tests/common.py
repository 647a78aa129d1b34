"""What several test files need: networks by name, weights that hide nothing, outputs as a flat list."""

import inspect

import timm
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves

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
