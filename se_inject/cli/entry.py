"""The command line: commands, their options, and what becomes of errors. torch is imported when a command needs it."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import click

from se_inject._version import __version__
from se_inject.cli import gates, options, pictures
from se_inject.cli.running import OutputPath, WorkerCommand, reported


class _MainCommandGroup(click.Group):
    """`se-inject MODEL …` is `se-inject inject MODEL …`; its help stands on the first page."""

    command_class = WorkerCommand

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Every command is run in a worker."""
        if not isinstance(cmd, WorkerCommand):
            raise TypeError(f"`{cmd.name}` is not a WorkerCommand: write @click.command(cls=WorkerCommand)")
        super().add_command(cmd, name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = ["inject", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("se-inject", "MODEL [OPTIONS]")
        others = ("sites MODEL [OPTIONS]", "cost MODEL [OPTIONS]", "eject MODEL -o FILE", "blocks [NAME] [OPTIONS]")
        for rest in others:
            formatter.write_usage("se-inject", rest, prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.commands["inject"].format_options(ctx, formatter)


@click.group(cls=_MainCommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
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
@options.blocks
@click.option("--name", help="Attribute that a block becomes on its owner.  [default: se]")
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    help="Put in what this file says, which -o plan.json wrote, instead of all these choices.",
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="Put in the trained blocks of this file, which -o se.safetensors wrote.",
)
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    type=OutputPath(),
    help="File to write: .onnx, .torchscript, .pt2, .pt, .safetensors (the blocks alone) or .json (the plan); may be "
    "repeated. If left out: <model>-se.pt.",
)
@options.force
@click.option("--dry-run", is_flag=True, help="Plan and report only.")
@click.option("--latency", is_flag=True, help="Measure both networks in turns.")
@options.targets
@click.option("--seed", type=int, help="Seed for random weights, of the blocks and of a network built by name.")
@options.tables
@click.option("-v", "--verbose", is_flag=True, help="Every site, not only every stage.")
def inject(**given: Any) -> None:
    """Put blocks into MODEL, verify the result, and write it."""
    from se_inject.cli import commands

    commands.inject(**given)


@cli.command(short_help="Take the blocks out of MODEL again.")
@options.network
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    required=True,
    type=OutputPath(),
    help="File to write: .onnx, .torchscript, .pt2 or .pt; may be repeated.",
)
@options.force
@options.targets
def eject(**given: Any) -> None:
    """Take the blocks out of MODEL and write the original, bit for bit."""
    from se_inject.cli import commands

    commands.eject(**given)


@cli.command(short_help="List the stages of MODEL; -v: every site and every refusal.")
@options.network
@options.tables
@click.option("-v", "--verbose", is_flag=True, help="Every site, and every refusal with its reason.")
def sites(**given: Any) -> None:
    """List the stages of MODEL, where blocks can go. Nothing is changed or written."""
    from se_inject.cli import commands

    commands.sites(**given)


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
@click.option("--plot", type=OutputPath(), help="Draw the grid: .png, .svg or .pdf. Needs matplotlib.")
@options.force
@options.tables
def cost(**given: Any) -> None:
    """Print what blocks would add to MODEL: one table of stages × reduction ratios for each kind of cost.

    Nothing is computed or changed. MODEL is called once, without numbers, however many ratios and stages there are.
    """
    from se_inject.cli import commands

    commands.cost(**given)


@cli.command(short_help="List the blocks that can be put in.")
@click.argument("name", required=False)
@click.option("--on", "model", metavar="MODEL", help="What each block costs at all sites of this network.")
@options.reading
@options.tables
def blocks(**given: Any) -> None:
    """List the blocks, with their parameters at 256 channels; with a NAME, print that block's card.

    With --on, list what each block (or the one of that NAME) with its defaults adds to a network, and how it starts.
    """
    from se_inject.cli import commands

    commands.blocks(**given)


cli.add_command(gates.excitations)
cli.add_command(gates.prune)
cli.add_command(pictures.draw)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 could not be done, 2 asked wrongly, 130 interrupted."""
    warnings.simplefilter("ignore")
    sys.exit(reported(lambda: cli.main(standalone_mode=False)))
