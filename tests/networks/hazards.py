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
from typing import Any, ClassVar

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
        held: address → a part of the reason why the site is not taken by itself.
        raises: name of the error that planning or applying ends in, and a part of its text.
        at: the patterns that choose sites; None: what a plan takes by itself.
        probes: site's address → what yields its value: the path of a module or a function, and which of its calls
            (None: each). By default the address is the module's path. None: it can't be told from outside.
        in_place: the gated value is what all see who hold that tensor, under any name.
        variants: other ways to use the network. An injected one does the same as the original, or raises.
        must: ways to use the network in which an injected one does the same as the original.
        recomputes: path of a module that the backward pass calls again.
        seeds: with how many seeds training is compared.
        infer: no example is given to ``plan``.
        trains: whether the original itself can be trained.
        pickles: whether the original itself can be pickled.
        json: whether the plan of another instance needs no inputs.
        dtype: of the weights.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    sites: tuple[str, ...] = ()
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    held: dict[str, str] = dataclasses.field(default_factory=dict)
    raises: tuple[str, str] | None = None
    at: str | None = None
    probes: dict[str, tuple[Any, int | None] | None] = dataclasses.field(default_factory=dict)
    in_place: bool = False
    variants: dict[str, Callable[[nn.Module], Any]] = dataclasses.field(default_factory=dict)
    must: dict[str, Callable[[nn.Module], Any]] = dataclasses.field(default_factory=dict)
    recomputes: str | None = None
    seeds: int = 1
    infer: bool = False
    trains: bool = True
    pickles: bool = True
    json: bool = True
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
    return (torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(batch)),)


def hazard(*sites, inputs=image, **expected):
    """Put a network (its class, or a function that makes it) into the table."""

    def register(build):
        _enter(build.__name__, build, inputs, sites, expected)
        return build

    return register


def in_net(*values, count=2, before=None, plain=False, **expected):
    """Put a block into the table: ``count`` of them in a ``Net``.

    ``values`` are its sites relative to the block, and so are the addresses in ``refused``, ``held``, ``probes`` and
    ``recomputes``. ``plain``: all units are refused, so that the stem's plain convolution is a site for who asks for it.
    """

    def register(block):
        def build():
            return Net(*[block() for _ in range(count)], before=before)

        paths = [f"blocks.{index}" for index in range(count)]
        sites = ["stem.2"] * plain + [f"{path}.{value}" for path in paths for value in values]
        if plain and not values:
            expected["at"] = "stem.2"
        held = {f"{path}.{value}": reason for path in paths for value, reason in expected.pop("held", {}).items()}
        refused = expected.pop("refused", {})
        refused = {f"{path}.{name}".strip("."): reason for path in paths for name, reason in refused.items()}
        probes = expected.pop("probes", {})
        expected["probes"] = {
            f"{path}.{value}": probe
            if probe is None or not isinstance(probe[0], str)
            else (f"{path}.{probe[0]}", probe[1])
            for path in paths
            for value, probe in probes.items()
        }
        if "recomputes" in expected:
            expected["recomputes"] = f"{paths[0]}.{expected['recomputes']}"
        _enter(block.__name__, build, image, sites, {**expected, "refused": refused, "held": held})
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
        self.head = nn.Linear(channels, 5)
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
            nn.Conv2d(C, C, 7, padding=3, groups=C),
            nn.GroupNorm(1, C),
            nn.Conv2d(C, 16, 1),
            nn.GELU(),
            nn.Conv2d(16, C, 1),
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


@in_net("outer.bn2", count=1)
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
class Shadowing(Parts):
    """Attributes of the instance that shadow the class's, and a method of ``nn.Module``: the instance's count."""

    scale, active = 1.0, False

    def __init__(self):
        super().__init__()
        self.scale, self.active, self.half = 0.5, True, C // 2

    def forward(self, x):
        out = self.branch(x)
        if self.active:
            out = out * self.scale
        return F.relu(x + out) + x[:, : self.half].mean()


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
class AddIntoShortcut(Parts):
    """The branch is added into the shortcut, in place."""

    def __init__(self):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(C)

    def forward(self, x):
        identity = self.bn0(x)
        identity += self.branch(x)
        return identity


@in_net("bn2")
class ValueReadAfterIAdd(Parts):
    """``+=`` on the value, which is read again afterwards under its first name."""

    def forward(self, x):
        out = self.branch(x)
        kept = out
        out += x
        return F.relu(out) + 0.5 * kept


@in_net(plain=True, count=1, refused={"relu_": "another name"}, trains=False)
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


