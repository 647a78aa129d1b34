"""Networks whose forwards return, take apart and hand on containers of classes of their own, and apply autograd functions."""

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from types import SimpleNamespace

import torch
from torch import Tensor, nn


class Output(OrderedDict):
    """Like the outputs of large libraries: keys, attributes and positions lead to the same values; None is left out."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key):
        return OrderedDict.__getitem__(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self):
        return tuple(self.values())


@dataclasses.dataclass
class Fields(OrderedDict):
    """A dataclass and a dict at once."""

    features: Tensor | None = None
    pooled: Tensor | None = None
    hidden: tuple | None = None

    def __post_init__(self):
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if value is not None:
                self[each.name] = value

    def __getitem__(self, key):
        return dict.__getitem__(self, key) if isinstance(key, str) else tuple(self.values())[key]


@dataclasses.dataclass(frozen=True)
class Frozen:
    features: Tensor
    pooled: Tensor
    scale: float = 2.0


class Box(dict):
    __getattr__ = dict.__getitem__


Pair = namedtuple("Pair", "features pooled")


class Several(tuple):
    @property
    def features(self):
        return self[0]


class Many(list):
    pass


class Plain:
    __slots__ = ("__dict__", "pooled")

    def __init__(self, features, pooled):
        self.features = features
        self.pooled = pooled


class Counted(dict):
    """Made in a way of its own: what it holds doesn't tell how it was made."""

    def __init__(self, values, seen=None):
        super().__init__(values)
        self.seen = [*(seen or []), len(values)]


def counted(features, pooled):
    one = Counted({"features": features, "pooled": pooled}, [7])
    one.seen.append(8)
    return one


def default(features, pooled):
    one = defaultdict(list)
    one["features"], one["pooled"] = features, pooled
    return one


MAKE = {
    "OrderedDict": lambda f, p: OrderedDict(features=f, pooled=p),
    "Output": lambda f, p: Output(features=f, pooled=p),
    "Fields": lambda f, p: Fields(features=f, pooled=p),
    "Fields, nested": lambda f, p: Fields(f, hidden=(f, Pair(f, p))),
    "Frozen": lambda f, p: Frozen(f, p, 3.0),
    "Box": lambda f, p: Box(features=f, pooled=p),
    "Pair": Pair,
    "Several": lambda f, p: Several((f, p)),
    "Many": lambda f, p: Many([f, {"pooled": p}]),
    "Plain": Plain,
    "SimpleNamespace": lambda f, p: SimpleNamespace(features=f, pooled=p),
}
UNLIKE = {"Counted": counted, "defaultdict": default}


class Returns(nn.Module):
    """The unit is in the forward that makes the container."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.norm(self.conv(x)))
        return (MAKE | UNLIKE)[self.how](x, x.mean((2, 3)))


READ = {
    "OrderedDict": lambda out: out["features"],
    "Output": lambda out: out[0] if out.pooled is not None else out.to_tuple()[1],
    "Fields": lambda out: out.features if out.hidden is None and len(out) == 2 else out[1],
    "Fields, nested": lambda out: out.hidden[1].features if out.pooled is None else out[0],
    "Frozen": lambda out: out.features * out.scale,
    "Box": lambda out: out.features if "pooled" in out else out["pooled"],
    "Pair": lambda out: out.features if isinstance(out, Pair) else None,
    "Several": lambda out: out.features,
    "Many": lambda out: out[0],
    "Plain": lambda out: out.features,
    "SimpleNamespace": lambda out: out.features,
}


class Reads(nn.Module):
    """A unit of the caller's reads what a child returns, as its author would; the container is handed on."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.backbone = Returns(how)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        out = self.backbone(x)
        x = READ[self.how](out)
        return {"logits": torch.relu(x + self.norm(self.conv(x))), "backbone": out}


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, beta):
        ctx.save_for_backward(x)
        ctx.beta = beta
        return x * torch.sigmoid(beta * x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(ctx.beta * x)
        return grad * gate * (1 + ctx.beta * x * (1 - gate)), None


class Applies(nn.Module):
    """An autograd function in the forward of the unit itself."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        x = Swish.apply(self.stem(x), 1.5)
        return Swish.apply(x + self.norm(self.conv(x)), 0.5)
