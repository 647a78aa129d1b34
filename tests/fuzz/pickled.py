"""Pickles of whole networks that mean something else than they did: names, text, numbers, sizes and states are replaced.

Bytes that are flipped at random are refused at the door, mostly. Here the pickle's opcodes are read, as pieces that put a
value on the stack, and values are replaced by others; so the file is sound, and what it says is not.
"""

import functools
import pickle
import pickletools
import random
import struct
from typing import NamedTuple

import timm
import torch
import torchvision
from torch import nn

import se_inject as si
from tests.common import randomise
from tests.files.hostile import records, saved, small, zipped

SIDE = 32
"""Of the images that the networks here take."""


def _layers():
    """One of each layer of torch.nn that images pass through."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8), nn.MaxPool2d(3, 2, 1), nn.PixelUnshuffle(2),
        nn.ChannelShuffle(4), nn.GroupNorm(4, 32), nn.LeakyReLU(0.1), nn.PixelShuffle(2), nn.LocalResponseNorm(3),
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect"),
        nn.AvgPool2d(2), nn.ELU(), nn.ConvTranspose2d(8, 8, 2, 2), nn.InstanceNorm2d(8, affine=True), nn.Hardtanh(),
        nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.LPPool2d(2, 2), nn.Softplus(), nn.Dropout2d(0.1),
        nn.AdaptiveMaxPool2d(8), nn.UpsamplingNearest2d(16), nn.Threshold(0.1, 0.0), nn.GLU(1), nn.CELU(), nn.Softmax2d(),
        nn.Unfold(2, stride=2), nn.Fold(16, 2, stride=2), nn.RReLU(), nn.Hardshrink(), nn.AdaptiveAvgPool2d((4, 4)),
        nn.Flatten(), nn.Linear(64, 8), nn.Unflatten(1, (2, 4)), nn.LSTM(4, 3, batch_first=True),
    )  # fmt: skip


def _encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Flatten(2), nn.Linear(16, 16), nn.TransformerEncoder(layer, 2))


def _injected():
    net = _narrow(torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]))
    return si.inject(net, torch.rand(2, 3, SIDE, SIDE), stages=[3, 4], reduction=4, init="paper")


def _narrow(net, by=8):
    """Make a network with fewer channels: its file is read in no time."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            ins = module.in_channels if module.in_channels <= 3 else module.in_channels // by
            bias = module.bias is not None
            module.__init__(
                ins, module.out_channels // by, module.kernel_size, module.stride, module.padding, bias=bias
            )
        elif isinstance(module, nn.BatchNorm2d):
            module.__init__(module.num_features // by)
        elif isinstance(module, nn.Linear):
            module.__init__(module.in_features // by, 10)
    return net


def _detector():
    detection = torchvision.models.detection
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
    body.out_channels = 8
    anchors = detection.rpn.AnchorGenerator(((8, 16),), ((0.5, 1.0),))
    return detection.FasterRCNN(
        body, None, min_size=SIDE, max_size=SIDE, rpn_anchor_generator=anchors, rpn_pre_nms_top_n_test=20,
        rpn_post_nms_top_n_test=5, box_head=detection.faster_rcnn.TwoMLPHead(8 * 49, 8),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(8, 3),
    )  # fmt: skip


def _resnet():
    models = torchvision.models
    return _narrow(models.resnet.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1]))


def _densenet():
    return torchvision.models.DenseNet(4, (2, 2, 1, 1), 8, bn_size=2, num_classes=5)


def _convnext():
    setting = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([setting(8, 16, 1), setting(16, 32, 1), setting(32, None, 1)], num_classes=5)


def _efficientnet():
    setting = torchvision.models.efficientnet.MBConvConfig
    settings = [setting(1, 3, 1, 8, 8, 1), setting(2, 3, 2, 8, 16, 1), setting(2, 5, 2, 16, 16, 2)]
    return torchvision.models.EfficientNet(settings, dropout=0.2, num_classes=5, last_channel=32)


