"""Strides where sizes mislead: padding of small maps, and frames that are a dimension in one module and of the batch in the next."""

import torch
from torch import nn

import se_inject as si


def conv(i, o, stride=1):
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 0, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Unit(nn.Module):
    def __init__(self, c, kind=nn.Conv2d):
        super().__init__()
        self.conv = kind(c, c, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)


class Pads(nn.Module):
    def __init__(self, pad):
        super().__init__()
        self.pad = pad

    def forward(self, x):
        return self.pad(x)


def test_padding_changes_no_stride():
    for pad in (nn.ZeroPad2d((2, 3, 2, 3)), nn.ReplicationPad2d(2), lambda x: nn.functional.pad(x, (1, 2, 1, 2))):
        downs = [nn.Sequential(Pads(pad), conv(8, 8, 2), Unit(8)) for _ in range(4)]
        network = nn.Sequential(conv(3, 8), *downs)
        strides = [site.stride[0] for site in si.find_sites(network, torch.rand(2, 3, 20, 20))]
        assert strides == [2, 4, 8, 16]


class Frames(nn.Module):
    """Frames in the batch for the one unit, and as a dimension for the other."""

    def __init__(self):
        super().__init__()
        self.image, self.time = Unit(8), Unit(8, nn.Conv3d)

    def forward(self, x):
        x = self.image(x)
        frames, c, h, w = x.shape
        clip = self.time(x.reshape(frames // 4, 4, c, h, w).permute(0, 2, 1, 3, 4))
        return clip.permute(0, 2, 1, 3, 4).reshape(frames, c, h, w)


def test_frames_of_the_batch_keep_the_strides_of_the_image():
    network = nn.Sequential(conv(3, 8, 2), Frames(), conv(8, 8, 2), Frames())
    strides = [site.stride for site in si.find_sites(network, torch.rand(8, 3, 40, 48))]
    assert strides == [(2, 2), (1, 2, 2), (4, 4), (1, 4, 4)]
