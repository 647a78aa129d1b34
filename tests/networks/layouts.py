"""Networks that keep values with their channels last, or activate before they convolve: added to ``PLACES``."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.networks.places import C, branch, conv, network, units


class Maps(nn.Module):
    """A depthwise convolution of tokens."""

    def __init__(self, channels):
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x, h, w):
        n, _, c = x.shape
        return self.dw(x.transpose(1, 2).reshape(n, c, h, w)).flatten(2).transpose(1, 2)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.maps, self.act, self.two = nn.Linear(C, 2 * C), Maps(2 * C), nn.GELU(), nn.Linear(2 * C, C)

    def forward(self, x, h, w):
        return self.two(self.act(self.maps(self.one(x), h, w)))


@units("mix.maps.dw")
class TokensWithAConvolution(nn.Module):
    """A mixing MLP with a depthwise convolution in it, on (N, L, C): the block is in front of the projection."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.drop = nn.LayerNorm(C), Mixing(), nn.Dropout(0.1)

    def forward(self, x):
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.drop(self.mix(self.norm(tokens), h, w))
        return tokens.transpose(1, 2).view(n, c, h, w)


@units("act")
class StaysChannelsLast(nn.Module):
    """(N, H, W, C) but for the depthwise convolution, its norm and activation; a layer scale at the end."""

    def __init__(self):
        super().__init__()
        self.dw, self.bn, self.act = nn.Conv2d(C, C, 3, padding=1, groups=C), nn.BatchNorm2d(C), nn.ReLU()
        self.norm, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.scale = nn.Parameter(torch.rand(C))

    def forward(self, x):
        x = x.movedim(1, -1)
        y = self.act(self.bn(self.dw(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        x = x + self.scale * self.down(F.gelu(self.up(self.norm(y))))
        return x.movedim(-1, 1)


class Tail(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.layers = (
            nn.LayerNorm(C),
            nn.Sequential(nn.Conv1d(C, 2 * C, 3, padding=1), nn.GLU(1), nn.Conv1d(C, C, 1)),
        )

    def forward(self, x):
        return self.layers(self.norm(x).mT).mT


@units("tail.layers")
class PositionsFirst(nn.Module):
    """A residual sum of (L, N, C), its branch a module of (N, L, C) with convolutions of (N, C, L) in it."""

    def __init__(self):
        super().__init__()
        self.tail, self.drop = Tail(), nn.Dropout(0.1)

    def forward(self, x):
        n, c, h, w = x.shape
        rows = x.reshape(n, c, h * w).permute(2, 0, 1)
        rows = self.drop(self.tail(rows.transpose(0, 1)).transpose(0, 1)) + rows
        return rows.permute(1, 2, 0).reshape(n, c, h, w)


@units("view#2")
class KernelsOfEachExample(nn.Module):
    """Convolutions whose weights are each example's: the batch stands with the channels in dimension 1 there, and not behind it."""

    def __init__(self):
        super().__init__()
        self.weights, self.out = nn.Linear(C, C * 9), nn.Linear(C, C)

    def forward(self, x):
        n, c, h, w = x.shape
        kernels = self.weights(x.mean((2, 3))).view(n * c, 1, 3, 3)
        y = F.conv2d(x.reshape(1, n * c, h, w), kernels, padding=1, groups=n * c)
        y = self.out(y.view(n, c, h, w).permute(0, 2, 3, 1))
        return (x.permute(0, 2, 3, 1) + y).permute(0, 3, 1, 2)


@units()
class ProjectsByConvolutions(nn.Module):
    """Attention between positions with keys that a convolution makes, and a first token that none sees."""

    def __init__(self):
        super().__init__()
        self.norm, self.key, self.value, self.out = (
            nn.LayerNorm(C),
            nn.Conv2d(C, C, 3, padding=1),
            nn.Linear(C, C),
            nn.Linear(C, C),
        )

    def forward(self, x):
        n, c, h, w = x.shape
        tokens = torch.cat([x.mean((2, 3))[:, None], x.flatten(2).mT], 1)
        y = self.norm(tokens)
        first, rest = torch.split(y, [1, h * w], 1)
        keys = torch.cat([first, self.key(rest.mT.reshape(n, c, h, w)).flatten(2).mT], 1)
        y = (y @ keys.mT / c**0.5).softmax(-1) @ self.value(y)
        tokens = tokens + self.out(y)
        return tokens[:, 1:].mT.reshape(n, c, h, w)


@units()
class PairsAtOnce(nn.Module):
    """Attention whose softmax is over all pairs of positions, and whose result is read as a map without being transposed."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.value = nn.Conv2d(C, 4, 1), nn.Conv2d(C, 4, 1), nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x):
        n, c, h, w = x.shape
        pairs = self.one(x).flatten(2).transpose(1, 2) @ self.two(x).view(n, -1, h * w)
        pairs = torch.softmax(pairs.view(n, -1), 1).view(n, h * w, h * w)
        return x + (pairs @ self.value(x).flatten(2).transpose(1, 2)).reshape(n, c, h, w)


# -- chains ---------------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """A convolution for values with their channels last."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inner = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x):
        return self.inner(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class RowsNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x):
        return self.norm(x.flatten(0, -2)).view(x.shape)


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.n1, self.two, self.n2, self.three, self.n3 = (
            Rows(3, C), RowsNorm(C), Rows(C, C), RowsNorm(C), Rows(C, 2 * C), RowsNorm(2 * C),
        )  # fmt: skip

    def forward(self, x):
        x = x.movedim(1, -1)
        x = F.relu(self.n1(self.one(x)))
        x = F.relu(self.n2(self.two(x)))
        x = torch.tanh(self.n3(self.three(x)))
        return x.mean((1, 2))


network("one.inner", "two.inner", "three.inner")(Last)


class ResponseNorm(nn.Module):
    """A normalisation of one's own, written as a formula."""

    def __init__(self, channels):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(channels, 1, 1)), nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + 1e-6) * self.scale + self.shift


class Threshold(nn.Module):
    """An activation of one's own."""

    def __init__(self, channels):
        super().__init__()
        self.tau = nn.Parameter(torch.rand(channels, 1, 1) - 0.5)

    def forward(self, x):
        return torch.maximum(x, self.tau)


@network("0.2", "1.2", "2.2")
def OwnNormsAndActivations():
    def layer(inputs, outputs):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), ResponseNorm(outputs), Threshold(outputs))

    return nn.Sequential(layer(3, C), layer(C, C), layer(C, C), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 4))