BASES = {
    "layers": _layers,
    "encoder": _encoder,
    "injected": _injected,
    "fused": lambda: si.fuse_(_injected()),
    "resnet": _resnet,
    "densenet": _densenet,
    "convnext": _convnext,
    "efficientnet": _efficientnet,
    "shufflenet": lambda: torchvision.models.ShuffleNetV2([1, 2, 1], [8, 16, 16, 32, 32], num_classes=5),
    "mobilenet": lambda: torchvision.models.MobileNetV2(
        num_classes=5, inverted_residual_setting=[[1, 8, 1, 1], [2, 8, 2, 2]], width_mult=0.5
    ),
    "detector": _detector,
    "squeezenet": lambda: _narrow(torchvision.models.SqueezeNet("1_1")),
    **{
        f"timm {name}": lambda name=name: timm.create_model(f"test_{name}", num_classes=5)
        for name in ("byobnet", "convnext", "efficientnet_ln", "mambaout", "nfnet", "resnet", "vit")
    },
    "state dict": lambda: small().state_dict(),
    "checkpoint": lambda: {
        "epoch": 3, "model": small(), "ema": _resnet(), "args": {"lr": 0.1, "names": ["a", "b"]},
        "optimizer": torch.optim.SGD(small().parameters(), 0.1, momentum=0.9).state_dict(),
    },
}  # fmt: skip


class Piece(NamedTuple):
    """Opcodes from one place to another that put one value on the stack, the last of them, and what takes the value."""

    start: int
    end: int
    made_by: str
    role: str


class Program:
    """A pickle as a list of opcodes, each with its bytes, and the pieces that make values."""

    def __init__(self, data):
        found = list(pickletools.genops(data))
        ends = [position for *_, position in found[1:]] + [len(data)]
        self.names = [code.name for code, *_ in found]
        self.args = [arg for _, arg, _ in found]
        self.codes = [data[start:end] for (*_, start), end in zip(found, ends, strict=True)]
        self.pieces = list(self._pieces([code for code, *_ in found]))
        self.settings = [piece for piece in self.pieces if piece.role == "value" and not piece.made_by.startswith(MADE)]
        self.texts = sorted({arg for name, arg in zip(self.names, self.args, strict=True) if name == "BINUNICODE"})
        self.globals = sorted({arg for name, arg in zip(self.names, self.args, strict=True) if name == "GLOBAL"})

    def _pieces(self, codes):
        """Follow the stack without making anything."""
        stack, marks = [], []
        for place, (name, code) in enumerate(zip(self.names, codes, strict=True)):
            if name == "MARK":
                marks.append((len(stack), place))
                continue
            if name in ("TUPLE", "LIST", "DICT", "FROZENSET", "APPENDS", "SETITEMS", "ADDITEMS"):
                height, start = marks.pop()
            elif name in (
                "SETITEM",
                "REDUCE",
                "NEWOBJ",
                "TUPLE2",
                "BUILD",
                "APPEND",
                "TUPLE1",
                "TUPLE3",
                "BINPERSID",
                "STOP",
            ):
                count = {"TUPLE1": 1, "TUPLE3": 3, "BINPERSID": 1, "SETITEM": 2, "APPEND": 1, "BUILD": 1, "STOP": 1}
                height = len(stack) - count.get(name, 2)
                start = stack[height][0]
            else:
                if code.stack_after and not code.stack_before:
                    stack.append((place, name))
                continue
            values = stack[height:]
            ends = [each for each, _ in values[1:]] + [place]
            for number, ((each, made_by), end) in enumerate(zip(values, ends, strict=True)):
                role = ROLES.get(name, "item")
                yield Piece(each, end, made_by, ("key", "value")[number % 2] if role == "pair" else role)
            del stack[height:]
            if name not in ("APPENDS", "SETITEMS", "ADDITEMS", "SETITEM", "APPEND", "BUILD"):
                stack.append((start, name))

    def kept(self, start, end):
        """The memo's entries that are made within a piece and read behind it."""
        puts = {arg for name, arg in zip(self.names[start:end], self.args[start:end], strict=True) if name in PUTS}
        gets = {arg for name, arg in zip(self.names[end:], self.args[end:], strict=True) if name in GETS}
        return puts & gets

    def bytes_of(self, piece):
        """The opcodes of a piece."""
        return b"".join(self.codes[piece.start : piece.end])

    def altered(self, rng, changes):
        """The pickle with so many changes."""
        made = []
        for _ in range(100):
            start, end, new = _change(self, rng)
            if start < end and any(start < other_end and other < end for other, other_end, _ in made):
                continue
            made.append((start, end, new))
            if len(made) == changes:
                break
        parts, at = [], 0
        for start, end, new in sorted(made, key=lambda change: change[:2]):
            if start >= at:
                parts += [*self.codes[at:start], new]
                at = end
        return b"".join([*parts, *self.codes[at:]])


