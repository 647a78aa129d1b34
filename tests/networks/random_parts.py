"""What random networks are made of: modules as authors write them, each with branches in its forward.

A constructor keeps its children in attributes, lists or dicts; ``random_nets`` draws which of them go where.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


# -- convolution, normalisation, activation ---------------------------------------------------------------

ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "leaky in place": lambda: nn.LeakyReLU(0.1, inplace=True),
    "prelu": nn.PReLU,
    "F.relu": lambda: F.relu,
    "F.relu in place": lambda: relu_in_place,
    "torch.relu": lambda: torch.relu,
    "swish": lambda: swish,
    "clamp": lambda: clamped,
    "none": nn.Identity,
    None: lambda: None,
}


def relu_in_place(x):
    return F.relu(x, inplace=True)


def swish(x):
    return x * torch.sigmoid(x)


def clamped(x):
    return x.clamp(-1, 3)


def normalisation(kind, rank, channels):
    if kind == "batch":
        return BATCH_NORMS[rank](channels)
    if kind == "instance":
        return INSTANCE_NORMS[rank](channels, affine=True)
    if kind == "group":
        return nn.GroupNorm(channels if channels % 2 else 2, channels)
    return nn.GroupNorm(1, channels) if kind == "layer" else None


class Unit(nn.Module):
    """Convolution, normalisation, activation, dropout, in an order of its own; some of them may be missing."""

    def __init__(
        self, rank, channels, out, kernel=3, groups=1, stride=1, norm="batch", act="relu", first="conv", drop=0.0
    ):
        super().__init__()
        self.conv = CONVS[rank](channels, out, kernel, stride, kernel // 2, groups=groups, bias=norm is None)
        self.norm = normalisation(norm, rank, out if first == "conv" else channels)
        self.act = ACTIVATIONS[act]()
        self.first = first
        self.drop = drop

    def forward(self, x):
        if self.first == "conv":
            x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.act is not None:
            x = self.act(x)
        if self.drop > 0:
            x = F.dropout(x, self.drop, self.training)
        if self.first != "conv":
            x = self.conv(x)
        return x


def sequential_unit(rank, channels, out, kernel=3, groups=1, stride=1, norm="batch", act="relu", **_):
    activation = ACTIVATIONS[act]()
    steps = [CONVS[rank](channels, out, kernel, stride, kernel // 2, groups=groups), normalisation(norm, rank, out)]
    steps += [activation if isinstance(activation, nn.Module) else nn.ReLU()]
    return nn.Sequential(*(step for step in steps if step is not None))


def separable(rank, channels, out, kernel=3, **_):
    return nn.Sequential(
        CONVS[rank](channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False),
        BATCH_NORMS[rank](channels),
        nn.ReLU6(inplace=True),
        CONVS[rank](channels, out, 1, bias=False),
        BATCH_NORMS[rank](out),
        nn.ReLU6(inplace=True),
    )


class OwnWeights(nn.Module):
    """A convolution written with ``torch.nn.functional`` and parameters in a dict."""

    def __init__(self, rank, channels, out, kernel=3, **_):
        super().__init__()
        self.rank, self.kernel = rank, kernel
        self.weights = nn.ParameterDict({"weight": torch.randn(out, channels, *[kernel] * rank) / channels})
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x):
        return F.relu(FUNCTIONS[self.rank](x, self.weights["weight"], self.bias, padding=self.kernel // 2))


class Gated(nn.Module):
    """WaveNet's unit: the product of two convolutions, one through tanh, the other through a sigmoid."""

    def __init__(self, rank, channels, out, kernel=3, **_):
        super().__init__()
        self.conv = CONVS[rank](channels, 2 * out, kernel, padding=kernel // 2)

    def forward(self, x):
        content, gate = self.conv(x).chunk(2, dim=1)
        return torch.tanh(content) * torch.sigmoid(gate)


# -- units of several convolutions ------------------------------------------------------------------------


class Residual(nn.Module):
    """Branch and shortcut, put together in one of many ways."""

    def __init__(self, rank, channels, out, branch, how="x + f", act="relu", projection=False):
        super().__init__()
        self.branch = branch
        self.shortcut = None
        if projection or channels != out:
            self.shortcut = nn.Sequential(CONVS[rank](channels, out, 1, bias=False), BATCH_NORMS[rank](out))
        self.how = how
        self.act = ACTIVATIONS[act]()
        self.gamma = nn.Parameter(torch.randn(out, *[1] * rank)) if how == "gamma" else None
        self.drop_path = StochasticDepth(0.3, "row") if how == "drop path" else nn.Identity()

    def forward(self, x):
        out = self.branch(x)
        skip = x if self.shortcut is None else self.shortcut(x)
        if self.how == "x + f":
            out = skip + out
        elif self.how == "f + x":
            out = out + skip
        elif self.how == "f += x":
            out += skip
        elif self.how == "x += f":
            skip = skip.clone()
            skip += out
            out = skip
        elif self.how == "input += f":
            skip += out
            out = skip
        elif self.how == "torch.add":
            out = torch.add(skip, out)
        elif self.how == "alpha":
            out = torch.add(skip, out, alpha=0.5)
        elif self.how == "add_":
            out.add_(skip)
        elif self.how == "scaled":
            out = skip + 0.3 * out
        elif self.how == "gamma":
            out = skip + out * self.gamma
        elif self.how == "sum":
            out = sum([skip, out])
        else:
            out = skip + self.drop_path(out)
        return out if self.act is None else self.act(out)


class Joined(nn.Module):
    """Branches, concatenated or summed, with a convolution behind or without."""

    def __init__(self, rank, channels, out, *branches, how="cat", merge=False):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.how, self.rank = how, rank
        self.merge = Unit(rank, out, out, kernel=1) if merge else None

    def forward(self, x):
        if self.how == "cat":
            x = torch.cat([branch(x) for branch in self.branches], 1)
        elif self.how == "cat from the end":
            x = torch.cat(tuple(branch(x) for branch in self.branches), dim=-1 - self.rank)
        elif self.how == "cat list":
            outs = []
            for branch in self.branches:
                outs.append(branch(x))
            x = torch.cat(outs, dim=1)
        elif self.how == "sum":
            x = sum(branch(x) for branch in self.branches)
        else:
            total = self.branches[0](x)
            for branch in self.branches[1:]:
                total += branch(x)
            x = total
        return x if self.merge is None else self.merge(x)


class Partial(nn.Module):
    """C2f: half of the channels goes through the blocks, and every value on the way is kept."""

    def __init__(self, rank, channels, out, *blocks, how="chunk", half=4):
        super().__init__()
        self.cv1 = Unit(rank, channels, 2 * half, kernel=1, act="silu")
        self.cv2 = Unit(rank, (2 + len(blocks)) * half, out, kernel=1, act="silu")
        self.m = nn.ModuleList(blocks)
        self.how, self.half = how, half

    def forward(self, x):
        y = self.cv1(x)
        if self.how == "chunk":
            y = list(y.chunk(2, 1))
        elif self.how == "split":
            y = list(y.split((self.half, self.half), 1))
        else:
            y = [y[:, : self.half], y[:, self.half :]]
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Shuffled(nn.Module):
    """ShuffleNet V2: one half is left alone, then the channels are shuffled."""

    def __init__(self, rank, channels, out, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, self.branch(right)), dim=1)
        n, c, *size = x.shape
        return x.view(n, 2, c // 2, *size).transpose(1, 2).reshape(n, c, *size)


class Dense(nn.Module):
    """DenseNet: every layer sees what all before it made."""

    def __init__(self, rank, channels, out, *layers, how="names"):
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(f"layer{number}", layer)
        self.names, self.how = [f"layer{number}" for number in range(len(layers))], how

    def forward(self, x):
        features = [x]
        for layer in self.children() if self.how == "children" else [getattr(self, name) for name in self.names]:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Hourglass(nn.Module):
    """Down, something, up again, and a skip connection around it."""

    def __init__(self, rank, channels, out, inner, how="cat", up="interpolate"):
        super().__init__()
        self.inner = inner
        self.rank, self.how = rank, how
        self.up = TRANSPOSED[rank](out, channels, 2, 2) if up == "transposed" else None
        self.match = CONVS[rank](out, channels, 1)
        self.after = Unit(rank, 2 * channels, out) if how == "cat" else Unit(rank, channels, out)

    def forward(self, x):
        y = self.inner(POOLS[self.rank](x, 2))
        y = self.up(y) if self.up is not None else F.interpolate(self.match(y), size=x.shape[2:])
        return self.after(torch.cat([x, y], 1) if self.how == "cat" else x + y)


class Attended(nn.Module):
    """A block with a gate of its own already."""

    def __init__(self, rank, channels, out, inner):
        super().__init__()
        self.inner = inner
        self.fc = CONVS[rank](out, out, 1)
        self.dims = list(range(2, rank + 2))

    def forward(self, x):
        x = self.inner(x)
        return x * self.fc(x.mean(self.dims, keepdim=True)).sigmoid()


# -- how authors wire things ------------------------------------------------------------------------------


class Chain(nn.Module):
    """One after the other, kept in a list, a dict or attributes."""

    def __init__(self, rank, channels, out, *parts, how="list"):
        super().__init__()
        self.how = how
        if how == "dict":
            self.parts = nn.ModuleDict({f"part{number}": part for number, part in enumerate(parts)})
        elif how == "sequential":
            self.parts = nn.Sequential(*parts)
        else:
            self.parts = nn.ModuleList(parts)

    def forward(self, x):
        if self.how == "sequential":
            return self.parts(x)
        if self.how == "numbers":
            for number in range(len(self.parts)):
                x = self.parts[number](x)
            return x
        for part in self.parts.values() if self.how == "dict" else self.parts:
            x = part(x)
        return x


def sequential(rank, channels, out, *parts, **_):
    return nn.Sequential(*parts)


class Again(nn.Module):
    """One module called several times."""

    def __init__(self, rank, channels, out, inner, times=2):
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x):
        for _ in range(self.times):
            x = self.inner(x)
        return x


