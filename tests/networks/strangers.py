"""Networks as different people write them, each in a style of its own, and the stages that a person would draw.

``STRANGERS`` is the table. Nothing in the package was written with these at hand: they stand for the network that the
next user brings. Sizes are tiny; the shapes of the forwards are not.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.common import randomise


@dataclasses.dataclass(frozen=True)
class Stranger:
    """One network and the stages expected of it.

    Args:
        build: makes it.
        inputs: shapes of the positional arguments without the batch.
        stages: for each its stride (of several branches, their strides) and the addresses of its sites.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    stages: tuple[tuple[float | tuple[float, ...], tuple[str, ...]], ...]

    def make(self) -> nn.Module:
        """The network in evaluation mode, with the same random weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return randomise(self.build()).eval()

    def call(self, batch: int) -> tuple[Any, ...]:
        """Arguments for a call."""
        generator = torch.Generator().manual_seed(batch)
        return tuple(torch.randn(batch, *shape, generator=generator) for shape in self.inputs)


STRANGERS: dict[str, Stranger] = {}


def stranger(*stages, inputs=((3, 32, 32),), **expected):
    """Put a network (its class, or a function that makes it) into the table."""

    def register(build):
        STRANGERS[build.__name__] = Stranger(build, inputs, stages, **expected)
        return build

    return register


# -- a U-Net: the decoder in a ModuleList, the skips in a dict ----------------------------------------------


def double_conv(i, o):
    return nn.Sequential(
        nn.Conv2d(i, o, 3, padding=1, bias=False),
        nn.BatchNorm2d(o),
        nn.ReLU(inplace=True),
        nn.Conv2d(o, o, 3, padding=1, bias=False),
        nn.BatchNorm2d(o),
        nn.ReLU(inplace=True),
    )


class Up(nn.Module):
    def __init__(self, i, skip, o):
        super().__init__()
        self.up = nn.ConvTranspose2d(i, o, 2, stride=2)
        self.conv = double_conv(o + skip, o)

    def forward(self, x, skip):
        x = self.up(x)
        dy, dx = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([skip, x], dim=1))


@stranger(
    (1, ("encoder.0.2", "encoder.0.5")),
    (2, ("encoder.1.2", "encoder.1.5")),
    (4, ("encoder.2.2", "encoder.2.5")),
    (8, ("bottleneck.2", "bottleneck.5")),
    (4, ("decoder.0.conv.2", "decoder.0.conv.5")),
    (2, ("decoder.1.conv.2", "decoder.1.conv.5")),
    (1, ("decoder.2.conv.2", "decoder.2.conv.5")),
)
class UNet(nn.Module):
    def __init__(self, widths=(6, 8, 12), classes=2):
        super().__init__()
        self.encoder = nn.ModuleList(double_conv(i, o) for i, o in zip((3, *widths), widths, strict=False))
        self.bottleneck = double_conv(12, 16)
        self.decoder = nn.ModuleList([Up(16, 12, 12), Up(12, 8, 8), Up(8, 6, 6)])
        self.head = nn.Conv2d(6, classes, 1)

    def forward(self, x):
        skips = {}
        for depth, stage in enumerate(self.encoder):
            x = stage(x)
            skips[f"level{depth}"] = x
            x = F.max_pool2d(x, 2)
        x = self.bottleneck(x)
        for depth, up in zip(reversed(range(len(self.encoder))), self.decoder, strict=True):
            x = up(x, skips[f"level{depth}"])
        return self.head(x)


# -- a detector built from a list of rows ------------------------------------------------------------------


class ConvBnSiLU(nn.Module):
    default_act = nn.SiLU()

    def __init__(self, c1, c2, k=1, s=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = self.default_act if act is True else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Neck(nn.Module):
    def __init__(self, c, shortcut):
        super().__init__()
        self.cv1, self.cv2 = ConvBnSiLU(c, c, 3), ConvBnSiLU(c, c, 3)
        self.add = shortcut

    def forward(self, x):
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class CSPFast(nn.Module):
    def __init__(self, c1, c2, n=1, shortcut=False):
        super().__init__()
        self.c = c2 // 2
        self.cv1 = ConvBnSiLU(c1, 2 * self.c)
        self.cv2 = ConvBnSiLU((2 + n) * self.c, c2)
        self.m = nn.ModuleList(Neck(self.c, shortcut) for _ in range(n))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class PyramidPool(nn.Module):
    def __init__(self, c, k=5):
        super().__init__()
        self.cv1, self.cv2 = ConvBnSiLU(c, c // 2), ConvBnSiLU(2 * c, c)
        self.m = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x):
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class Cat(nn.Module):
    def forward(self, x):
        return torch.cat(x, 1)


class Detect(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.nl = len(channels)
        self.cv2 = nn.ModuleList(nn.Sequential(ConvBnSiLU(c, 8, 3), nn.Conv2d(8, 4, 1)) for c in channels)
        self.cv3 = nn.ModuleList(nn.Sequential(ConvBnSiLU(c, 8, 3), nn.Conv2d(8, classes, 1)) for c in channels)

    def forward(self, x):
        for i in range(self.nl):
            x[i] = torch.cat((self.cv2[i](x[i]), self.cv3[i](x[i])), 1)
        if self.training:
            return x
        flat = torch.cat([xi.view(xi.shape[0], xi.shape[1], -1) for xi in x], 2)
        box, cls = flat.split((4, flat.shape[1] - 4), 1)
        return torch.cat((box, cls.sigmoid()), 1), x


ROWS = [
    (-1, "conv", 8, 3, 2),
    (-1, "conv", 12, 3, 2),
    (-1, "csp", 12, 1, True),
    (-1, "conv", 16, 3, 2),
    (-1, "csp", 16, 2, True),
    (-1, "pool", 16),
    (-1, "up"),
    ((-1, 2), "cat"),
    (-1, "csp", 12, 1, False),
    (-1, "conv", 12, 3, 2),
    ((-1, 5), "cat"),
    (-1, "csp", 16, 1, False),
    ((8, 11), "detect", 3),
]


@stranger(
    (4, ("model.2.m.0.cv2",)),
    (8, ("model.4.m.0.cv2", "model.4.m.1.cv2")),
    (4, ("model.8.cv2",)),
    (8, ("model.11.cv2",)),
)
class RowsDetector(nn.Module):
    def __init__(self):
        super().__init__()
        made, channels, self.save = [], [], []
        for i, (f, kind, *options) in enumerate(ROWS):
            c1 = (channels[-1] if channels else 3) if f == -1 else [channels[j] for j in f]
            if kind == "conv":
                module, c2 = ConvBnSiLU(c1, *options), options[0]
            elif kind == "csp":
                module, c2 = CSPFast(c1, *options), options[0]
            elif kind == "pool":
                module, c2 = PyramidPool(c1), c1
            elif kind == "up":
                module, c2 = nn.Upsample(scale_factor=2, mode="nearest"), c1
            elif kind == "cat":
                module, c2 = Cat(), sum(c1)
            else:
                module, c2 = Detect(*options, c1), 0
            module.i, module.f, module.type = i, f, kind
            self.save.extend(j for j in ([f] if isinstance(f, int) else f) if j != -1)
            made.append(module)
            channels.append(c2)
        self.model = nn.Sequential(*made)

    def forward(self, x):
        y = []
        for m in self.model:
            if m.f != -1:
                x = y[m.f] if isinstance(m.f, int) else [x if j == -1 else y[j] for j in m.f]
            x = m(x)
            y.append(x if m.i in self.save else None)
        return x


# -- WaveNet: gated convolutions over time, residual and skip outputs ----------------------------------------


class WaveBlock(nn.Module):
    def __init__(self, channels, skip, dilation):
        super().__init__()
        self.filter = nn.Conv1d(channels, channels, 2, dilation=dilation)
        self.gate = nn.Conv1d(channels, channels, 2, dilation=dilation)
        self.residual = nn.Conv1d(channels, channels, 1)
        self.skip = nn.Conv1d(channels, skip, 1)
        self.dilation = dilation

    def forward(self, x):
        padded = F.pad(x, (self.dilation, 0))
        z = torch.tanh(self.filter(padded)) * torch.sigmoid(self.gate(padded))
        return x + self.residual(z), self.skip(z)


@stranger((1, tuple(f"blocks.{i}.residual" for i in range(3))), inputs=((1, 48),))
class WaveNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.start = nn.Conv1d(1, 8, 1)
        self.blocks = nn.ModuleList(WaveBlock(8, 6, 2**i) for i in range(4))
        self.end1, self.end2 = nn.Conv1d(6, 6, 1), nn.Conv1d(6, 16, 1)

    def forward(self, x):
        x = self.start(x)
        total = 0
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        return self.end2(F.relu(self.end1(F.relu(total))))


# -- V-Net: volumes, residual in every level, written by hand -----------------------------------------------


class Level(nn.Module):
    def __init__(self, channels, n):
        super().__init__()
        self.ops = nn.Sequential(
            *(
                nn.Sequential(nn.Conv3d(channels, channels, 5, padding=2), nn.BatchNorm3d(channels), nn.PReLU(channels))
                for _ in range(n)
            )
        )

    def forward(self, x, residual=None):
        return F.elu(torch.add(self.ops(x), x if residual is None else residual))


@stranger(
    (1, ("down0.ops",)), (2, ("down1.ops",)), (4, ("bottom.ops",)), (2, ("level1.ops",)), (1, ("level0.ops",)),
    inputs=((1, 8, 8, 8),),
)  # fmt: skip
class VNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_tr = nn.Conv3d(1, 4, 5, padding=2)
        self.down0, self.pool0 = Level(4, 1), nn.Conv3d(4, 6, 2, stride=2)
        self.down1, self.pool1 = Level(6, 2), nn.Conv3d(6, 8, 2, stride=2)
        self.bottom = Level(8, 2)
        self.up1, self.level1 = nn.ConvTranspose3d(8, 6, 2, stride=2), Level(6, 2)
        self.up0, self.level0 = nn.ConvTranspose3d(6, 4, 2, stride=2), Level(4, 1)
        self.out = nn.Conv3d(4, 2, 1)

    def forward(self, x):
        a = self.down0(self.in_tr(x))
        b = self.down1(self.pool0(a))
        c = self.bottom(self.pool1(b))
        c = self.level1(self.up1(c) + b)
        c = self.level0(self.up0(c) + a)
        return F.softmax(self.out(c), dim=1)


# -- change detection: one trunk, two images ---------------------------------------------------------------


class Resnetish(nn.Module):
    def __init__(self, i, o, stride=1):
        super(Resnetish, self).__init__()  # noqa: UP008
        self.c1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.n1 = nn.BatchNorm2d(o)
        self.c2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.n2 = nn.BatchNorm2d(o)
        self.proj = nn.Conv2d(i, o, 1, stride) if (stride != 1 or i != o) else None

    def forward(self, t):
        r = t
        t = self.n1(self.c1(t)).relu_()
        t = self.n2(self.c2(t))
        if self.proj is not None:
            r = self.proj(r)
        t += r
        return t.relu_()


@stranger(
    (2, ("trunk.layer1.0.n2", "trunk.layer1.1.n2")),
    (4, ("trunk.layer2.0.n2", "trunk.layer2.1.n2")),
    inputs=((3, 24, 24), (3, 24, 24)),
)
class ChangeDetector(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            OrderedDict(
                stem=nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU()),
                layer1=nn.Sequential(Resnetish(6, 6), Resnetish(6, 6)),
                layer2=nn.Sequential(Resnetish(6, 10, 2), Resnetish(10, 10)),
            )
        )
        self.classify = nn.Linear(10, 1)

    def forward(self, before, after):
        a, b = self.trunk(before), self.trunk(after)
        return self.classify(torch.abs(a - b).amax(dim=(2, 3))).squeeze(1)


# -- flow refinement: a ConvGRU called again and again -------------------------------------------------------


class ConvGRU(nn.Module):
    def __init__(self, hidden, inputs):
        super().__init__()
        self.convz, self.convr, self.convq = (nn.Conv2d(hidden + inputs, hidden, 3, padding=1) for _ in range(3))

    def forward(self, h, x):
        hx = torch.cat([h, x], dim=1)
        z = torch.sigmoid(self.convz(hx))
        r = torch.sigmoid(self.convr(hx))
        q = torch.tanh(self.convq(torch.cat([r * h, x], dim=1)))
        return (1 - z) * h + z * q


@stranger((4, ("fnet.3.n2", "fnet.4.n2")), inputs=((3, 24, 24), (3, 24, 24)))
class Refiner(nn.Module):
    def __init__(self, iters=3):
        super().__init__()
        self.fnet = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3), nn.InstanceNorm2d(8), nn.ReLU(), Resnetish(8, 8, 2), Resnetish(8, 8)
        )
        self.gru = ConvGRU(8, 10)
        self.flow_head = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 2, 3, padding=1)
        )
        self.iters = iters

    def forward(self, image1, image2, iters=None):
        f1, f2 = self.fnet(image1), self.fnet(image2)
        h, context = torch.tanh(f1), torch.relu(f2)
        flow = torch.zeros_like(f1[:, :2])
        flows = []
        for _ in range(iters or self.iters):
            h = self.gru(h, torch.cat([context, flow], dim=1))
            flow = flow + self.flow_head(h)
            flows.append(flow)
        return flows if self.training else flows[-1]


# -- HRNet: two resolutions side by side, fused -------------------------------------------------------------


class Fusion(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(Resnetish(w, w), Resnetish(w, w)) for w in widths)
        rows = []
        for i, o in enumerate(widths):
            row = []
            for j, c in enumerate(widths):
                if j > i:
                    row.append(nn.Sequential(nn.Conv2d(c, o, 1, bias=False), nn.BatchNorm2d(o)))
                elif j < i:
                    row.append(nn.Sequential(nn.Conv2d(c, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o)))
                else:
                    row.append(nn.Identity())
            rows.append(nn.ModuleList(row))
        self.fuse = nn.ModuleList(rows)

    def forward(self, xs):
        xs = [branch(x) for branch, x in zip(self.branches, xs, strict=True)]
        out = []
        for i, row in enumerate(self.fuse):
            y = None
            for j, layer in enumerate(row):
                term = layer(xs[j])
                if j > i:
                    term = F.interpolate(term, size=xs[i].shape[-2:], mode="bilinear", align_corners=False)
                y = term if y is None else y + term
            out.append(F.relu(y))
        return out


@stranger(
    (2, ("stage1.0.n2", "stage1.1.n2")),
    ((2, 4), tuple(f"stage2.{m}.branches.{b}.{unit}.n2" for m in range(2) for b in range(2) for unit in range(2))),
)
class HighResolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(True))
        self.stage1 = nn.Sequential(Resnetish(6, 6), Resnetish(6, 6))
        self.transition = nn.ModuleList([nn.Identity(), nn.Sequential(nn.Conv2d(6, 10, 3, 2, 1), nn.ReLU(True))])
        self.stage2 = nn.Sequential(Fusion((6, 10)), Fusion((6, 10)))
        self.final = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = self.stage1(self.stem(x))
        xs = self.stage2([t(x) for t in self.transition])
        up = [xs[0]] + [F.interpolate(x, size=xs[0].shape[2:]) for x in xs[1:]]
        return self.final(torch.cat(up, 1))


# -- a checkpointed encoder ---------------------------------------------------------------------------------


@stranger(
    (2, ("stages.0.0.n2", "stages.0.1.n2")),
    (4, ("stages.1.0.n2", "stages.1.1.n2")),
)
class ThriftyEncoder(nn.Module):
    def __init__(self, grad_checkpointing=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.stages = nn.ModuleList(
            [nn.Sequential(Resnetish(6, 6), Resnetish(6, 6)), nn.Sequential(Resnetish(6, 10, 2), Resnetish(10, 10))]
        )
        self.grad_checkpointing = grad_checkpointing

    def forward(self, x):
        features = []
        x = self.stem(x)
        for stage in self.stages:
            again = self.grad_checkpointing and self.training
            x = checkpoint(stage, x, use_reentrant=False) if again else stage(x)
            features.append(x)
        return tuple(features)


# -- functional: all weights in one ParameterDict -----------------------------------------------------------


@stranger((1, ("relu",)), (2, ("relu#2",)), (4, ("relu#3",)), inputs=((3, 24, 24),))
class MetaLearner(nn.Module):
    def __init__(self):
        super().__init__()
        shapes = {"w0": (6, 3, 3, 3), "w1": (8, 6, 3, 3), "w2": (8, 8, 3, 3), "fc": (5, 8)}
        self.vars = nn.ParameterDict({name: nn.Parameter(torch.randn(shape) * 0.2) for name, shape in shapes.items()})
        self.bias = nn.ParameterDict({f"b{i}": nn.Parameter(torch.randn(shapes[f"w{i}"][0])) for i in range(3)})

    def forward(self, x, params=None):
        params = self.vars if params is None else params
        for i in range(3):
            x = F.conv2d(x, params[f"w{i}"], self.bias[f"b{i}"], padding=1)
            x = F.group_norm(x, 2)
            x = F.relu(x)
            if i < 2:
                x = F.max_pool2d(x, 2)
        return F.linear(x.mean((2, 3)), params["fc"])


# -- a cell found by search ---------------------------------------------------------------------------------


def sep_conv(c, k, stride):
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(c, c, k, stride, k // 2, groups=c, bias=False),
        nn.Conv2d(c, c, 1, bias=False),
        nn.BatchNorm2d(c),
    )


OPS = {
    "sep3": lambda c, s: sep_conv(c, 3, s),
    "sep5": lambda c, s: sep_conv(c, 5, s),
    "skip": lambda c, s: nn.Identity() if s == 1 else nn.AvgPool2d(2),
    "pool": lambda c, s: nn.MaxPool2d(3, s, 1),
}
GENES = [("sep3", 0), ("sep3", 1), ("skip", 0), ("sep5", 2), ("pool", 1), ("sep3", 0)]


class SearchedCell(nn.Module):
    def __init__(self, c_prev_prev, c_prev, c, reduction, reduction_prev):
        super().__init__()
        self.preprocess0 = nn.Sequential(
            nn.ReLU(), nn.Conv2d(c_prev_prev, c, 1, 2 if reduction_prev else 1), nn.BatchNorm2d(c)
        )
        self.preprocess1 = nn.Sequential(nn.ReLU(), nn.Conv2d(c_prev, c, 1), nn.BatchNorm2d(c))
        self._ops = nn.ModuleList(OPS[name](c, 2 if reduction and j < 2 else 1) for name, j in GENES)
        self._indices = [j for _, j in GENES]

    def forward(self, s0, s1):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i in range(len(self._ops) // 2):
            pairs = [(self._ops[2 * i + k], states[self._indices[2 * i + k]]) for k in range(2)]
            states.append(sum(op(h) for op, h in pairs))
        return torch.cat(states[2:], dim=1)


@stranger((1, ("cells.0.cat",)), (2, ("cells.1.cat", "cells.2.cat")), (4, ("cells.3.cat",)), inputs=((3, 16, 16),))
class Searched(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.cells = nn.ModuleList()
        before, last, reduced = 12, 12, False
        for i, c in enumerate((4, 6, 6, 8)):
            cell = SearchedCell(before, last, c, i in (1, 3), reduced)
            reduced = i in (1, 3)
            self.cells.append(cell)
            before, last = last, 3 * c
        self.classifier = nn.Linear(24, 5)

    def forward(self, x):
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1)
        return self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1))


# -- a generator: transposed convolutions with residual upsampling ------------------------------------------


class GrowingBlock(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.main = nn.Sequential(
            nn.BatchNorm2d(i),
            nn.ReLU(),
            nn.ConvTranspose2d(i, o, 4, 2, 1),
            nn.BatchNorm2d(o),
            nn.ReLU(),
            nn.Conv2d(o, o, 3, padding=1),
        )
        self.bypass = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(i, o, 1))

    def forward(self, x):
        return self.main(x) + self.bypass(x)


@stranger((1 / 2, ("blocks.0.main",)), (1 / 4, ("blocks.1.main",)), inputs=((6,),))
class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(6, 12 * 4 * 4)
        self.blocks = nn.Sequential(GrowingBlock(12, 10), GrowingBlock(10, 8))
        self.to_rgb = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1), nn.Tanh())

    def forward(self, z):
        h = self.project(z).view(z.size(0), -1, 4, 4)
        return self.to_rgb(self.blocks(h))


# -- text recognition: convolutions, then an LSTM -----------------------------------------------------------


@stranger((1, ("cnn.relu0",)), (2, ("cnn.relu1",)), (4, ("cnn.relu2", "cnn.relu3")), inputs=((1, 16, 48),))
class CRNN(nn.Module):
    def __init__(self):
        super().__init__()
        cnn = nn.Sequential()
        widths = (1, 6, 8, 10, 10)
        for i in range(4):
            cnn.add_module(f"conv{i}", nn.Conv2d(widths[i], widths[i + 1], 3, 1, 1))
            if i > 1:
                cnn.add_module(f"batchnorm{i}", nn.BatchNorm2d(widths[i + 1]))
            cnn.add_module(f"relu{i}", nn.ReLU(True))
            if i < 2:
                cnn.add_module(f"pooling{i}", nn.MaxPool2d(2, 2))
        cnn.add_module("last", nn.MaxPool2d((4, 1)))
        self.cnn = cnn
        self.rnn = nn.LSTM(10, 7, bidirectional=True)
        self.embedding = nn.Linear(14, 9)

    def forward(self, x):
        conv = self.cnn(x)
        conv = conv.squeeze(2).permute(2, 0, 1)
        recurrent, _ = self.rnn(conv)
        t, b, h = recurrent.size()
        return self.embedding(recurrent.view(t * b, h)).view(t, b, -1)


# -- super-resolution: scaled residuals, a long skip, pixel shuffle -----------------------------------------


class ScaledBlock(nn.Module):
    def __init__(self, n_feats, res_scale=0.1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(n_feats, n_feats, 3, padding=1), nn.ReLU(True), nn.Conv2d(n_feats, n_feats, 3, padding=1)
        )
        self.res_scale = res_scale

    def forward(self, x):
        res = self.body(x).mul(self.res_scale)
        res += x
        return res


@stranger((1, ("body.0.body", "body.1.body", "body.2.body")), inputs=((3, 12, 12),))
class SuperResolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.44, 0.43, 0.4]).view(1, 3, 1, 1))
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*(ScaledBlock(8) for _ in range(3)), nn.Conv2d(8, 8, 3, padding=1))
        self.tail = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x):
        x = self.head(x - self.mean)
        x = self.tail(self.body(x) + x)
        return x + self.mean


# -- MobileNet of the first version, from a list of rows ----------------------------------------------------


@stranger(
    (2, ("model.0.2", "model.1.5")),
    (4, ("model.2.5", "model.3.5")),
    (8, ("model.4.5", "model.5.5")),
)
class MobileNet(nn.Module):
    def __init__(self, cfg=((8, 1), (10, 2), (10, 1), (12, 2), (12, 1))):
        super().__init__()

        def conv_bn(i, o, s):
            return nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))

        def conv_dw(i, o, s):
            return nn.Sequential(
                nn.Conv2d(i, i, 3, s, 1, groups=i, bias=False),
                nn.BatchNorm2d(i),
                nn.ReLU(inplace=True),
                nn.Conv2d(i, o, 1, bias=False),
                nn.BatchNorm2d(o),
                nn.ReLU(inplace=True),
            )

        layers, channels = [conv_bn(3, 6, 2)], 6
        for c, s in cfg:
            layers.append(conv_dw(channels, c, s))
            channels = c
        self.model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(channels, 5)

    def forward(self, x):
        return self.fc(self.model(x).view(-1, self.fc.in_features))


# -- detection with a pyramid: losses in training, boxes otherwise ------------------------------------------


class Pyramid(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.inner = nn.ModuleList(nn.Conv2d(c, out, 1) for c in channels)
        self.layer = nn.ModuleList(nn.Conv2d(out, out, 3, padding=1) for _ in channels)

    def forward(self, x):
        names, values = list(x.keys()), list(x.values())
        last = self.inner[-1](values[-1])
        results = [self.layer[-1](last)]
        for i in range(len(values) - 2, -1, -1):
            lateral = self.inner[i](values[i])
            last = lateral + F.interpolate(last, size=lateral.shape[-2:], mode="nearest")
            results.insert(0, self.layer[i](last))
        return OrderedDict(zip(names, results, strict=True))


class Heads(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(2, channels), nn.ReLU())
        self.cls, self.box = nn.Conv2d(channels, classes, 3, padding=1), nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, features):
        logits, boxes = [], []
        for f in features:
            t = self.tower(f)
            logits.append(self.cls(t).flatten(2))
            boxes.append(F.relu(self.box(t)).flatten(2))
        return torch.cat(logits, 2), torch.cat(boxes, 2)


@stranger(
    (2, ("body.layer1.0.n2",)),
    (4, ("body.layer2.0.n2", "body.layer2.1.n2")),
    (8, ("body.layer3.0.n2",)),
)
class PyramidDetector(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "stem": nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU()),
                "layer1": nn.Sequential(Resnetish(6, 6)),
                "layer2": nn.Sequential(Resnetish(6, 8, 2), Resnetish(8, 8)),
                "layer3": nn.Sequential(Resnetish(8, 10, 2)),
            }
        )
        self.returned = ("layer2", "layer3")
        self.fpn = Pyramid((8, 10), 6)
        self.heads = Heads(6, 3)

    def forward(self, images, targets=None):
        if self.training and targets is None:
            targets = [{"labels": torch.zeros(1, dtype=torch.long)} for _ in images]
        out, x = OrderedDict(), images
        for name, module in self.body.items():
            x = module(x)
            if name in self.returned:
                out[name] = x
        logits, boxes = self.heads(list(self.fpn(out).values()))
        if self.training:
            labels = torch.cat([t["labels"] for t in targets])
            return {"classification": F.cross_entropy(logits.mean(2), labels), "box": boxes.mean()}
        return {"scores": logits.sigmoid(), "boxes": boxes}


# -- speech separation: encoder, masks, decoder -------------------------------------------------------------


class TemporalBlock(nn.Module):
    def __init__(self, c, hidden, dilation):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(c, hidden, 1, bias=False),
            nn.PReLU(),
            nn.GroupNorm(1, hidden, eps=1e-8),
            nn.Conv1d(hidden, hidden, 3, padding=dilation, dilation=dilation, groups=hidden, bias=False),
            nn.PReLU(),
            nn.GroupNorm(1, hidden, eps=1e-8),
            nn.Conv1d(hidden, c, 1, bias=False),
        )

    def forward(self, x):
        residual = x
        out = self.net(x)
        return out + residual


@stranger(
    (8, tuple(f"separator.repeats.{r}.{b}.net" for r in range(2) for b in range(2))),
    inputs=((160,),),
)
class SpeechSeparation(nn.Module):
    def __init__(self, speakers=2, n=10, c=6):
        super().__init__()
        self.encoder = nn.Conv1d(1, n, 16, stride=8, padding=4, bias=False)
        separator = nn.Module()
        separator.norm = nn.GroupNorm(1, n)
        separator.bottleneck = nn.Conv1d(n, c, 1)
        separator.repeats = nn.Sequential(
            *(nn.Sequential(*(TemporalBlock(c, 12, 2**x) for x in range(2))) for _ in range(2))
        )
        separator.mask = nn.Conv1d(c, speakers * n, 1)
        self.separator = separator
        self.decoder = nn.ConvTranspose1d(n, 1, 16, stride=8, padding=4, bias=False)
        self.speakers = speakers

    def forward(self, mixture):
        w = F.relu(self.encoder(mixture.unsqueeze(1)))
        s = self.separator
        score = s.mask(s.repeats(s.bottleneck(s.norm(w))))
        m, n, k = w.size()
        masks = torch.sigmoid(score.view(m, self.speakers, n, k))
        sources = w.unsqueeze(1) * masks
        return self.decoder(sources.reshape(m * self.speakers, n, k)).view(m, self.speakers, -1)


# -- points: shared multilayer perceptrons as convolutions of width 1 ---------------------------------------


class AlignNet(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(k, 8, 1), nn.Conv1d(8, 12, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(8), nn.BatchNorm1d(12)
        self.fc = nn.Linear(12, k * k)
        self.k = k

    def forward(self, x):
        batchsize = x.size()[0]
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 12)
        iden = torch.eye(self.k, dtype=x.dtype, device=x.device).view(1, self.k * self.k).repeat(batchsize, 1)
        return (self.fc(x) + iden).view(-1, self.k, self.k)


@stranger((1, ("stn.relu", "stn.relu#2", "relu", "relu#2")), inputs=((3, 40),))
class Points(nn.Module):
    def __init__(self):
        super().__init__()
        self.stn = AlignNet(3)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 10, 1), nn.Conv1d(10, 16, 1)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm1d(8), nn.BatchNorm1d(10), nn.BatchNorm1d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.bmm(x.transpose(2, 1), self.stn(x)).transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return F.log_softmax(self.fc(torch.max(x, 2)[0]), dim=-1)


# -- dense connections with a list, named layers, and transitions -------------------------------------------


class DenseLayer(nn.Module):
    def __init__(self, i, growth):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, 2 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, *features):
        x = torch.cat(features, 1)
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


@stranger((2, ("blocks.0.cat",)), (4, ("blocks.1.cat",)))
class DenselyConnected(nn.Module):
    def __init__(self, growth=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        channels = 6
        for n in (2, 3):
            self.blocks.append(DenseBlock(channels, growth, n))
            channels += n * growth
            self.transitions.append(
                nn.Sequential(
                    nn.BatchNorm2d(channels), nn.ReLU(True), nn.Conv2d(channels, channels // 2, 1), nn.AvgPool2d(2)
                )
            )
            channels //= 2
        self.fc = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            x = transition(block(x))
        return self.fc(x.mean((-2, -1)))


class DenseBlock(nn.Module):
    def __init__(self, channels, growth, n):
        super().__init__()
        self.layers = nn.ModuleDict({f"denselayer{i + 1}": DenseLayer(channels + i * growth, growth) for i in range(n)})

    def forward(self, x):
        outputs = [x]
        for layer in self.layers.values():
            outputs.append(layer(*outputs))
        return torch.cat(outputs, 1)
