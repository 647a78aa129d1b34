"""Classes of commands: how they run, how their help is laid out, and what is said of a mistyped command line."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import click

from se_inject.cli.confined import OutputPath as OutputPath
from se_inject.cli.confined import run
from se_inject.cli.talk import QUIET

_SECTIONS = (
    ("Which network", ("model", "file", "weights", "arch", "entry", "trust", "inputs", "max_memory", "max_time")),
    ("Which sites", ("stages", "at", "attended", "require_all")),
    ("Which block", ("block", "blocks", "reduction", "reductions", "position", "settings", "divisor", "bias", "init", "name", "budget")),
    ("Which data", ("source", "batch_size", "limit", "mean", "std", "classes", "metric", "tolerance")),
    ("What was chosen before", ("plan_file", "adapter")),
    ("What is written", ("outputs", "output", "plot", "draw", "report", "force", "for_inference", "device", "dtype", "memory_format", "opset", "dynamic_size")),
    ("What is done and printed", ("dry_run", "latency", "by", "depth", "seed", "style", "as_json", "verbose", "quiet", "_click_default_help", "help")),
)  # fmt: skip
"""Sections of a command's help, with the names of the parameters in each."""


class Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """``16G``: a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert text to bytes; a plain number is GiB."""
        found = re.fullmatch(r"([\d.]+)\s*([kMGT]?)i?B?", str(value), re.IGNORECASE)
        try:
            if found is None:
                raise ValueError
            exponent = "kmgt".index(found[2].lower()) + 1 if found[2] else 3
            size = int(float(found[1]) * 1024**exponent)
        except ValueError:
            self.fail(f"`{value}` is not a size; write it as 16G", param, ctx)
        if size < 1 << 30:
            self.fail(f"`{value}` is too little to import torch; at least 1G", param, ctx)
        return size


def _common_options() -> list[click.Option]:
    return [
        click.Option(
            ["--max-memory"],
            type=Size(),
            help="Most memory that reading a file may take, 16G.  [default: 8G and 24 times the files]",
        ),
        click.Option(
            ["--max-time"],
            type=click.IntRange(min=1),
            metavar="SECONDS",
            help="Most processor time, of all threads, that reading a file may take.  [default: an hour for each core]",
        ),
        click.Option(["-q", "--quiet"], is_flag=True, help="Print what was asked for and errors, nothing else."),
    ]


class WorkerCommand(click.Command):
    """A command whose function is run in a worker; see ``run_in_worker``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params += _common_options()

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command's function with the parsed arguments."""
        limits = {key: ctx.params.pop(key) for key in ("max_memory", "max_time")}
        quiet = ctx.meta[QUIET] = ctx.params.pop("quiet")
        work = super().invoke
        return run(self, ctx, lambda: work(ctx), limits, quiet)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; where words are left over, say how the option before them is written."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if "unexpected extra argument" not in error.message.lower():
                raise
            better = self._written_apart(given)
            if better is None:
                raise
            raise click.UsageError(f"{error.message.rstrip('.')}: did you mean `{better}`?", ctx) from error

    def _written_apart(self, args: Sequence[str]) -> str | None:
        """Find an option with more than one word behind it, and return it as it is written in one."""
        options = {text: option for option in self.params for text in option.opts if isinstance(option, click.Option)}
        for text, words in _runs(args):
            option = options.get(text)
            if not isinstance(option, click.Option) or option.is_flag or len(words) < 2:
                continue
            if option.name == "inputs" and all(word.isdigit() for word in words):
                return f"{text} {'x'.join(words)}"
            words = words if len(words) > 2 or not os.path.exists(words[-1]) else words[:1]
            if len(words) > 1 and option.name in ("stages", "reductions"):
                return f"{text} {','.join(word.strip(',') for word in words)}"
            if len(words) > 1 and option.multiple:
                return " ".join(f"{text} {word}" for word in words)
        return None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in sections."""
        left = {param.name: param for param in self.get_params(ctx) if isinstance(param, click.Option)}
        sections = [(title, [left.pop(name) for name in names if name in left]) for title, names in _SECTIONS]
        for title, params in [*sections, ("Others", list(left.values()))]:
            if params:
                with formatter.section(title):
                    formatter.write_dl([record for param in params if (record := param.get_help_record(ctx))])


def _runs(args: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Iterate over the options of a command line, each with the words behind it."""
    option = ""
    words: list[str] = []
    for word in args:
        if word.startswith("-") and len(word) > 1:
            if option:
                yield option, words
            option, words = word, []
        else:
            words.append(word)
    if option:
        yield option, words


class MainGroup(click.Group):
    """`se-inject MODEL …` is `se-inject inject MODEL …`; its help stands on the first page."""

    command_class = WorkerCommand

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command; every one is run in a worker."""
        if not isinstance(cmd, WorkerCommand):
            raise TypeError(f"`{cmd.name}` is not a WorkerCommand: write @click.command(cls=WorkerCommand)")
        super().add_command(cmd, name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; what begins with no command is a MODEL, unless it is nearly a command."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            self._refuse_misspelt(ctx, args)
            args = ["inject", *args]
        return super().parse_args(ctx, args)

    def _refuse_misspelt(self, ctx: click.Context, args: Sequence[str]) -> None:
        word = args[0]
        if not re.fullmatch(r"[A-Za-z_-]+", word) or word.startswith("-") or os.path.exists(word):
            return
        close = difflib.get_close_matches(word.lower(), self.commands, cutoff=0.7)
        if close:
            raise click.UsageError(f"no command `{word}`; did you mean `{close[0]}`?", ctx)
        if len(args) > 1 and not args[1].startswith("-"):
            raise click.UsageError(f"no command `{word}`; there are: {', '.join(sorted(self.commands))}", ctx)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the usage of the main command, and the form of the others."""
        formatter.write_usage("se-inject", "MODEL [OPTIONS]")
        formatter.write_usage("se-inject", "COMMAND … [OPTIONS]", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, and the options of the main one."""
        with formatter.section("Commands (COMMAND --help says more)"):
            others = [(name, self.commands[name]) for name in self.commands if name != "inject"]
            formatter.write_dl([(name, command.get_short_help_str(100)) for name, command in others])
        self.commands["inject"].format_options(ctx, formatter)