class Tied(nn.Module):
    """One module under two parents."""

    def __init__(self, rank, channels, out, inner):
        super().__init__()
        self.one, self.other = Around(inner), Around(inner)

    def forward(self, x):
        return self.one(x) + self.other(x.flip(-1))


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return F.relu(self.inner(x))


class Moody(nn.Module):
    """Another way in training."""

    def __init__(self, rank, channels, out, inner, how="dropout"):
        super().__init__()
        self.inner, self.how = inner, how
        self.dropout = [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d][rank - 1](0.2)

    def forward(self, x):
        if self.how == "noise" and self.training:
            x = x + 0.1 * torch.randn_like(x)
        x = self.inner(x)
        if self.how == "dropout":
            return self.dropout(x)
        if self.how == "functional":
            return F.dropout(x, 0.2, training=self.training)
        if not self.training:
            return x
        return x * 0.9


class Told(nn.Module):
    """Its inner block is told what to do by keyword; what the class says may be said again by an instance."""

    scale: float | None = 1.0
    flag = False

    def __init__(self, rank, channels, out, inner, scale=None, flag=True):
        super().__init__()
        self.body = Obedient(inner)
        if flag:
            self.scale, self.flag = scale, flag

    def forward(self, x, unused=None):
        return self.body(x, scale=self.scale, flag=self.flag)