@hazard("conv1.1", "tanh", refused={"relu_": "nobody reads"}, probes={"tanh": (torch.tanh, None)})
class IgnoredReLU(nn.Module):
    """No shortcut; the activation's result is ignored, so that a gate behind it would reach nobody."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.Sigmoid())
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)
        self.conv3 = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x):
        x = self.bn2(self.conv2(self.conv1(x)))
        F.relu_(x)
        return torch.tanh(self.conv3(x)).mean([2, 3])


@hazard("conv1.1", refused={"act": "nobody reads"})
class IgnoredModule(nn.Module):
    """As above, with a module."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.Sigmoid())
        self.conv2, self.act = nn.Conv2d(C, C, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.conv2(self.conv1(x))
        self.act(x)
        return x.mean([2, 3])


@hazard("block.bn2")
class Recurrent(nn.Module):
    """One block is called three times."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, C, 3, padding=1), Basic()

    def forward(self, x):
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return x


@hazard("left.0.bn2")
class TwoParents(nn.Module):
    """One block hangs under two parents and is called through both."""

    def __init__(self):
        super().__init__()
        block = Basic()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.left, self.right = nn.Sequential(block, nn.MaxPool2d(2)), nn.Sequential(nn.AvgPool2d(2), block)

    def forward(self, x):
        x = self.stem(x)
        return self.left(x) + 0.5 * self.right(x)


@hazard("backbone.blocks.0.bn2", "backbone.blocks.1.bn2", inputs=lambda n: (*image(n), *image(n, 32)))
class Siamese(nn.Module):
    """One backbone is called twice, at two resolutions."""

    def __init__(self):
        super().__init__()
        self.backbone = Net(Basic(), Basic())

    def forward(self, one, other):
        return (self.backbone(one) - self.backbone(other)).abs()


@hazard(refused={"1": "called"})
def relu_shared_in_sequential():
    """One ReLU module stands at three places of a Sequential: a gate on it would act at all three."""
    act = nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(3, C, 3), act, nn.Conv2d(C, C, 3), act, nn.Conv2d(C, C, 3), act, nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


# -- arguments --------------------------------------------------------------------------------------------


class Calling(nn.Module):
    """Two blocks that are called with more than x."""

    def __init__(self, block, *args, **kwargs):
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.blocks = nn.ModuleList([block(), block()])
        self.args, self.kwargs = args, kwargs

    def forward(self, x, *args, **kwargs):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, *self.args, *args, **self.kwargs, **kwargs)
        return x


def called(*args, variants=(), **kwargs):
    """Put a block into the table that is called with these arguments, and then with each of the variants'."""

    def register(block):
        def build():
            return Calling(block, *args, **kwargs)

        def other(extra, keywords):
            def run(net):
                net.args, net.kwargs = extra, keywords
                return net(*image(2))

            return run

        uses = {f"{extra}{keywords}": other(extra, keywords) for extra, keywords in variants}
        _enter(block.__name__, build, image, ["blocks.0.bn2", "blocks.1.bn2"], {"variants": uses})
        return block

    return register


@called(None, variants=[((torch.ones(1),), {}), ((), {})])
class OptionalArgument(Parts):
    """An argument that is None in the observed call."""

    def forward(self, x, mask=None):
        out = self.branch(x)
        if mask is not None:
            out = out * mask * 3
        return out + x


@called(variants=[((torch.ones(1),), {}), ((), {"mask": torch.ones(1)}), ((None,), {})])
class OptionalArgumentLeftOut(Parts):
    """An argument with a default that nobody gives in the observed call, and somebody later."""

    def forward(self, x, mask=None):
        out = self.branch(x)
        if mask is not None:
            out = out * mask * 3
        return out + x


@called(True, variants=[((False,), {}), ((), {"flag": True}), ((), {})])
class BooleanArgument(Parts):
    """A flag."""

    def forward(self, x, flag=False):
        out = self.branch(x)
        return out + x if flag else out * 2 + x


@called(scale=2.0, variants=[((), {"scale": 3.0}), ((), {})])
class KeywordOnly(Parts):
    """A keyword-only argument."""

    def forward(self, x, *, scale=1.0):
        return self.branch(x) * scale + x


@called(variants=[((), {"scale": 3.0}), ((3.0,), {})])
class DefaultArgument(Parts):
    """A default that the observed call left alone."""

    def forward(self, x, scale=0.5):
        return self.branch(x) * scale + x


@called(0.5, 2, variants=[((0.5,), {}), ((0.5, 3), {}), ((), {}), ((0.5, 2, 3), {})])
class VarArguments(Parts):
    """``*args``."""

    def forward(self, x, *scales):
        out = self.branch(x)
        for scale in scales:
            out = out * scale
        return out + x


@called(scale=0.5, variants=[((), {}), ((), {"scale": 2.0}), ((), {"scale": 0.5, "shift": 1.0})])
class VarKeywords(Parts):
    """``**kwargs``."""

    def forward(self, x, **options):
        out = self.branch(x) * options.get("scale", 1.0)
        if "shift" in options:
            out = out + options["shift"]
        return out + x


@called("relu", variants=[(("tanh",), {})])
class StringArgument(Parts):
    """A string that chooses a branch."""

    def forward(self, x, act):
        return getattr(torch, act)(self.branch(x) + x)


@hazard(
    "blocks.0.view",
    "blocks.1.view",
    probes={"blocks.0.view": (Tensor.view, 1), "blocks.1.view": (Tensor.view, 2)},
    must={"another size": lambda net: net(*image(2, 24))},
)
class SizeArguments(nn.Module):
    """A parent tells its blocks the size of the image as plain numbers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.blocks = nn.ModuleList([ToldItsSize(), ToldItsSize()])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, x.shape[2], x.shape[3])
        return x


class ToldItsSize(Parts):
    def forward(self, x, height, width):
        out = self.branch(x).flatten(2).view(x.shape[0], C, height, width)
        return out + x


# -- randomness, training, eval ---------------------------------------------------------------------------


@in_net("bn2")
class FunctionalDropout(Parts):
    """``F.dropout(..., training=self.training)``."""

    def forward(self, x):
        return F.relu(F.dropout(self.branch(x), 0.3, training=self.training) + x)


@in_net("bn2")
class FunctionalDropPath(Parts):
    """Drop path in the forward itself, in training only."""

    def forward(self, x):
        out = self.branch(x)
        if self.training:
            shape = (x.shape[0],) + (1,) * (x.ndim - 1)
            out = out * x.new_empty(shape).bernoulli_(0.6) / 0.6
        return out + x


@in_net("bn2", seeds=6)
class LayerDropTorch(Parts):
    """Stochastic depth by a coin outside of the graph: a graph would keep one side of the coin."""

    def forward(self, x):
        if self.training and torch.rand(1).item() < 0.4:
            return x
        return self.branch(x) + x


@in_net("bn2", seeds=6)
class LayerDropPython(Parts):
    """The same with Python's coin."""

    def forward(self, x):
        if self.training and random.random() < 0.5:
            return x
        return self.branch(x) + x


@in_net("bn2", seeds=6)
class LayerDropScaled(Parts):
    """A random number, not a random branch: ``shake-shake`` with Python's generator."""

    def forward(self, x):
        scale = random.random() if self.training else 0.5
        return self.branch(x) * scale + x


@hazard("block.bn2")
class AuxiliaryOutput(nn.Module):
    """The network returns two values in training and one in eval."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, C, 3, padding=1), Basic()
        self.aux = nn.Conv2d(C, 2, 1)

    def forward(self, x):
        x = self.block(self.stem(x))
        if self.training:
            return x, self.aux(x)
        return x


@hazard("stem.1", "block.act")
class AuxiliaryOutputOfBlock(nn.Module):
    """A module returns a tuple in training and its one value in eval; a gate on what it returns must know."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.ReLU())
        self.block = TupleInTraining()

    def forward(self, x):
        x = self.block(self.stem(x))
        if self.training:
            x, extra = x
            return x.mean([2, 3]), extra
        return x.mean([2, 3])


class TupleInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(C, C, 3, padding=1), nn.ReLU()

    def forward(self, x):
        y = self.act(self.conv(x))
        if self.training:
            return y, x.mean()
        return y


@in_net(plain=True, refused={"relu#2": "more often"})
class OtherOrderInTraining(Parts):
    """In training one more ``F.relu`` comes first: the second one of eval is the third one there."""

    def __init__(self):
        super().__init__()
        self.act = nn.Identity()

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        if self.training:
            y = F.relu(y + 0.1 * torch.randn_like(y))
        y = self.bn2(self.conv2(F.relu(y)))
        return x + self.act(F.relu(y))


@in_net("bn2")
class OtherBranchInTraining(Parts):
    """Another child takes part in training."""

    def __init__(self):
        super().__init__()
        self.noisy = nn.Conv2d(C, C, 1)

    def forward(self, x):
        return self.branch(x) + (self.noisy(x) if self.training else x)


@in_net(plain=True, refused={"": "reads the mode"})
class ReadsChildsMode(Parts):
    """The forward asks a child for its mode."""

    def forward(self, x):
        out = self.branch(x)
        if self.bn1.training:
            out = 0.5 * out
        return out + x


@in_net(plain=True, refused={"": "reads the mode"})
class CallsForwardDirectly(Parts):
    """A child's ``forward`` is called past its ``__call__``."""

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn1.forward(self.conv1.forward(x))))