MADE = ("REDUCE", "NEWOBJ", "BINPERSID", "GLOBAL", "EMPTY_DICT")
ROLES = {
    "SETITEMS": "pair", "SETITEM": "pair", "BUILD": "state", "REDUCE": "called", "NEWOBJ": "called", "BINPERSID": "id",
    "STOP": "all",
}  # fmt: skip


PUTS = ("BINPUT", "LONG_BINPUT", "PUT")
GETS = ("BINGET", "LONG_BINGET", "GET")
NUMBERS = (
    0,
    1,
    2,
    3,
    5,
    7,
    8,
    64,
    255,
    1000,
    65_536,
    2**31 - 1,
    2**31,
    2**53,
    2**63,
    10**30,
    -1,
    -2,
    -(2**31),
    -(2**63),
)
REALS = (0.0, -1.0, 0.5, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "", "a.b", "forward", "__class__", "__dict__", "training", "weight", "zeros", "same", "reflect", "bilinear", "none",
    "a" * 5000, "\x1b[31m", "'; import os", "é\u202e", "_parameters", "_modules", "_forward_hooks", "0", "-1", "cuda:0", "meta",
)  # fmt: skip
GLOBALS = (
    "torch.nn.modules.conv Conv2d", "torch.nn.modules.container Sequential", "torch.nn.modules.linear Linear",
    "torch.nn.modules.batchnorm BatchNorm2d", "torch.nn.modules.batchnorm BatchNorm1d", "torch.nn.modules.activation ReLU",
    "torch.nn.modules.activation MultiheadAttention", "torch.nn.modules.container ModuleList", "torch.nn.modules.linear Identity",
    "torch.nn.modules.rnn LSTM", "torch.nn.modules.pooling MaxPool2d", "torch.nn.modules.normalization GroupNorm",
    "torch.nn.parallel.data_parallel DataParallel", "torchvision.models.resnet Bottleneck", "torchvision.models.resnet ResNet",
    "torchvision.ops.misc FrozenBatchNorm2d", "timm.models.resnet Bottleneck", "timm.layers.drop DropPath",
    "torchvision.models.detection.rpn AnchorGenerator", "torchvision.ops.poolers MultiScaleRoIAlign",
    "torch.nn.functional relu", "torch._C._nn gelu", "torch Size", "torch float64", "torch complex64", "torch qint8",
    "torch device", "builtins set", "builtins complex", "builtins range", "builtins slice", "collections OrderedDict",
    "collections Counter", "functools partial", "builtins getattr", "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2", "torch HalfStorage", "torch IntStorage", "torch BoolStorage", "torch ComplexDoubleStorage",
    "se_inject.generated edited", "se_inject.generated frozen", "se_inject.generated fused", "se_inject.generated FixedBatchNorm",
    "os system", "builtins eval", "posix system", "subprocess Popen", "torch.hub load", "torch load", "torch.jit load",
    "torchvision.io read_file", "no.such module", "numpy.core.multiarray _reconstruct", "__main__ Net", "torch.nn Module",
)  # fmt: skip


