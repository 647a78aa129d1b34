"""Run a command in a confined process if it opens a file that a stranger may have made.

Importing this imports no torch. In a process that has imported torch already (a notebook, a test), and on a system
without `fork`, the command runs in the process itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from se_inject.cli.progress_line import ProgressLine
from se_inject.errors import InjectError, out_of_memory
from se_inject.isolation import (
    Confinement,
    Interrupted,
    can_fork,
    clean_end,
    code_beside,
    default_memory,
    protections,
    run_in_worker,
)
from se_inject.progress import current_step

GIB = 1 << 30
_ZOOS = ("torchvision:", "timm:")
_STRANGERS = ("model", "file", "models", "weights", "plan_file", "adapter", "adapters")
_MAY_BE_CODE = ("model", "models", "source", "metric")
_OUTPUTS = ("output", "outputs", "plot", "report")
_CODE = re.compile(r"(?:^|=)([^,=]+\.py):[\w.]+(?:,|$)")
_IMPORTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")


class OutputPath(click.Path):
    """A file that a command writes."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)


def run(
    command: click.Command, ctx: click.Context, work: Callable[[], Any], limits: dict[str, Any], quiet: bool
) -> Any:
    """Run a command's function in a worker, or in this process where that can't fork.

    Args:
        command: the command.
        ctx: its command line, parsed.
        work: the function, with its arguments.
        limits: ``max_memory`` and ``max_time``, as for ``confinement_for``.
        quiet: show no progress.
    """
    if not can_fork():
        _say_how(ctx, None, "this process has imported torch already, or can't fork")
        with clean_end():
            return work()
    confinement, why = confinement_for(ctx, **limits)
    _say_how(ctx, confinement, why)
    code = run_in_worker(
        lambda: reported(work),
        confinement,
        outputs=outputs_of(command, ctx),
        force=bool(ctx.params.get("force")),
        display=ProgressLine.if_wanted(quiet),
    )
    raise click.exceptions.Exit(code)


def reported(work: Callable[[], Any]) -> int:
    """Run this, print what goes wrong as the command line does, and return the exit code.

    Exit codes: 0 done, 1 could not be done, 2 asked wrongly, 130 interrupted, 143 terminated.
    """
    try:
        result = work()
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except Interrupted as ending:
        click.echo("interrupted" if ending.exit_code == 130 else "terminated", err=True)
        return ending.exit_code
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:
        if out_of_memory(error):
            _print_out_of_memory()
        elif isinstance(error, InjectError):
            click.echo(f"error: {error}", err=True)
            return error.exit_code
        elif os.environ.get("SE_INJECT_TRACEBACK"):
            raise
        else:
            click.echo(f"error: this should not have happened: {type(error).__name__}: {error}", err=True)
            click.echo("\nhint: please report it with what SE_INJECT_TRACEBACK=1 prints; nothing was written", err=True)
        return 1
    return result if isinstance(result, int) else 0


def _print_out_of_memory() -> None:
    step = current_step()
    click.echo(f"error: memory ran out{f' while {step}' if step else ''}", err=True)
    if limit := _memory_limit():
        click.echo(f"seen: this process may take {limit / GIB:.1f} GiB", err=True)
    click.echo("\nhint: nothing was written; `--max-memory 32G` allows more, if the machine has it", err=True)


def _memory_limit() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    return min((n for n in resource.getrlimit(resource.RLIMIT_DATA) if n != resource.RLIM_INFINITY), default=None)


# -- what the command line names ---------------------------------------------------------------------------


def confinement_for(
    ctx: click.Context, max_memory: int | None = None, max_time: int | None = None
) -> tuple[Confinement | None, str]:
    """Choose the confinement of a command's process; None, and the reason, if it isn't confined.

    Args:
        ctx: the command line, parsed.
        max_memory: most bytes of memory; None: as much as files of this size need, and more.
        max_time: most seconds of processor time; None: an hour for each processor.
    """
    if trusted := ctx.params.get("trust"):
        return None, f"`--trust {trusted[0]}` lets the file's own code run"
    texts = list(_texts(ctx.params.values()))
    for text in _texts(ctx.params.get(name) for name in _MAY_BE_CODE):
        if not os.path.exists(text) and not text.startswith(_ZOOS) and (_IMPORTED.match(text) or _CODE.match(text)):
            return None, f"`{text}` is code of yours, which may need anything"
    code = [Path(found[1]) for text in texts if not os.path.exists(text) and (found := _CODE.search(text))]
    if not any(path for name in _STRANGERS for path in _paths(ctx.params.get(name))):
        return None, "no file is read that could be a stranger's"
    named = [path for value in ctx.params.values() for path in _paths(value)]
    beside = [found for path in code if path.exists() for found in code_beside(path)]
    sizes = [path.stat().st_size for path in named if path.is_file()]
    confinement = Confinement(
        readable=tuple(path.resolve() for path in (*named, *beside)),
        memory=max_memory or default_memory(sizes),
        seconds=max_time or 3600 * (os.cpu_count() or 1),
        file_size=8 * GIB + 16 * sum(sizes),
        gpu=str(ctx.params.get("device") or "").startswith("cuda"),
    )
    return confinement, ""


def outputs_of(command: click.Command, ctx: click.Context) -> list[Path]:
    """List the files that this command line writes."""
    options = [p for p in command.params if isinstance(p.type, OutputPath) or p.name in _OUTPUTS]
    names = [option.name or "" for option in options]
    if ctx.params.get("dry_run"):
        names.remove("outputs")
    found = [Path(text) for name in names for text in _texts([ctx.params.get(name)])]
    if command.name == "inject" and "outputs" in names and not ctx.params["outputs"]:
        found.append(default_output(ctx.params["model"]))
    return found


def default_output(model: str) -> Path:
    """Return ``<model>-se.pt``, beside the input if that is a file."""
    path = Path(model)
    if path.is_file():
        return path.with_name(f"{path.stem}-se.pt")
    source, _, name = model.rpartition(":")
    name = name.partition(".")[0] if source == "timm" else name.rpartition(".")[2]
    return Path(f"{name or 'model'}-se.pt")


def _paths(value: Any) -> Iterator[Path]:
    """List the existing files and folders among a parameter's values."""
    for text in _texts([value]):
        if "\0" not in text and len(text) < 4096 and os.path.exists(text):
            yield Path(text)


def _texts(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str | Path) and str(value):
            yield str(value)
        elif isinstance(value, tuple | list):
            yield from _texts(value)


def _say_how(ctx: click.Context, confinement: Confinement | None, why: str) -> None:
    """Say, with ``-v``, whether the work is confined, and what this system keeps it from."""
    if not ctx.params.get("verbose"):
        return
    if confinement is None:
        click.echo(f"not confined: {why}", err=True)
        return
    memory = (confinement.memory or 0) / GIB
    click.echo(
        f"confined, with at most {memory:.1f} GiB of memory and {confinement.seconds} s of processor time:", err=True
    )
    for line in protections():
        click.echo(f"  {line}", err=True)