@in_net("bn2")
class OwnStatistics(Parts):
    """The forward itself keeps running statistics in training, in a buffer it overwrites in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(C))

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean([0, 2, 3]), alpha=0.1)
        return self.branch(x) + x - self.mean.view(1, -1, 1, 1)


@in_net(plain=True, refused={"": "stores"})
class ReassignsBuffer(Parts):
    """The forward puts another tensor in its buffer's place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen = self.seen + 1
        return self.branch(x) + x / self.seen


@in_net("bn2")
class WithoutGradInTraining(Parts):
    """``torch.no_grad()`` around a part of the training branch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(C))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean([0, 2, 3]), alpha=0.1)
        return self.branch(x) + x - self.mean.view(1, -1, 1, 1)


@in_net("bn2")
class FrozenByMode(Parts):
    """Batch norm that stays in eval mode when the network trains."""

    def train(self, mode=True):
        super().train(mode)
        self.bn1.eval()
        self.bn2.eval()
        return self

    def forward(self, x):
        return F.relu(self.branch(x) + x)


@in_net("bn2")
class Frozen(Parts):
    """torchvision's ``FrozenBatchNorm2d``: buffers only, and the last of the branch."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = FrozenBatchNorm2d(C), FrozenBatchNorm2d(C)
        for norm in (self.bn1, self.bn2):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x):
        return F.relu(self.branch(x) + x)


@hazard("blocks.0.bn2", "blocks.1.bn2")
def all_frozen():
    """No parameter of the network asks for a gradient; the blocks' must."""
    return Net(Basic(), Basic()).requires_grad_(False)


# -- inputs and outputs -----------------------------------------------------------------------------------

Named = collections.namedtuple("Named", ["features", "logits"])


@dataclasses.dataclass
class Data:
    """What a network of today returns."""

    features: Tensor
    logits: Tensor


class Mapping(collections.OrderedDict):
    """A dict that is to be built from keywords only, as ``transformers``' outputs are."""

    def __init__(self, *args, **kwargs):
        if args and not isinstance(args[0], dict | list):
            raise TypeError("a Mapping is made of a dict")
        super().__init__(*args, **kwargs)