class Obedient(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, mask=None, *, scale=1.0, flag=False, **other):
        if mask is not None:
            x = x * mask
        x = self.inner(x)
        if scale is not None:
            x = x * scale
        return F.relu(x) if flag else x


class Paired(nn.Module):
    """Its inner block returns several things."""

    def __init__(self, rank, channels, out, inner, how="tuple"):
        super().__init__()
        self.body, self.how = Returning(inner, how), how

    def forward(self, x):
        if self.how == "dict":
            found = self.body(x)
            return found["out"] + found["mean"]
        out, mean = self.body(x)
        return out + mean


class Returning(nn.Module):
    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x):
        x = self.inner(x)
        mean = x.mean(dim=1, keepdim=True)
        return {"out": x, "mean": mean} if self.how == "dict" else (x, mean)


class Shaped(nn.Module):
    """Looks at shapes before it does something."""

    def __init__(self, rank, channels, out, inner):
        super().__init__()
        self.inner, self.channels = inner, channels

    def forward(self, x):
        if x.shape[1] != self.channels:
            raise ValueError(f"expected {self.channels} channels, got {x.shape[1]}")
        y = self.inner(x)
        if y.shape == x.shape:
            return y * 0.5
        b = y.size(0)
        return y.reshape(b, -1).view(b, *y.shape[1:])


class Recomputed(nn.Module):
    """Its activations are computed again in the backward pass."""

    def __init__(self, rank, channels, out, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.training else self.inner(x)


class Net(nn.Module):
    """A stem, parts one after the other, and a head; inputs and outputs of several forms."""

    def __init__(self, rank, stem, parts, head, *, inputs, outputs):
        super().__init__()
        self.stem = stem
        self.parts = nn.ModuleList(parts)
        self.head = head
        self.inputs, self.outputs, self.dims = inputs, outputs, list(range(2, rank + 2))

    def forward(self, x, other=None, *, scale=None):
        if self.inputs == "dict":
            x = x["image"]
        x = self.stem(x)
        if other is not None:
            x = torch.abs(x - self.stem(other))
        seen = []
        for part in self.parts:
            x = part(x)
            seen.append(x)
        out = self.head(x.mean(self.dims))
        if scale is not None:
            out = out * scale
        if self.outputs == "tuple":
            return out, *seen
        if self.outputs == "dict":
            return {"out": out, "features": seen}
        if self.outputs == "more in training" and self.training:
            return out, seen[0]
        return out
