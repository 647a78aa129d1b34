"""Options that several commands share, as decorators. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from se_inject.cli.confined import OutputPath
from se_inject.tables import FORMATS

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
POSITIONS = ("standard", "pre", "post", "identity", "conv3x3")


class Ratios(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """``2,4,8``: reduction ratios."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Read the numbers in the text."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"`{value}` is not a list of numbers; write it as 4,8,16", param, ctx)


def together(*decorators: Decorator) -> Decorator:
    """Make one decorator of several; the first is the first in the help."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


reading = together(
    click.option(
        "--trust",
        multiple=True,
        metavar="PACKAGE",
        help="Allow this package's classes in a pickled MODEL: its code is imported and run.",
    ),
    click.option(
        "--input",
        "inputs",
        multiple=True,
        metavar="SHAPE",
        help="Shape of an input, 3x224x224; once for each input. Inferred if left out.",
    ),
)
"""How MODEL is read, and what goes into it."""

network = together(
    click.argument("model"),
    click.option(
        "--weights",
        type=click.Path(path_type=Path),
        help="State dict to load into MODEL: .pt, .pth or .safetensors.",
    ),
    click.option("--arch", metavar="NAME", help="The network's name, if MODEL is a state dict: torchvision:resnet50."),
    click.option(
        "--entry", metavar="NAME", help="Entry of a training checkpoint to take, of --weights if given: ema, model."
    ),
    reading,
)
"""Which network, and what goes into it."""

attended = click.option("--attended", is_flag=True, help="Also sites that have attention of their own already.")

_built = together(
    click.option(
        "--position",
        type=click.Choice(POSITIONS),
        default="standard",
        show_default=True,
        help="Where the block sits relative to a residual unit.",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="An option of the block; `se-inject blocks NAME` tells which.",
    ),
    click.option("--divisor", type=int, help="Round the bottleneck to a multiple of this; timm uses 8."),
    click.option("--bias/--no-bias", default=None, help="Biases in the two layers of the block.  [default: bias]"),
    click.option(
        "--init",
        type=click.Choice(["identity", "paper"]),
        help="identity: the network's output stays the same bit for bit until it is trained. paper: a plain sigmoid "
        "gate.  [default: identity]",
    ),
)

block = together(
    click.option("--block", default="se", show_default=True, help="Block to put in; see `se-inject blocks`."), _built
)
"""Which block, where in a unit, and how it is built; but for the reduction ratio."""

blocks = together(
    click.option(
        "--block",
        "blocks",
        multiple=True,
        metavar="[STAGES=]NAME[,KEY=VALUE]",
        help="Block to put in, see `se-inject blocks`; repeat it for others in other stages, or for a chain in one: "
        "3=se 4=se 4=cbam,kernel=5.  [default: se]",
    ),
    _built,
)
"""The same for several blocks."""

targets = together(
    click.option("--device", help="Device of the exported network: cpu or cuda."),
    click.option(
        "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Number format of the exported network."
    ),
    click.option(
        "--memory-format", type=click.Choice(["channels_last"]), help="Memory format of the exported network."
    ),
    click.option("--opset", type=int, help="ONNX opset, 11 or higher."),
    click.option(
        "--dynamic-size", is_flag=True, help="Leave height and width open too, and check the file at two more sizes."
    ),
)
"""What a network is converted to when it is written."""

tables = together(
    click.option(
        "--format",
        "style",
        type=click.Choice(FORMATS),
        default="text",
        show_default=True,
        help="Format of the tables.",
    ),
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
)
"""How results are printed."""

stored = together(
    click.option(
        "--plan",
        "plan_file",
        type=click.Path(path_type=Path),
        help="Put in what this file says, which -o plan.json wrote, instead of all these choices.",
    ),
    click.option(
        "--adapter",
        type=click.Path(path_type=Path),
        help="Put in the trained blocks of this file, which -o se.safetensors wrote.",
    ),
)
"""What was chosen before and is in a file."""


def outputs(help: str, required: bool = True) -> Decorator:
    """``-o FILE``, which may be repeated."""
    return click.option("-o", "--output", "outputs", multiple=True, required=required, type=OutputPath(), help=help)


for_inference = click.option(
    "--for-inference",
    is_flag=True,
    help="Write a copy for inference alone: norms and fixed gates folded, blocks fused. With --latency it is measured too.",
)
force = click.option("--force", is_flag=True, help="Replace files that exist.")