def returning(name, make):
    """A network whose root holds a residual unit itself and returns a structure."""

    class Returns(Parts):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, C, 3, padding=1)

        def forward(self, x):
            x = self.stem(x)
            x = F.relu(self.branch(x) + x)
            return make(x, x.mean([2, 3]))

    Returns.__qualname__ = Returns.__name__ = name
    return Returns


ReturnsDict = hazard("bn2")(returning("ReturnsDict", lambda x, y: {"features": x, "logits": y}))
ReturnsList = hazard("bn2")(returning("ReturnsList", lambda x, y: [x, [y, None]]))
ReturnsTuple = hazard("bn2")(returning("ReturnsTuple", lambda x, y: (x, (y, 3))))
ReturnsNamed = hazard("bn2")(returning("ReturnsNamed", Named))
ReturnsData = hazard("bn2")(returning("ReturnsData", Data))


class Within(nn.Module):
    """A network around a backbone with structured output, with a residual unit of its own."""

    def __init__(self, backbone, read):
        super().__init__()
        self.backbone, self.read = backbone, read
        self.block = Basic()
        self.conv, self.bn = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

    def forward(self, x):
        x = self.block(self.read(self.backbone(x)))
        return x + self.bn(self.conv(x))


def read_named(output):
    return output.features * output[1][..., None, None]


def read_data(output):
    return output.features * output.logits[..., None, None]


def read_item(output):
    return output["features"] * output["logits"][..., None, None]


@hazard("backbone.bn2", "block.bn2", "bn")
def named_output_read():
    """A namedtuple on its way from a child to its parent."""
    return Within(ReturnsNamed(), read_named)


@hazard("backbone.bn2", "block.bn2", "bn")
def data_output_read():
    """A dataclass on its way from a child to its parent."""
    return Within(ReturnsData(), read_data)


@hazard("backbone.block.bn2", "block.bn2", "bn")
def mapping_output_read():
    """An output class with a constructor of its own on its way from a child to its parent."""
    return Within(MappingBackbone(), read_item)


class MappingBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, C, 3, padding=1), Basic()

    def forward(self, x):
        x = self.block(self.stem(x))
        return Mapping(features=x, logits=x.mean([2, 3]))


class OnePart(Parts):
    """A root that holds its residual unit itself."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)

    def unit(self, x):
        x = self.stem(x)
        return F.relu(self.branch(x) + x)


@hazard("bn2", inputs=lambda n: ({"image": image(n)[0], "scale": torch.rand(n)},), json=False)
class TakesDict(OnePart):
    """A dict goes in."""

    def forward(self, batch):
        return self.unit(batch["image"]) * batch["scale"].view(-1, 1, 1, 1)


@hazard("bn2", inputs=lambda n: ([image(n)[0], image(n)[0]],), json=False)
class TakesList(OnePart):
    """A list goes in."""

    def forward(self, images):
        return sum(self.unit(x) for x in images[:1]) + images[1].mean()


@hazard("bn2", inputs=lambda n: (Named(image(n)[0], torch.rand(n)),), json=False)
class TakesNamed(OnePart):
    """A namedtuple goes in."""

    def forward(self, batch):
        return self.unit(batch.features) * batch.logits.view(-1, 1, 1, 1)


@hazard("bn2", inputs=lambda n: (*image(n), torch.rand(n, C)))
class TakesTwo(OnePart):
    """Two tensors go in, of different rank."""

    def forward(self, x, gain):
        return self.unit(x) * gain[:, :, None, None]


@hazard("bn2", inputs=lambda n: (image(n), {"gain": torch.rand(n, C)}), json=False)
class TakesKeyword(OnePart):
    """A tensor goes in by name."""

    def forward(self, x, *, gain):
        return self.unit(x) * gain[:, :, None, None]


# -- hooks ------------------------------------------------------------------------------------------------


def halve(module, args, output):
    return output * 0.5


def double_input(module, args):
    return (args[0] * 2, *args[1:])


def hook_sequential(net):
    net.blocks.register_forward_hook(halve)


def hook_blocks(net):
    for block in net.blocks:
        block.register_forward_pre_hook(double_input)


def hook_values(net):
    for block in net.blocks:
        block.bn2.register_forward_hook(halve)


HookOnSequential = in_net("bn2", before=hook_sequential)(
    type("HookOnSequential", (Basic,), {"__doc__": "A container's hook."})
)
HookOnBlock = in_net("bn2", before=hook_blocks)(type("HookOnBlock", (Basic,), {"__doc__": "A block's pre-hook."}))
HookOnValue = in_net("bn2", before=hook_values)(type("HookOnValue", (Basic,), {"__doc__": "A hook changes the value."}))


# -- number formats and layout ----------------------------------------------------------------------------


@hazard("blocks.0.bn2", dtype=torch.bfloat16, inputs=lambda n: (image(n)[0].bfloat16(),))
def brain_float():
    """bfloat16: the gate must be exactly 1 there too."""
    return Net(Basic())


@hazard("blocks.0.bn2", dtype=torch.float64, inputs=lambda n: (image(n)[0].double(),))
def double_precision():
    """float64."""
    return Net(Basic())


@hazard("blocks.0.bn2", inputs=lambda n: (image(n)[0].to(memory_format=torch.channels_last),))
def channels_last():
    """The layout of the output is part of the output."""
    return Net(Basic()).to(memory_format=torch.channels_last)


@in_net("conv", count=1)
class NHWCResidual(nn.Module):
    """The sum is taken with the channels last: the block is where the branch is (N, C, H, W) last, at the convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 3, padding=1), nn.LayerNorm(C)
        self.fc1, self.fc2 = nn.Linear(C, 16), nn.Linear(16, C)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        out = self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        x = x + self.fc2(F.gelu(self.fc1(out)))
        return x.permute(0, 3, 1, 2)


