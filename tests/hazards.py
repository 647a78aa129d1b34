"""The hazard zoo: tiny networks, each of which embodies one danger, and what is to come of each.

``HAZARDS`` is the table. A hazard's docstring names its danger; a network whose sites are refused says so as data.
Most are blocks that ``in_net`` puts twice between the same stem and head, so that their addresses are
``blocks.0.bn2`` and ``blocks.1.bn2``.
"""

import collections
import dataclasses
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from tests.common import randomise

C = 8
"""Channels of nearly every value in the zoo; the image is 16×16, so that a mix-up of the two shows."""
SIDE = 16


@dataclasses.dataclass(frozen=True)
class Hazard:
    """One network and what is expected of it.

    Args:
        name: of its class or factory.
        build: makes it, with weights from the global random generator.
        inputs: the forward's arguments for a batch size: a tuple, or a tuple and a dict.
        sites: addresses of the sites that a plan takes, in the order of data.
        refused: address → a part of the reason.
        raises: the error ``plan`` ends in, and a part of its text.
        probes: site's address → the module that yields its value, and which of its calls (None: each); by default the
            address itself.
        inplace_probe: the gated value is what everybody sees who holds the tensor.
        by_hand: builds the same network with blocks called in the forward that the author would have written.
        variants: other ways to use the network. An injected network must do the same as the original or raise.
        pickles: whether the original itself can be pickled.
        copies: whether the original itself can be copied.
        json: whether the plan can be told to another instance without its inputs.
        reaches: whether gradients can reach the blocks.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    sites: tuple[str, ...] = ()
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    raises: tuple[str, str] | None = None
    probes: dict[str, tuple[str, int | None]] = dataclasses.field(default_factory=dict)
    inplace_probe: bool = False
    by_hand: Callable[..., Tensor] | None = None
    variants: dict[str, Callable[[nn.Module], Any]] = dataclasses.field(default_factory=dict)
    pickles: bool = True
    copies: bool = True
    json: bool = True
    reaches: bool = True
    dtype: torch.dtype = torch.float32

    def make(self) -> nn.Module:
        """The network in training mode, with the same random weights every time."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # weight_norm and spectral_norm of the old style
            torch.manual_seed(7)
            return randomise(self.build()).to(self.dtype)

    def call(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for a call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch)
            given = self.inputs(batch)
        return given if len(given) == 2 and isinstance(given[1], dict) and isinstance(given[0], tuple) else (given, {})


HAZARDS: dict[str, Hazard] = {}


def image(batch, side=SIDE, channels=3):
    return (torch.randn(batch, channels, side, side),)


def hazard(*sites, inputs=image, **expected):
    """Put a network (its class, or a function that makes it) into the table."""

    def register(build):
        _enter(build.__name__, build, inputs, sites, expected)
        return build

    return register


def in_net(*values, count=2, before=None, **expected):
    """Put a block into the table: ``count`` of them in a ``Net``; ``values`` are its sites, relative to the block."""

    def register(block):
        def build():
            return Net(*[block() for _ in range(count)], before=before)

        where = [f"blocks.{index}" for index in range(count)]
        sites = [f"{path}.{value}" for path in where for value in values]
        for key in ("refused", "probes"):
            given = expected.get(key, {})
            expected[key] = {f"{path}.{name}".strip("."): item for path in where for name, item in given.items()}
        expected["probes"] = {
            address: (f"{address.split('.')[0]}.{address.split('.')[1]}.{module}", call)
            for address, (module, call) in expected["probes"].items()
        }
        _enter(block.__name__, build, image, sites, expected)
        return block

    return register


def _enter(name, build, inputs, sites, expected):
    assert name not in HAZARDS
    HAZARDS[name] = Hazard(name, build, inputs, tuple(sites), **expected)


class Net(nn.Module):
    """Stem, blocks, head."""

    def __init__(self, *blocks, before=None, channels=C):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.LazyLinear(5) if blocks is None else nn.Linear(channels, 5)
        if before is not None:
            before(self)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.head(x.mean([2, 3]))


