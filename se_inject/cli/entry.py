"""Define the commands and their options, and turn errors into messages. torch is imported when a command needs it."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import click

from se_inject._version import __version__
from se_inject.cli import gates, options, pictures
from se_inject.cli.confined import OutputPath, reported
from se_inject.cli.running import MainGroup
from se_inject.errors import hints_for_command


@click.group(cls=MainGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="se-inject")
def cli() -> None:
    """Put Squeeze-and-Excitation blocks into a network you already have.

    MODEL is a file that torch.save made of a whole network, or a name: torchvision:resnet50, timm:resnet50,
    package.module:callable, path/to/file.py:callable.

    \b
    se-inject model.pt --stages 3,4 --r 16 -o model-se.onnx
    se-inject torchvision:resnet50 --weights resnet50.pth --dry-run
    se-inject sites timm:convnext_tiny
    se-inject cost torchvision:resnet50 --r 4,8,16
    """


@cli.command(short_help="Put blocks into MODEL (the main command).")
@options.network
@click.option(
    "--stages",
    metavar="LIST",
    help="Stages: numbers (3,4), ranges (2-4), paths (layer3), all-but-last. All if left out.",
)
@click.option("--at", multiple=True, metavar="PATTERN", help="Sites by address: a glob ('layer3.*') or re:EXPRESSION.")
@options.attended
@click.option(
    "--require-all", is_flag=True, help="A module with convolutions that can't be traced is an error, not a note."
)
@click.option(
    "--r",
    "--reduction",
    "reduction",
    type=float,
    help="Reduction ratio: the bottleneck is C // r wide.  [default: 16]",
)
@click.option(
    "--budget",
    multiple=True,
    metavar="FIGURE=MOST",
    help="The most that the blocks may add, params=5%, bytes=3%, macs=20M, latency=2%; may be repeated. Stages and r are "
    "chosen: the most blocks, then the smallest r.",
)
@options.blocks
@click.option("--name", help="Attribute that a block becomes on its owner.  [default: se]")
@options.stored
@options.outputs(
    "File to write: .onnx, .torchscript, .pt2, .pt, .safetensors (the blocks alone) or .json (the plan); may be "
    "repeated. If left out: <model>-se.pt.",
    required=False,
)
@options.force
@options.for_inference
@click.option("--dry-run", is_flag=True, help="Plan and report only.")
@click.option(
    "--report", type=OutputPath(), help="Write all this, with a picture, to one HTML file that opens offline."
)
@click.option("--latency", is_flag=True, help="Measure both networks in turns.")
@options.targets
@click.option("--seed", type=int, help="Seed for random weights, of the blocks and of a network built by name.")
@options.tables
@click.option("-v", "--verbose", is_flag=True, help="Every site, not only every stage.")
def inject(**given: Any) -> None:
    """Put blocks into MODEL, verify the result, and write it."""
    from se_inject.cli import injecting

    injecting.inject(**given)


@cli.command(short_help="Write MODEL to files, trained or not, with blocks or without.")
@options.network
@options.stored
@options.outputs(
    "File to write: .onnx, .torchscript, .pt2, .pt; of the blocks in it .safetensors and .json; may be repeated."
)
@options.force
@options.for_inference
@options.targets
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def export(**given: Any) -> None:
    """Write MODEL to files as it is, in the formats that the suffixes name, each checked in its own runtime.

    \b
    se-inject export trained.pt -o trained.onnx
    se-inject export torchvision:resnet50 --plan plan.json --weights trained.pth -o trained.onnx
    se-inject export torchvision:resnet50 --weights resnet50.pth --adapter se.safetensors -o trained.pt2
    """
    from se_inject.cli import writing

    writing.export(**given)


@cli.command(short_help="Take the blocks out of MODEL again.")
@options.network
@options.outputs("File to write: .onnx, .torchscript, .pt2 or .pt; may be repeated.")
@options.force
@options.targets
def eject(**given: Any) -> None:
    """Take the blocks out of MODEL and write the original, bit for bit."""
    from se_inject.cli import writing

    writing.eject(**given)


@cli.command(short_help="List the stages of MODEL; -v: every site and every refusal.")
@options.network
@options.tables
@click.option("-v", "--verbose", is_flag=True, help="Every site, and every refusal with its reason.")
def sites(**given: Any) -> None:
    """List the stages of MODEL, where blocks can go. Nothing is changed or written."""
    from se_inject.cli import looking

    looking.sites(**given)


@cli.command(short_help="What blocks would add to MODEL, for many ratios and stages at once.")
@options.network
@click.option(
    "--r",
    "--reduction",
    "reductions",
    type=options.Ratios(),
    help="Reduction ratios, 4,8,16.  [default: 2,4,8,16,32 if the block has them]",
)
@click.option(
    "--stages",
    multiple=True,
    metavar="LIST",
    help="Stages as for the main command; repeat it for several choices. each: every stage alone, all, and all but "
    "the last.  [default: each]",
)
@options.attended
@options.block
@click.option(
    "--by",
    type=click.Choice(["module"]),
    help="A table of the network's own modules instead, with the blocks in it (or those that would go in) marked.",
)
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    help="With --by module: rows with at most so many modules around.  [default: 2]",
)
@click.option("--plot", type=OutputPath(), help="Draw the grid: .png, .svg or .pdf. Needs matplotlib.")
@options.force
@options.tables
def cost(**given: Any) -> None:
    """Print what blocks would add to MODEL: one table of stages × reduction ratios for each kind of cost.

    Nothing is computed or changed. MODEL is called once, without numbers, however many ratios and stages there are.
    """
    from se_inject.cli import looking

    looking.cost(**given)


@cli.command(short_help="List the blocks that can be put in.")
@click.argument("name", required=False)
@click.option("--on", "model", metavar="MODEL", help="What each block costs at all sites of this network.")
@options.reading
@options.tables
def blocks(**given: Any) -> None:
    """List the blocks, with their parameters at 256 channels; with a NAME, print that block's card.

    With --on, list what each block (or the one of that NAME) with its defaults adds to a network, and how it starts.
    """
    from se_inject.cli import looking

    looking.blocks(**given)


@cli.command(short_help="Say what FILE is, and everything that it names.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--trust", multiple=True, metavar="PACKAGE", help="Mark this package's names as trusted. Nothing is imported."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def inspect(**given: Any) -> None:
    """Say what FILE is and everything that it names: what is allowed, trusted or refused, and which rule says so.

    Nothing of it is made, called or imported: it is what to look at before --trust. Exit code 1 if something is
    refused, or the file is damaged.
    """
    from se_inject.cli import looking

    looking.inspect(**given)


cli.add_command(gates.compare)
cli.add_command(gates.excitations)
cli.add_command(gates.prune)
cli.add_command(pictures.draw)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 could not be done, 2 asked wrongly, 130 interrupted."""
    warnings.simplefilter("ignore")
    with hints_for_command():
        code = reported(lambda: cli.main(standalone_mode=False))
    sys.exit(code)