@in_net("gelu", count=1, probes={"gelu": None})
class TokenResidual(nn.Module):
    """Tokens (N, L, C) with a convolution in the branch: the block is behind it and its activation."""

    def __init__(self):
        super().__init__()
        self.fc1, self.conv, self.fc2 = nn.Linear(C, C), nn.Conv2d(C, C, 3, padding=1, groups=C), nn.Linear(C, C)

    def forward(self, x):
        n, c, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        out = self.fc1(x).transpose(1, 2).reshape(n, c, h, w)
        x = x + self.fc2(F.gelu(self.conv(out)).flatten(2).transpose(1, 2))
        return x.transpose(1, 2).reshape(n, c, h, w)


@hazard("blocks.0.bn2", "blocks.1.bn2", inputs=lambda n: (torch.randn(n, 3, 32),))
class OneDimensional(nn.Module):
    """Audio: one spatial dimension."""

    rank, convolution, norm = 1, nn.Conv1d, nn.BatchNorm1d

    def __init__(self):
        super().__init__()
        self.stem = self.convolution(3, C, 3, padding=1)
        self.blocks = nn.Sequential(RankBlock(self.convolution, self.norm), RankBlock(self.convolution, self.norm))

    def forward(self, x):
        return self.blocks(self.stem(x))


class RankBlock(nn.Module):
    def __init__(self, convolution, norm):
        super().__init__()
        self.conv1, self.bn1 = convolution(C, C, 3, padding=1), norm(C)
        self.conv2, self.bn2 = convolution(C, C, 3, padding=1), norm(C)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


@hazard("blocks.0.bn2", "blocks.1.bn2", inputs=lambda n: (torch.randn(n, 3, 4, 8, 8),))
class ThreeDimensional(OneDimensional):
    """Video: three."""

    rank, convolution, norm = 3, nn.Conv3d, nn.BatchNorm3d


# -- containers and parameters ----------------------------------------------------------------------------


@hazard("blocks.0.bn2", "blocks.1.bn2")
class ModuleListLoop(nn.Module):
    """Blocks in a ModuleList."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.blocks = nn.ModuleList([Basic(), Basic()])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


@hazard("blocks.a.bn2", "blocks.b.bn2")
class ModuleDictLoop(ModuleListLoop):
    """Blocks in a ModuleDict, in another order than they run."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({"b": Basic(), "a": Basic()})

    def forward(self, x):
        x = self.stem(x)
        for key in sorted(self.blocks):
            x = self.blocks[key](x)
        return x


@in_net("conv2d#2", count=1, probes={"conv2d#2": (F.conv2d, 3)})
class OwnParameters(nn.Module):
    """Convolutions are functions; weights are the block's own, in a ParameterList and as attributes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, C, 3, 3) / 9)
        self.bias = nn.Parameter(torch.randn(C))
        self.scales = nn.ParameterList([torch.rand(C, 1, 1)])

    def branch(self, x):
        return F.conv2d(F.relu(F.conv2d(x, self.weight, self.bias, padding=1)), self.weight, padding=1)

    def forward(self, x):
        return x + self.scales[0] * self.branch(x)


@in_net("conv2", pickles=False)
class WeightNormed(Parts):
    """Weights that are computed, in torch's new way."""

    def __init__(self):
        super().__init__()
        parametrizations.weight_norm(self.conv1)
        parametrizations.spectral_norm(self.conv2)

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn1(self.conv1(x))))


@in_net("conv2", pickles=False)
class SpectralNormedOldStyle(Parts):
    """A weight that a pre-hook computes."""

    def __init__(self):
        super().__init__()
        nn.utils.spectral_norm(self.conv2)

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn1(self.conv1(x))))


@in_net("conv", pickles=False)
class OwnParametrization(nn.Module):
    """The block's own parameter is parametrised, so its class is a made-up one already."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(C, 1, 1))
        nn.utils.parametrize.register_parametrization(self, "scale", Softplus())

    def forward(self, x):
        return x + self.scale * self.conv(x)


class Softplus(nn.Module):
    def forward(self, x):
        return F.softplus(x)


@hazard("2", "4")
def hand_written_sequential():
    """No class of the author's at all: the gates have to go on leaves."""
    return nn.Sequential(
        nn.Conv2d(3, C, 3, padding=1),
        nn.BatchNorm2d(C),
        nn.ReLU(inplace=True),
        nn.Conv2d(C, C, 3),
        nn.SiLU(),
        nn.Flatten(),
    )