class Parts(nn.Module):
    """The parts of a residual block; ``branch`` computes what the shortcut is added to."""

    def __init__(self, channels=C):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def branch(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


# -- the usual residual units -----------------------------------------------------------------------------


@in_net("bn2")
class Basic(Parts):
    """None; the control."""

    def forward(self, x):
        return F.relu(self.branch(x) + x)


@in_net("bn3", count=1)
class Bottleneck(nn.Module):
    """A projection shortcut holds a convolution too."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, C, 1, bias=False), nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(C, C, 1, stride=2, bias=False), nn.BatchNorm2d(C))

    def forward(self, x):
        identity = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


@in_net("conv2")
class PreActivation(Parts):
    """The branch ends in a convolution; the shortcut is taken before the first normalisation."""

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


@in_net("conv")
class InvertedResidual(nn.Module):
    """The branch is one ``nn.Sequential``; adding is conditional."""

    def __init__(self):
        super().__init__()
        self.use_shortcut = True
        self.conv = nn.Sequential(
            nn.Conv2d(C, 2 * C, 1, bias=False),
            nn.BatchNorm2d(2 * C),
            nn.ReLU6(inplace=True),
            nn.Conv2d(2 * C, 2 * C, 3, padding=1, groups=2 * C, bias=False),
            nn.BatchNorm2d(2 * C),
            nn.ReLU6(inplace=True),
            nn.Conv2d(2 * C, C, 1, bias=False),
            nn.BatchNorm2d(C),
        )

    def forward(self, x):
        if self.use_shortcut:
            return x + self.conv(x)
        return self.conv(x)


@in_net("block")
class LayerScaled(nn.Module):
    """ConvNeXt: the branch is scaled by a parameter and dropped at random before it is added."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(C, C, 7, padding=3, groups=C), nn.GroupNorm(1, C), nn.Conv2d(C, 16, 1), nn.GELU(), nn.Conv2d(16, C, 1)
        )
        self.layer_scale = nn.Parameter(torch.full((C, 1, 1), 1e-6))
        self.stochastic_depth = StochasticDepth(0.4, "row")

    def forward(self, x):
        return x + self.stochastic_depth(self.layer_scale * self.block(x))


class OptionA(nn.Module):
    """He's CIFAR shortcut: every second pixel, padded with zero channels."""

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


@hazard("blocks.0.bn2")
def cifar_option_a():
    """A shortcut without parameters that is no identity."""
    net = Net(OptionABlock())
    net.head = nn.Linear(C + 4, 5)
    return net


class OptionABlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.shortcut = OptionA()

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


@in_net("outer.bn2", count=1, refused={"add": "other residual units"})
class Nested(nn.Module):
    """A residual unit around a residual unit."""

    def __init__(self):
        super().__init__()
        self.outer = Basic()

    def forward(self, x):
        return x + self.outer(x)


@in_net("bn2", "bn4")
class TwoUnitsInOne(Parts):
    """Two residual units in one forward: two blocks in one module."""

    def __init__(self):
        super().__init__()
        self.conv3, self.bn3 = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)
        self.conv4, self.bn4 = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

    def forward(self, x):
        x = F.relu(self.branch(x) + x)
        return F.relu(self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x))))) + x)


@in_net("bn2")
class SumOfThree(Parts):
    """Two shortcuts and one branch in one sum."""

    def __init__(self):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(C)

    def forward(self, x):
        return F.relu(self.branch(x) + self.bn0(x) + x)


@in_net("bn2")
class FloatFunctional(Parts):
    """The sum is taken by a module's method, as networks do that are to be quantised."""

    def __init__(self):
        super().__init__()
        self.skip = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x):
        return self.skip.add_relu(self.branch(x), x)


# -- in place, aliases, shared modules --------------------------------------------------------------------


@in_net("relu#2", probes={"relu#2": ("relu", 2)})
class SharedReLU(Parts):
    """One in-place ReLU module is called three times; its second output is the branch."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(out + x)


@in_net("bn2")
class ReLUInPlaceAfterwards(Parts):
    """The value is overwritten by an in-place ReLU whose result is ignored."""

    def forward(self, x):
        out = self.branch(x)
        F.relu_(out)
        return out + x


@in_net("bn2")
class AddInPlace(Parts):
    """``add_`` overwrites the value, and its result is ignored."""

    def forward(self, x):
        out = self.branch(x)
        out.add_(x)
        return F.relu(out)


@in_net("bn2")
class AddFunction(Parts):
    """``torch.add`` with a factor."""

    def forward(self, x):
        return torch.add(x, self.branch(x), alpha=0.5)


@in_net("bn2")
class AddIntoInput(Parts):
    """The block overwrites its own input."""

    def forward(self, x):
        x += self.branch(x)
        return x


@in_net("bn2")
class ValueReadAfterIAdd(Parts):
    """``+=`` on the value, which is read again afterwards under its first name."""

    def forward(self, x):
        out = self.branch(x)
        kept = out
        out += x
        return F.relu(out) + 0.5 * kept


@in_net("relu_", probes={"relu_": ("bn2", None)}, inplace_probe=True)
class AliasReadAfterIAdd(Parts):
    """The value is an in-place ReLU's result: two names for one tensor, which is overwritten under one, read by the other."""

    def forward(self, x):
        first = self.branch(x)
        second = F.relu_(first)
        second += x
        return second - 0.5 * first


@in_net("bn2")
class ViewOverwritten(Parts):
    """The value is overwritten through a view of it."""

    def forward(self, x):
        out = self.branch(x)
        out[:, 2:4].mul_(0.5)
        flat = out.view(out.shape[0], -1)
        flat.clamp_(min=-1.0)
        return out + x


@in_net("relu_", probes={"relu_": ("bn1", None)}, inplace_probe=True, count=1)
class IgnoredReLU(nn.Module):
    """No shortcut; the activation is in place and its result is ignored, so that a gate behind it would reach nobody."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        F.relu_(x)
        return torch.tanh(self.bn2(self.conv2(x)))


IgnoredReLU.expected = None
