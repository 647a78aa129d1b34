"""Networks that divide dimensions and put them together: batch with channels, channels with groups, frames with the batch.

Each unit adds ``branch(x)`` to ``x``, so that a test can compute the branch by itself. ``UNITS`` is the table.
"""

import torch
import torch.nn.functional as F
from torch import nn

C = 16
UNITS = {}


def made(unit):
    UNITS[unit.__name__] = unit
    return unit


def network(unit):
    stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())
    return nn.Sequential(stem, nn.Sequential(unit(), unit()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 4))


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

    def forward(self, x):
        return F.relu(x + self.branch(x))


class Mixture(nn.Module):
    """A convolution whose kernel is each example's: the batch stands before the channels in dimension 1, and behind it afterwards."""

    def __init__(self, experts=3):
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(experts, C * C * 9) / 12)

    def forward(self, x, weights):
        n, c, h, w = x.shape
        kernels = torch.matmul(weights, self.kernels).view(n * C, C, 3, 3)
        y = F.conv2d(x.reshape(1, n * c, h, w), kernels, padding=1, groups=n)
        return y.permute([1, 0, 2, 3]).view(n, C, y.shape[-2], y.shape[-1])


@made
class KernelsOfExamples(Unit):
    def __init__(self):
        super().__init__()
        self.route, self.one, self.two, self.mid = nn.Linear(C, 3), Mixture(), Mixture(), nn.BatchNorm2d(C)

    def branch(self, x):
        weights = torch.sigmoid(self.route(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return self.norm(self.two(F.relu(self.mid(self.one(x, weights))), weights))


@made
class KernelsWithoutANorm(KernelsOfExamples):
    def branch(self, x):
        weights = torch.sigmoid(self.route(x.mean((2, 3))))
        return self.two(F.relu(self.mid(self.one(x, weights))), weights)


@made
class ChannelsBeforeTheBatch(Unit):
    """Dimension 1 holds the channels, and of each the examples."""

    def branch(self, x):
        n, c, h, w = x.shape
        kernels = self.conv.weight[:, :1].repeat_interleave(n, 0)
        y = F.conv2d(x.transpose(0, 1).reshape(1, c * n, h, w), kernels, padding=1, groups=c * n)
        return self.norm(y.view(c, n, h, w).transpose(0, 1))


@made
class BatchAsDepth(Unit):
    def branch(self, x):
        y = self.norm(self.conv(x)).transpose(0, 1).unsqueeze(0)
        return y.squeeze(0).transpose(0, 1)


@made
class GroupsInTheBatch(Unit):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C // 4, C // 4, 3, padding=1)

    def branch(self, x):
        n, c, h, w = x.shape
        return self.norm(self.conv(x.reshape(n * 4, c // 4, h, w)).reshape(n, c, h, w))


@made
class Shuffled(Unit):
    def branch(self, x):
        n, c, h, w = x.shape
        return self.norm(self.conv(x)).view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)


@made
class ShuffledBySteps(Unit):
    def __init__(self):
        super().__init__()
        self.open, self.close = nn.Unflatten(1, (2, C // 2)), nn.Flatten(1, 2)

    def branch(self, x):
        return self.close(torch.movedim(self.open(self.norm(self.conv(x))), 1, 2))


@made
class SpaceFromDepth(Unit):
    """Channels become positions: what is left of them in dimension 1 is the slow part."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, 4 * C, 2, stride=2), nn.BatchNorm2d(4 * C)

    def branch(self, x):
        n, _, h, w = x.shape
        y = self.norm(self.conv(x)).reshape(n, C, 2, 2, h // 2, w // 2)
        return y.permute(0, 1, 4, 2, 5, 3).reshape(n, C, h, w)


@made
class DepthFromSpace(Unit):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C // 4, 1)

    def branch(self, x):
        y = F.interpolate(self.conv(x), scale_factor=2.0)
        h, w = y.shape[2:]
        y = y.unflatten(3, (w // 2, 2)).unflatten(2, (h // 2, 2)).permute(0, 1, 3, 5, 2, 4)
        return self.norm(y.flatten(1, 3))


@made
class Frames(Unit):
    """The last dimension is time; convolutions see one frame each."""

    def branch(self, x):
        frames = x.permute(0, 3, 1, 2)
        y = self.norm2(self.conv2(frames.flatten(0, 1)))
        return y.unflatten(0, (x.shape[0], -1)).permute(0, 2, 3, 1)

    def __init__(self):
        super().__init__()
        self.conv2, self.norm2 = nn.Conv1d(C, C, 3, padding=1), nn.BatchNorm1d(C)


@made
class OneRowAtATime(Unit):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, (1, 3), padding=(0, 1)), nn.BatchNorm2d(C)

    def branch(self, x):
        n, c, h, w = x.shape
        rows = torch.reshape(x, (n, c, h * w))[:, :, None]
        return torch.squeeze(self.norm(self.conv(rows)), 2).view_as(x)


@made
class SumOfGroups(Unit):
    """Two radices are weighed and summed over, as split attention does; the weights are constants."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, 2 * C, 3, padding=1, groups=2), nn.BatchNorm2d(2 * C)
        self.weights = nn.Parameter(torch.rand(2, 1, 1, 1))

    def branch(self, x):
        n, c, h, w = x.shape
        return (self.norm(self.conv(x)).view(n, 2, c, h, w) * self.weights).sum(dim=1)


@made
class ByEinsum(Unit):
    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(C, C) / 4)

    def branch(self, x):
        return torch.einsum("nchw,cd->ndhw", self.norm(self.conv(x)), self.mix)


@made
class StackedByHand(Unit):
    def branch(self, x):
        y = self.norm(self.conv(x))
        return torch.stack([y, F.relu(y)], 1)[:, 0]


# -- units that no block fits, or not where they are joined ------------------------------------------------------------


class InTheFold(nn.Module):
    """The sum is of values whose batch is in dimension 1, with the channels."""

    def __init__(self):
        super().__init__()
        self.route = nn.Linear(C, C * C * 9)

    def forward(self, x):
        n, c, h, w = x.shape
        kernels = self.route(x.mean((2, 3))).reshape(n * c, c, 3, 3)
        folded = x.reshape(1, n * c, h, w)
        y = folded + F.relu(F.conv2d(folded, kernels, padding=1, groups=n))
        return y.view(n, c, h, w)


class FramesInDimensionOne(nn.Module):
    """A sum of (N, T, C, H): dimension 1 is frames."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(C, C, 3, padding=1), nn.BatchNorm1d(C)

    def forward(self, x):
        frames = x.permute(0, 3, 1, 2)
        y = self.norm(self.conv(frames.flatten(0, 1))).unflatten(0, (x.shape[0], -1))
        return (frames + y).permute(0, 2, 3, 1)


class GroupsInDimensionOne(nn.Module):
    """A sum of (N, groups, channels, H, W)."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

    def forward(self, x):
        return (x.unflatten(1, (4, -1)) + self.norm(self.conv(x)).unflatten(1, (4, -1))).flatten(1, 2)


class WithoutABatch(nn.Module):
    """Images one by one, of (C, H, W)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x):
        first = x[0]
        return torch.stack([first + F.relu(self.conv(first))])


class Uneven(nn.Module):
    """A reshape that cuts channels unevenly."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, 10, 3, padding=1)

    def forward(self, x):
        n, c, h, w = x.shape
        y = F.relu(self.conv(F.avg_pool2d(x, (1, 2)))).reshape(n, c, h // 2, 10)
        return x + F.interpolate(y, size=(h, w))