@hazard(raises=("NoSites", "no convolutional stage"))
def convolutions_without_activation():
    """Only activated convolutions are sites of the plain kind."""
    return nn.Sequential(
        nn.Conv2d(3, C, 3, padding=1),
        nn.BatchNorm2d(C),
        nn.Conv2d(C, C, 3),
        nn.BatchNorm2d(C),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@hazard("features.0.relu", "features.1.relu", probes={"features.0.relu": (F.relu, 1), "features.1.relu": (F.relu, 2)})
def sequential_subclass():
    """A Sequential with a forward of its own is not its children in a row."""
    return Features(SequentialWithForward(3), SequentialWithForward(C))


class Features(nn.Module):
    def __init__(self, *features):
        super().__init__()
        self.features = nn.Sequential(*features)

    def forward(self, x):
        return self.features(x).mean([2, 3])


class SequentialWithForward(nn.Sequential):
    def __init__(self, inputs):
        super().__init__(collections.OrderedDict(conv=nn.Conv2d(inputs, C, 3, padding=1), norm=nn.BatchNorm2d(C)))

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


@in_net("norm")
class SequentialWithShortcut(nn.Sequential):
    """A Sequential whose own forward adds its input."""

    def __init__(self):
        super().__init__(collections.OrderedDict(conv=nn.Conv2d(C, C, 3, padding=1), norm=nn.BatchNorm2d(C)))

    def forward(self, x):
        return super().forward(x) + x


@in_net("norm2")
class OtherNorms(nn.Module):
    """Group norm, and a layer norm between two permutations."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(C, C, 3, padding=1), nn.LayerNorm(C)
        self.conv2, self.norm2 = nn.Conv2d(C, C, 3, padding=1), nn.GroupNorm(2, C)

    def forward(self, x):
        out = self.norm1(self.conv1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.norm2(self.conv2(F.gelu(out))) + x


@hazard(raises=("NoSites", "convolution"), inputs=lambda n: (torch.randn(n, 6),), infer=True)
def without_convolution():
    """Nothing to gate."""
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


# -- control flow -----------------------------------------------------------------------------------------


@in_net("bn2", variants={"small image": lambda net: net(*image(2, 6)), "other size": lambda net: net(*image(2, 24))})
class ShapeInCondition(Parts):
    """A branch by the image's size."""

    def forward(self, x):
        out = self.branch(x)
        if x.shape[-1] > 8:
            out = 0.5 * out
        return out + x


@in_net("bn2", variants={"small image in training": lambda net: net.train()(*image(2, 6))})
class ShapeInTrainingCondition(Parts):
    """The same in the training branch only."""

    def forward(self, x):
        out = self.branch(x)
        if self.training and x.shape[-1] > 8:
            out = 0.5 * out
        return out + x


@in_net("cat", probes={"cat": ("join", None)})
class Chunks(Parts):
    """Iteration over a chunk, ``len`` and unpacking: YOLO's C2f."""

    def __init__(self):
        super().__init__()
        self.join = nn.Identity()

    def forward(self, x):
        parts = list(self.branch(x).chunk(2, 1))
        assert len(parts) == 2
        first, second = parts
        return x + self.join(torch.cat([second * 2, first], 1))


@in_net("bn2", variants={"other size": lambda net: net(*image(2, 24))})
class UnpacksShape(Parts):
    """``n, c, h, w = x.shape``, used in views."""

    def forward(self, x):
        n, c, h, w = x.shape
        shuffled = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.branch(shuffled) + x


@in_net(
    "interpolate",
    count=1,
    probes={"interpolate": (F.interpolate, None)},
    variants={"other size": lambda net: net(*image(2, 24)), "odd": lambda net: net(*image(2, 13))},
)
class SizeAsInt(Parts):
    """``int(x.shape[2])``."""

    def forward(self, x):
        height = int(x.shape[2] * 1.0)
        return F.interpolate(self.branch(x), size=(height, int(x.shape[3]))) + x


@in_net(plain=True, refused={"": "Python number"})
class ValueAsInt(Parts):
    """A size that depends on the data."""

    def forward(self, x):
        height = x.shape[2] + int(x.mean() > 1000)
        return F.interpolate(self.branch(x), size=(height, x.shape[3])) + x


@in_net(
    "interpolate",
    count=1,
    probes={"interpolate": (F.interpolate, None)},
    variants={"other size": lambda net: net(*image(2, 24))},
)
class MatchesShapes(Parts):
    """Sizes are compared, and repaired if they differ."""

    def forward(self, x):
        out = self.branch(F.max_pool2d(x, 2))
        if out.shape != x.shape:
            out = F.interpolate(out, size=x.shape[-2:])
        return out + x


@in_net("bn2")
class ChecksTypes(Parts):
    """``isinstance(x, Tensor)``."""

    def forward(self, x):
        if isinstance(x, torch.Tensor) and not isinstance(x, tuple | list):
            x = [x]
        return self.branch(x[0]) + x[0]


@hazard("block.bn2", refused={"(the network)": "depends on the data"})
class DependsOnData(nn.Module):
    """The data decide; the blocks inside of it are as good as any."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, C, 3, padding=1), Basic()

    def forward(self, x):
        x = self.block(self.stem(x))
        if x.mean() > 0:
            return x * 2
        return x


@hazard("block.bn2", infer=True)
class DependsOnDataInferred(DependsOnData):
    """The same, with no example given."""


@in_net(plain=True, count=1, refused={"": "depends on the data"})
class BlockDependsOnData(Parts):
    """The data decide within the block."""

    def forward(self, x):
        out = self.branch(x)
        if out.mean() > 0:
            out = out * 2
        return out + x


@in_net(plain=True, count=1, refused={"": "grad"})
class PartlyWithoutGrad(Parts):
    """``torch.no_grad()`` around a part: dropped, it would change the gradients."""

    def forward(self, x):
        with torch.no_grad():
            gate = torch.sigmoid(x.mean([2, 3], keepdim=True))
        return self.branch(x) + x * gate


@in_net(plain=True, count=1, refused={"": "autocast"})
class Autocasts(Parts):
    """``torch.autocast`` around a part, on the CPU."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.conv2(F.relu(self.conv1(x)))
        return self.bn2(out.float()) + x


def under_autocast(net):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net(*image(2))


@in_net(plain=True, count=1, refused={"": "autocast"}, variants={"under autocast": under_autocast})
class KeepsPrecision(Parts):
    """An island of full precision: ``autocast(enabled=False)`` matters only to those who train with autocast."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            out = self.bn2(self.conv2(F.relu(self.conv1(x.float()))))
        return out + x


@in_net(
    plain=True,
    count=1,
    refused={"": "grad"},
    variants={"without grad": lambda net: torch.no_grad()(net.eval())(*image(2))},
)
class AsksForGrad(Parts):
    """A branch by ``torch.is_grad_enabled()``."""

    def forward(self, x):
        out = self.branch(x)
        if not torch.is_grad_enabled():
            out = out * 0.5
        return out + x


class Negated(torch.autograd.Function):
    """Minus, with minus as its gradient."""

    @staticmethod
    def forward(ctx, x):
        return -x

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Negate(nn.Module):
    def forward(self, x):
        return Negated.apply(x)


@in_net("apply", count=1, probes={"apply": None})
class AutogradFunction(Parts):
    """An autograd function in the forward."""

    def forward(self, x):
        return Negated.apply(self.branch(x)) + x


@in_net("bn2")
class AutogradFunctionInChild(Parts):
    """An autograd function within a child: no business of the block's."""

    def __init__(self):
        super().__init__()
        self.act = Negate()

    def forward(self, x):
        return self.branch(self.act(x)) + x


@in_net(plain=True, count=1, refused={"": "self.last"})
class Remembers(Parts):
    """The forward leaves something behind."""

    def forward(self, x):
        self.last = x
        return self.branch(x) + x


@in_net(plain=True, count=1, refused={"": "stores"})
class Collects(Parts):
    """The forward appends to a list: an edited one would not, and looking must not either."""

    def __init__(self):
        super().__init__()
        self.collected = []

    def forward(self, x):
        out = self.branch(x)
        self.collected.append(out.detach())
        return out + x


@in_net(plain=True, count=1, refused={"": "checkpoint"}, recomputes="conv1")
class Checkpointed(Parts):
    """Activation checkpointing inside of the forward: a graph can't hold it."""

    def forward(self, x):
        return checkpoint(self.branch, x, use_reentrant=False) + x


@in_net("bn2", recomputes="conv1")
class CheckpointedInTraining(Parts):
    """The same in training only."""

    def forward(self, x):
        out = checkpoint(self.branch, x, use_reentrant=False) if self.training else self.branch(x)
        return out + x


@hazard("blocks.0.bn2", "blocks.1.bn2", recomputes="blocks.0.conv1")
class CheckpointsBlocks(ModuleListLoop):
    """Blocks are called through ``checkpoint``."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@hazard(refused={"block.bn2": "grad"})
class BackboneWithoutGrad(nn.Module):
    """The backbone runs under ``no_grad``: no gradient will ever reach a block in it."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, C, 3, padding=1), Basic(), nn.Linear(C, 3)

    def forward(self, x):
        with torch.no_grad():
            x = self.block(self.stem(x))
        return self.head(x.mean([2, 3]))


# -- what a graph would freeze ----------------------------------------------------------------------------


def raise_drop(net):
    for block in net.blocks:
        block.p = 0.9
    return net.train()(*image(2))


@in_net("bn2", variants={"p raised later": raise_drop})
class ScheduledDropout(Parts):
    """A number that a schedule changes during training, as drop path's rate."""

    def __init__(self):
        super().__init__()
        self.p = 0.1

    def forward(self, x):
        return F.dropout(self.branch(x), self.p, self.training) + x


def turn_off(net):
    for block in net.blocks:
        block.enabled = False
    return net.eval()(*image(2))


@in_net("bn2", variants={"turned off later": turn_off})
class SwitchedOff(Parts):
    """A flag that somebody turns later, as ``use_checkpoint`` or RepVGG's ``deploy``."""

    def __init__(self):
        super().__init__()
        self.enabled = True

    def forward(self, x):
        return self.branch(x) + x if self.enabled else x


@in_net("bn2")
class MovesToDevice(Parts):
    """``.to(x.device)``: the observed device is none."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.randn(1, C, 1, 1))

    def forward(self, x):
        return self.branch(x) + (x.to(self.shift.device) - self.shift.to(x.device, x.dtype))


@in_net(plain=True, refused={"": "device"})
class AsksForDevice(Parts):
    """A branch by the device's kind."""

    def forward(self, x):
        out = self.branch(x)
        if x.device.type == "cpu":
            out = out * 0.5
        return out + x


@in_net("add", count=1, probes={"add": None})
class MadeOnDevice(Parts):
    """A tensor made on the input's device."""

    def forward(self, x):
        return self.branch(x) + torch.linspace(0, 0.1, C, device=x.device).view(1, -1, 1, 1) + x


@hazard("blocks.0.bn2")
class NeedsFakeTensors(nn.Module):
    """A constant on the CPU keeps the call off the meta device; the block has a training branch."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, C, 3, padding=1), nn.Sequential(FunctionalDropout())

    def forward(self, x):
        return self.blocks(self.stem(x) + torch.linspace(0, 1, C).view(1, -1, 1, 1))


@hazard("blocks.0.bn2")
class NeedsRealTensors(nn.Module):
    """A number read from the data keeps the call off stand-ins; the block has a training branch."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, C, 3, padding=1), nn.Sequential(FunctionalDropout())

    def forward(self, x):
        x = self.stem(x)
        return self.blocks(x / x.abs().max().item())


# -- classes ----------------------------------------------------------------------------------------------


@in_net("bn2")
class HasSE(Parts):
    """The attribute that a block would get is something else already."""

    def __init__(self):
        super().__init__()
        self.se = nn.Dropout(0.1)

    def forward(self, x):
        return self.se(self.branch(x)) + x


class MaybeSE(Parts):
    def forward(self, x):
        out = self.branch(x)
        if self.se is not None:
            out = self.se(out)
        return out + x


@in_net("bn2")
class SEIsNone(MaybeSE):
    """The attribute is None, as timm's is."""

    def __init__(self):
        super().__init__()
        self.se = None


@in_net("bn2")
class SEIsNoneModule(MaybeSE):
    """The attribute is None among the submodules."""

    def __init__(self):
        super().__init__()
        self.register_module("se", None)


@in_net("bn2")
class SEIsNoneOfClass(MaybeSE):
    """The attribute is None on the class, where it hides a submodule of that name."""

    se: nn.Module | None = None


class Registering(type):
    """A metaclass that refuses a second class of one name."""

    names: ClassVar[set[str]] = set()

    def __new__(mcs, name, bases, namespace, **options):
        return super().__new__(mcs, name, bases, namespace)

    def __init__(cls, name, bases, namespace, *, label="unlabelled"):
        super().__init__(name, bases, namespace)
        cls.label = label


@in_net("bn2")
class WithMetaclass(Basic, metaclass=Registering, label="labelled"):
    """A metaclass with an option."""


class Registered(Parts):
    """A base class that wants a key of each subclass, and each key once."""

    keys: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, key):
        super().__init_subclass__()
        if key in Registered.keys:
            raise KeyError(f"{key} is taken")
        Registered.keys[key] = cls