def plain(value):
    """The opcodes that put plain data on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def _change(program, rng):
    """One change: (start, end, the opcodes that come instead)."""
    settings = program.settings if rng.random() < 0.6 else program.pieces
    piece = rng.choice(settings)
    for _ in range(20):  # what is read again from the memo leads to a damaged file, as a rule
        if piece.role != "all" and not program.kept(piece.start, piece.end):
            break
        piece = rng.choice(settings)
    change = rng.choice((_other_kind, _like, _like, _like, _copied, _copied, _left_out, _twice, _state, _memo))
    return change(program, piece, rng)


def _like(program, piece, rng):
    """A value of the same kind: a number, a text, a name of code."""
    if piece.made_by == "GLOBAL":
        module, _, name = rng.choice((*GLOBALS, *program.globals)).partition(" ")
        new = f"c{module}\n{name}\n".encode()
    elif piece.made_by.startswith(("BININT", "LONG", "NEWTRUE", "NEWFALSE")):
        new = plain(rng.choice((*NUMBERS, True, False)))
    elif piece.made_by == "BINFLOAT":
        new = plain(rng.choice(REALS))
    elif piece.made_by == "BINUNICODE":
        new = plain(rng.choice((*TEXTS, *program.texts)))
    elif piece.made_by.startswith(("TUPLE", "EMPTY")):
        new = plain(tuple(rng.choice(NUMBERS) for _ in range(rng.randrange(5))))
    else:
        return _copied(program, piece, rng)
    return piece.start, piece.end, new


def _other_kind(program, piece, rng):
    other = rng.choice(
        (None, True, rng.choice(NUMBERS), rng.choice(REALS), rng.choice(TEXTS), (), [], {}, (1, 2), {"a": 1}, [None])
    )
    return piece.start, piece.end, plain(other)


def _copied(program, piece, rng):
    """Another value of the file in place of this one, of the same role or of any."""
    others = [each for each in program.pieces if each.role == piece.role and each.end <= piece.start]
    other = rng.choice(others or program.pieces)
    if other.end > piece.start:
        return _other_kind(program, piece, rng)
    return piece.start, piece.end, program.bytes_of(other)


def _left_out(program, piece, rng):
    """One item, or one key with its value, less."""
    place = program.pieces.index(piece)
    if piece.role == "key":
        return piece.start, program.pieces[place + 1].end, b""
    if piece.role == "value":
        return program.pieces[place - 1].start, piece.end, b""
    if piece.role == "state":
        return piece.start, piece.end + 1, b""
    return piece.start, piece.end, b"" if piece.role == "item" else plain(None)


def _twice(program, piece, rng):
    """One item, or one key with another value, more."""
    if piece.role == "item":
        return piece.start, piece.start, program.bytes_of(piece) * rng.choice((1, 1, 3))
    if piece.role == "key":
        other = rng.choice([each for each in program.pieces if each.role == "value"])
        if other.end <= piece.start:
            return piece.start, piece.start, plain(rng.choice((*TEXTS, *program.texts))) + program.bytes_of(other)
    return _other_kind(program, piece, rng)


def _state(program, piece, rng):
    """Another state for a module: of another one, or made up."""
    states = [each for each in program.pieces if each.role == "state"]
    if not states:
        return _other_kind(program, piece, rng)
    piece = rng.choice(states)
    new = rng.choice(
        ({}, {"training": True}, {"_modules": {}, "_parameters": {}, "_buffers": {}}, (), None, [1], ({}, {"a": 1}))
    )
    if rng.random() < 0.6 and (before := [each for each in states if each.end < piece.start]):
        return piece.start, piece.end, program.bytes_of(rng.choice(before))
    return piece.start, piece.end, plain(new)


def _memo(program, piece, rng):
    """What the memo holds elsewhere."""
    places = [place for place, name in enumerate(program.names) if name in GETS]
    puts = [arg for name, arg in zip(program.names, program.args, strict=True) if name in PUTS]
    if not puts:
        return _other_kind(program, piece, rng)
    code = b"j" + struct.pack("<I", rng.choice(puts))
    if places and rng.random() < 0.5:
        place = rng.choice(places)
        return place, place + 1, code
    return piece.start, piece.end, code


@functools.cache
def base(name):
    """A network's file as records, the name of its pickle there, and that as a program."""
    torch.manual_seed(0)
    made = BASES[name]()
    if isinstance(made, nn.Module):
        randomise(made).eval()
    parts = records(saved(made))
    place = next(key for key in parts if key.endswith("data.pkl"))
    return parts, place, Program(parts[place])


def altered(seed):
    """A sound file of torch.save, of which the pickle says something else in a few places; the same for the same seed."""
    rng = random.Random(f"altered {seed}")
    parts, place, program = base(rng.choice(list(BASES)))
    return zipped({**parts, place: program.altered(rng, rng.choice((1, 1, 1, 2, 3)))})