class Down(nn.Sequential):
    def __init__(self, inputs, outputs, first=False):
        before = [] if first else [nn.AvgPool2d(2), nn.InstanceNorm2d(inputs), nn.PReLU(inputs)]
        super().__init__(*before, nn.Conv2d(inputs, outputs, 3, padding=1))


class Up(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm, self.act, self.conv = (
            nn.InstanceNorm2d(inputs),
            nn.PReLU(inputs),
            nn.Conv2d(inputs, outputs, 3, padding=1),
        )

    def forward(self, low, high):
        joined = torch.cat([F.interpolate(low, scale_factor=2.0), high], 1)
        return self.conv(self.act(self.norm(joined)))


@network("one", "two", "three", "four")
class ActivatesBefore(nn.Module):
    """A small U-Net of layers that normalise and activate what they read; the last convolution is the head."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = Down(3, C, first=True), Down(C, C), Down(C, C)
        self.four, self.five = Up(2 * C, C), Up(2 * C, 40)

    def forward(self, x):
        one = self.one(x)
        two = self.two(one)
        return self.five(self.four(self.three(two), two), one)


@network("mul", "mul#2")
class SwishByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.n1, self.two, self.n2 = (
            nn.Conv2d(3, C, 3),
            nn.BatchNorm2d(C),
            nn.Conv2d(C, C, 3),
            nn.BatchNorm2d(C),
        )

    def forward(self, x):
        x = self.n1(self.one(x))
        x = x * torch.sigmoid(x)
        x = self.n2(self.two(x))
        return torch.mul(x.sigmoid(), x).mean((2, 3))


@units(attended=("se.out.inner",))
class GatedByRepetition(nn.Module):
    """Attention whose gate is repeated, on values with their channels last: the block is at the convolution before it."""

    class Se(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.one, self.two = Rows(C, C), nn.Linear(C, 4), nn.Linear(4, C)

        def forward(self, x):
            x = self.out(x)
            gate = torch.sigmoid(self.two(F.relu(self.one(x.mean((1, 2), keepdim=True)))))
            return x * gate.repeat(1, x.shape[1], x.shape[2], 1)

    def __init__(self):
        super().__init__()
        self.norm, self.se = nn.LayerNorm(C), self.Se()

    def forward(self, x):
        x = x.movedim(1, -1)
        return (x + self.se(self.norm(x))).movedim(-1, 1)


class Streams(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.rest, self.skip = conv(), nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)

    def forward(self, x):
        x = self.shared(x)
        return self.rest(x), self.skip(x)


@network("getitem", "getitem#3")
class SkipSums(nn.Module):
    """Residual layers in one forward, whose second results are summed up: the sum is made of units, and has no block."""

    def __init__(self):
        super().__init__()
        self.stem, self.layers = conv(3), nn.ModuleList([Streams(), Streams(), Streams()])
        self.head = nn.Linear(C, 4)

    def forward(self, x):
        x, total = self.stem(x), 0.0
        for layer in self.layers:
            rest, skip = layer(x)
            x, total = x + rest, total + skip
        return self.head(total.mean((2, 3)))


@units("one", "two")
class TwoBranchesInAStack(nn.Module):
    """A shortcut and two branches, summed up at once: each branch has a block, the shortcut has none."""

    def __init__(self):
        super().__init__()
        self.one, self.two = branch(), branch()

    def forward(self, x):
        return F.relu(torch.stack([self.one(x), x, self.two(x)]).sum(0))


class Skip(nn.Module):
    """Puts what a module makes of a value beside it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.cat([x, self.inner(x)], 1)


@network("0.2", "1.inner.0.2", "1.inner.1.inner.2", "1.inner.2.2", "2.2")
def NestedSkips():
    """A U-Net of nested modules: its convolutions are gated, no skip of it is a dense layer, the innermost neither."""

    def layer(inputs, outputs, stride=1):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())

    def up(inputs, outputs):
        up = nn.ConvTranspose2d(inputs, outputs, 2, 2)
        return nn.Sequential(up, nn.BatchNorm2d(outputs), nn.ReLU())

    inner = nn.Sequential(layer(C, C, 2), Skip(layer(C, C)), up(2 * C, C))
    return nn.Sequential(layer(3, C, 2), Skip(inner), up(2 * C, C), nn.Conv2d(C, 2, 1))


class Padded(nn.Module):
    """A convolution that pads by a formula of its input's size."""

    def __init__(self, inputs, outputs, kernel, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, groups=groups)
        self.norm, self.act = nn.BatchNorm2d(outputs), nn.ReLU()

    def forward(self, x):
        h, w = x.shape[-2:]
        reach = self.conv.kernel_size[0] - 1
        x = F.pad(x, (reach // 2, reach - reach // 2 + w % 1, reach // 2, reach - reach // 2 + h % 1))
        return self.act(self.norm(self.conv(x)))


class PaddedPairs(nn.Module):
    """Depthwise and pointwise convolutions that take turns in one list: each pair has one block."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = conv(3), nn.Linear(C, 4)
        self.layers = nn.ModuleList([Padded(C, C, *(1, 1) if i % 2 else (3, C)) for i in range(6)])

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))


network("stem.2", "layers.1.act", "layers.3.act", "layers.5.act")(PaddedPairs)