@in_net("bn2")
class InRegistry(Registered, key="block"):
    """``__init_subclass__`` with a required option."""

    def forward(self, x):
        return self.branch(x) + x


class Counted(Parts):
    """A base class that keeps a list of its subclasses."""

    names: ClassVar[list[str]] = []

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if cls.__name__ in Counted.names:
            raise KeyError(f"{cls.__name__} is taken")
        Counted.names.append(cls.__name__)


@hazard("blocks.0.0.bn2", "blocks.1.bn2")
def in_named_registry():
    """``__init_subclass__`` that refuses two classes of one name, where two edits of one class are needed."""
    return Net(nn.Sequential(OnceNamed(), nn.Conv2d(C, 12, 1)), OnceNamed(12), nn.Conv2d(12, C, 1))


class OnceNamed(Counted):
    def forward(self, x):
        return self.branch(x) + x


@in_net("bn2")
class WithSlots(Basic):
    """A class with slots."""

    __slots__ = ("slot",)


SOURCE = """
import torch.nn.functional as F
class Executed(Base):
    def forward(self, x):
        return F.relu(self.branch(x) + x)
"""


def executed():
    """A class whose source is nowhere to be found and which can't be imported."""
    names = {"Base": Parts, "__name__": "nowhere"}
    exec(SOURCE, names)
    return Net(names["Executed"](), names["Executed"]())


