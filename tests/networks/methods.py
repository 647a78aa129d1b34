"""Networks whose forwards call methods that users call too."""

import dataclasses

import torch
from torch import nn


class Unit(nn.Module):
    """The parts of the networks here."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16)
        self.short = nn.Conv2d(16, 16, 1, stride=2)
        self.fc = nn.Linear(16, 5)

    def unit(self, x):
        return torch.relu(x + self.bn1(self.conv1(x)))


class Nested(Unit):
    """A method that calls another; the head has a default, and does otherwise in training."""

    def forward_features(self, x):
        x = self.unit(torch.relu(self.stem(x)))
        return torch.relu(self.short(x) + self.bn2(self.conv2(x)))

    def forward_head(self, x, pre_logits: bool = False):
        x = nn.functional.dropout(x.mean((2, 3)), 0.3, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def by_hand(self, x):
        return self.forward_head(self.forward_features(x))


class Keywords(Unit):
    """Keywords, defaults, ``*args``, ``**kwargs``, and several results within one another."""

    def encode(self, x, *, scale=1.0, extra=None):
        a = torch.relu(self.stem(x)) * scale
        b = self.unit(a)
        return a, {"deep": [torch.relu(self.short(b) + self.bn2(self.conv2(b)))], "b": b}

    def join(self, *values, **weights):
        return self.fc(sum(value.mean((2, 3)) for value in values) * weights["weight"])

    def forward(self, x):
        a, more = self.encode(x, scale=2.0)
        return self.join(a, *more["deep"], more["b"], weight=x.mean())

    def by_hand(self, x):
        a, more = self.encode(x, scale=2.0)
        return self.join(a, more["deep"][0], more["b"], weight=x.mean())


class Returned(Unit):
    """What the method returns is what the network returns."""

    def encode(self, x):
        return self.unit(torch.relu(self.stem(x)))

    def forward(self, x):
        return self.encode(x)

    def by_hand(self, x):
        return self.encode(x)


@dataclasses.dataclass
class Maps:
    last: torch.Tensor
    first: torch.Tensor


class Own(Unit):
    """Methods that hand a class of the author's on."""

    def encode(self, x):
        first = torch.relu(self.stem(x))
        return Maps(self.unit(first), first)

    def decode(self, maps):
        x = torch.relu(self.short(maps.last) + self.bn2(self.conv2(maps.last)))
        return x * maps.first.mean()

    def forward(self, x):
        return self.fc(self.decode(self.encode(x)).mean((2, 3)))

    def by_hand(self, x):
        return self.fc(self.decode(self.encode(x)).mean((2, 3)))


class Inherits(Returned):
    """An override that calls the method it overrides, and a branch for the mode and for a size."""

    def encode(self, x, twice=True):
        x = super().encode(x)
        if self.training:
            x = nn.functional.dropout(x, 0.5)
        return x * 2 if twice and x.shape[2] > 8 else x

    def forward(self, x):
        return self.fc(self.encode(x, True).mean((2, 3)))

    def by_hand(self, x):
        return self.fc(self.encode(x).mean((2, 3)))


class Twice(Unit):
    def encode(self, x):
        return self.unit(torch.relu(self.stem(x)))

    def forward(self, x):
        return self.fc((self.encode(x) + self.encode(x * 2)).mean((2, 3)))


class OneValueTwice(Unit):
    def encode(self, x, skip):
        return torch.relu(skip + self.bn1(self.conv1(x)))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.fc(self.encode(x, x).mean((2, 3)))


class InTrainingAlone(Unit):
    def encode(self, x):
        return torch.relu(self.short(x) + self.bn2(self.conv2(x)))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.short(x) + self.bn2(self.conv2(x.abs()))) if self.training else self.encode(x)
        return self.fc(x.mean((2, 3)))


class Backbone(Unit):
    """What wrappers call by a method."""

    def forward_features(self, x):
        return self.unit(torch.relu(self.stem(x)))

    def forward(self, x):
        return self.fc(self.forward_features(x).mean((2, 3)))


class Wrapper(nn.Module):
    """Calls a method of its child, and never the child."""

    def __init__(self):
        super().__init__()
        self.net, self.fc = Backbone(), nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.net.forward_features(x).mean((2, 3)))


class WithNeck(Wrapper):
    """Has a unit of its own behind the child's."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.net.forward_features(x)
        x = torch.relu(x + self.norm(self.conv(x)))
        x = nn.functional.dropout(x, 0.2, self.training)
        return self.fc(x.mean((2, 3)))


class BothDoors(Wrapper):
    """Calls the child by its forward and by its method."""

    def forward(self, x):
        return self.fc(self.net.forward_features(x).mean((2, 3))), self.net(x * 2)


class WithoutForward(nn.Module):
    """Calls methods of a child that has no forward."""

    def __init__(self):
        super().__init__()
        self.coder, self.fc = Coder(), nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.coder.encode(x).mean((2, 3)))


class Coder(Unit):
    def encode(self, x):
        if self.training:
            x = nn.functional.dropout(x, 0.1)
        return self.unit(torch.relu(self.stem(x)))

    def decode(self, x):
        return torch.relu(self.short(x) + self.bn2(self.conv2(x)))


class TwoMethods(WithoutForward):
    """Calls two methods of one child."""

    def forward(self, x):
        return self.fc(self.coder.decode(self.coder.encode(x)).mean((2, 3)))


class Options(Unit):
    """Methods with arguments that ``forward`` leaves at their defaults, and users don't."""

    def forward_features(self, x, mask=None, return_all=False):
        first = torch.relu(self.stem(x))
        last = self.unit(first)
        if mask is not None:
            last = last * mask
        return (first, last) if return_all else last

    def forward(self, x):
        return self.fc(self.forward_features(x).mean((2, 3)))


class WithOptions(nn.Module):
    """Calls the method as a user does."""

    def __init__(self):
        super().__init__()
        self.net = Options()

    def forward(self, x):
        return self.net.forward_features(x, x[:, :1], return_all=True)[1]


class TwoMethodsOfANetwork(nn.Module):
    """Calls two methods of one child."""

    class Net(Unit):
        def encode(self, x):
            return self.unit(torch.relu(self.stem(x)))

        def deep(self, x):
            return torch.relu(self.short(x) + self.bn2(self.conv2(x)))

        def forward(self, x):
            return self.fc(self.deep(self.encode(x)).mean((2, 3)))

    def __init__(self):
        super().__init__()
        self.net = self.Net()

    def forward(self, x):
        return self.net.deep(self.net.encode(x))
