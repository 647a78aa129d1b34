"""Files that hold the network: every format, what is said about them, and what happens when it goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import logging
import os
import random
import re
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from se_inject import _files
from se_inject.errors import ExportError, OptionError

exporting = importlib.import_module("se_inject.export")
export, export_all = exporting.export, exporting.export_all

ALL = [".onnx", ".ts", ".torchscript", ".pt2", ".pt", ".pth"]


def conv_bn(inputs, outputs, dims=2, **options):
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    return nn.Sequential(conv(inputs, outputs, 3, padding=1, bias=False, **options), norm(outputs))


class Residual(nn.Module):
    """A small network whose every part matters: strides, a projection, a gate."""

    def __init__(self, dims=2):
        super().__init__()
        self.stem = conv_bn(3, 8, dims)
        self.first = conv_bn(8, 12, dims, stride=2)
        self.second = conv_bn(12, 12, dims)
        self.shortcut = conv_bn(8, 12, dims, stride=2)
        self.gate = nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)

    def features(self, x):
        x = F.relu(self.stem(x))
        y = self.second(F.relu(self.first(x)))
        y = y.movedim(1, -1) * self.gate(y.flatten(2).mean(2)).sigmoid().reshape(y.shape[0], 1, -1, 12)[:, :, 0:1, :].reshape(
            [y.shape[0]] + [1] * (y.dim() - 2) + [12]
        )
        return F.relu(y.movedim(-1, 1) + self.shortcut(x))

    def forward(self, x):
        return self.head(self.features(x).flatten(2).mean(2))