hazard("blocks.0.bn2", "blocks.1.bn2", pickles=False)(executed)


@hazard("blocks.0.bn2", "blocks.1.bn2", pickles=False)
def closure():
    """A class made in a function, whose forward uses a name of that function."""
    factor = 0.5

    class Local(Parts):
        def forward(self, x):
            return factor * self.branch(x) + x

    return Net(Local(), Local())


@in_net("bn2")
class CallsSuper(Basic):
    """The forward calls its base class's."""

    def forward(self, x):
        return super().forward(x) * 2


@hazard("bn.1", "bn_1")
class CollidingNames(nn.Module):
    """Two values whose names become one when they are made an attribute's."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.bn = nn.ModuleList([nn.BatchNorm2d(C), nn.BatchNorm2d(C)])
        self.bn_1 = nn.BatchNorm2d(C)
        self.conv1, self.conv2 = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.bn[1](self.conv1(x))
        return x + self.bn_1(self.conv2(x))


@in_net("bn2")
class FirstArgumentHasAnotherName(Parts):
    """``self`` is a custom, no keyword."""

    def forward(module, x):
        return module.branch(x) + x


@in_net(plain=True, count=1, refused={"": "autocast"})
class AutocastDecorated(Parts):
    """The whole forward is decorated with ``torch.autocast``."""

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x):
        return self.bn2(self.conv2(x)) + x


@in_net(plain=True, count=1, refused={"": "grad"})
class AsksWhetherInputNeedsGrad(Parts):
    """A branch by ``x.requires_grad``, which no observed input has and every stem's output does."""

    def forward(self, x):
        out = self.branch(x)
        if x.requires_grad:
            out = out * 0.5
        return out + x
