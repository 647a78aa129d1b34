"""The command line: the only module that prints. torch is imported when a command needs it."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from se_inject import report
from se_inject._version import __version__
from se_inject.errors import InjectError, OptionError

if TYPE_CHECKING:
    from torch import nn

    from se_inject.plans import Plan


class _MainCommandGroup(click.Group):
    """`se-inject MODEL …` is `se-inject inject MODEL …`; its help stands on the first page."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = ["inject", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("se-inject", "MODEL [OPTIONS]")
        formatter.write_usage("se-inject", "sites MODEL [OPTIONS]", prefix="       ")
        formatter.write_usage("se-inject", "blocks", prefix="       ")

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
    """


def _network_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which network, shared by all commands."""
    for option in (
        click.option(
            "--input",
            "inputs",
            multiple=True,
            metavar="SHAPE",
            help="Shape of an input, 3x224x224; once for each input. Inferred if left out.",
        ),
        click.option(
            "--trust",
            multiple=True,
            metavar="PACKAGE",
            help="Allow this package's classes in a pickled MODEL: its code is imported and run.",
        ),
        click.option(
            "--weights",
            type=click.Path(path_type=Path),
            help="State dict to load into MODEL: .pt, .pth or .safetensors.",
        ),
        click.argument("model"),
    ):
        command = option(command)
    return command


@cli.command(short_help="Put blocks into MODEL (the main command).")
@_network_options
@click.option(
    "--stages", metavar="LIST", help="Stages: numbers (3,4), ranges (2-4) or paths (layer3). All if left out."
)
@click.option("--at", multiple=True, metavar="PATTERN", help="Sites by address: a glob ('layer3.*') or re:EXPRESSION.")
@click.option("--attended", is_flag=True, help="Also sites that have attention of their own already.")
@click.option("--block", default="se", show_default=True, help="Block to put in; see `se-inject blocks`.")
@click.option(
    "--position",
    type=click.Choice(["standard", "pre", "post", "identity", "conv3x3"]),
    default="standard",
    show_default=True,
    help="Where the block sits relative to a residual unit.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the block; `se-inject blocks NAME` tells which.",
)
@click.option(
    "--r",
    "--reduction",
    "reduction",
    type=float,
    help="Reduction ratio: the bottleneck is C // r wide.  [default: 16]",
)
@click.option("--divisor", type=int, help="Round the bottleneck to a multiple of this; timm uses 8.")
@click.option("--bias/--no-bias", default=None, help="Biases in the two layers of the block.  [default: bias]")
@click.option(
    "--init",
    type=click.Choice(["identity", "paper"]),
    help="identity: the network's output stays the same bit for bit until it is trained. paper: a plain sigmoid gate. "
    " [default: identity]",
)
@click.option("--name", help="Attribute that a block becomes on its owner.  [default: se]")
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    type=click.Path(path_type=Path),
    help="File to write: .onnx, .torchscript, .pt2 or .pt; may be repeated. If left out: <model>-se.pt.",
)
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--dry-run", is_flag=True, help="Plan and report only.")
@click.option("--latency", is_flag=True, help="Measure both networks in turns.")
@click.option("--device", help="Device of the exported network: cpu or cuda.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Number format of the exported network."
)
@click.option("--memory-format", type=click.Choice(["channels_last"]), help="Memory format of the exported network.")
@click.option("--opset", type=int, help="ONNX opset.")
@click.option("--seed", type=int, help="Seed for random weights, of the blocks and of a network built by name.")
@click.option(
    "--format",
    "style",
    type=click.Choice(report.FORMATS),
    default="text",
    show_default=True,
    help="Format of the tables.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("-v", "--verbose", is_flag=True, help="Every site, not only every stage.")
def inject(**options: Any) -> None:
    """Put blocks into MODEL, verify the result, and write it."""
    _inject(**options)


def _inject(
    model: str, weights: Path | None, trust: tuple[str, ...], inputs: tuple[str, ...], outputs: tuple[Path, ...],
    force: bool, dry_run: bool, latency: bool, style: str, as_json: bool, verbose: bool, seed: int | None, **options: Any,
) -> None:  # fmt: skip
    targets = () if dry_run else outputs or (_default_output(model),)
    _check_targets(targets, force, options)
    network = _load(model, weights, trust, seed)
    say = _Talk(as_json or style == "csv")
    say(f"{type(network).__name__} from {model}")
    plan = _plan(network, inputs, options)
    for note in plan.notes:
        say(f"note: {note}")
    cost = plan.cost()
    data: dict[str, Any] = {
        "model": type(network).__name__,
        "plan": [step.to_data() for step in plan.steps],
        "notes": list(plan.notes),
    }
    data["cost"] = report.cost_data(cost)
    say(_described(plan) + "\n")
    if not as_json:
        click.echo(report.cost_text(cost, style, by_site=verbose))
        if style == "text":
            click.echo("\n" + "\n".join(report.cost_lines(cost)))
    if dry_run and not latency:
        from se_inject.verification import weight_warnings

        for warning in weight_warnings(network):
            say("\n" + warning)
    else:
        injected = plan.apply(network)
        verdict = _verify(network, injected, plan)
        data["verification"] = report.verdict_data(verdict)
        say("\n" + "\n".join(report.verdict_lines(verdict)))
        verdict.expect_passed()
        if latency:
            measured = _latency(network, injected, plan)
            data["latency"] = vars(measured)
            say(report.latency_line(measured))
        if targets:
            exported = _export(injected, targets, plan, force, options)
            data["files"] = [_file_data(item) for item in exported]
            say("\n" + "\n".join(line for item in exported for line in _file_lines(item)))
    if as_json:
        click.echo(report.as_json(data))


@cli.command(short_help="List the stages of MODEL; -v: every site and every refusal.")
@_network_options
@click.option(
    "--format",
    "style",
    type=click.Choice(report.FORMATS),
    default="text",
    show_default=True,
    help="Format of the tables.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("-v", "--verbose", is_flag=True, help="Every site, and every refusal with its reason.")
def sites(
    model: str,
    weights: Path | None,
    trust: tuple[str, ...],
    inputs: tuple[str, ...],
    style: str,
    as_json: bool,
    verbose: bool,
) -> None:
    """List the stages of MODEL, where blocks can go. Nothing is changed or written."""
    from se_inject.finding import find_sites
    from se_inject.inputs import observe_model
    from se_inject.sites import ATTENDED

    network = _load(model, weights, trust, None)
    trace = observe_model(network, _example(inputs, network))
    found = find_sites(trace)
    if as_json:
        click.echo(report.as_json({"model": type(network).__name__, "notes": trace.notes, **report.sites_data(found)}))
    else:
        for note in trace.notes:
            click.echo(note, err=True)
        click.echo(report.stages_text(found, style))
        if verbose:
            click.echo("\n" + report.sites_text(found, style))
        attended = sum(site.held_back == ATTENDED for site in found.all_sites)
        if attended:
            click.echo(f"{attended} sites already have attention and are left out unless --attended is given", err=True)
        if found.refused and not verbose:
            click.echo(f"{len(found.refused)} places refused: -v lists them", err=True)
    found.everything(attended=True)


@cli.command(short_help="List the blocks that can be put in.")
@click.option(
    "--format",
    "style",
    type=click.Choice(report.FORMATS),
    default="text",
    show_default=True,
    help="Format of the table.",
)
@click.argument("name", required=False)
def blocks(style: str, name: str | None) -> None:
    """List the blocks, with their parameters at 256 channels; with a NAME, print that block's card."""
    from se_inject.blocks import block_names, build_block, find_block

    if name is not None:
        click.echo(inspect.getdoc(find_block(name)) or f"block `{name}` has no card")
        return
    rows: list[list[Any]] = []
    for known, origin in sorted(block_names().items()):
        try:
            block = build_block(known, 256, (14, 14), {}, "paper")
            about = (inspect.getdoc(find_block(known)) or "").split("\n")[0]
            rows.append([known, sum(p.numel() for p in block.parameters()), has_identity(block), about, origin])
        except InjectError as error:
            rows.append([known, None, None, f"broken: {error.message}", origin])
    click.echo(report.table(("block", "params at C = 256", "identity start", "what it is", "from"), rows, style))


def has_identity(block: nn.Module) -> bool:
    from se_inject.blocks import has_identity_start

    return has_identity_start(block)


class _Talk:
    """What is said to people: on stdout with the tables, on stderr beside JSON."""

    def __init__(self, as_json: bool) -> None:
        self.err = as_json

    def __call__(self, text: str) -> None:
        click.echo(text, err=self.err)


def _check_targets(targets: tuple[Path, ...], force: bool, options: dict[str, Any]) -> None:
    from se_inject.exporting import check_targets

    if targets:
        chosen = {key: options[key] for key in ("device", "dtype", "memory_format")}
        check_targets(targets, force=force, **chosen)


def _load(model: str, weights: Path | None, trust: tuple[str, ...], seed: int | None) -> nn.Module:
    import torch

    from se_inject.checkpoints import load

    if seed is not None:
        torch.manual_seed(seed)
    return load(model, weights=weights, trust=trust)


def _example(inputs: tuple[str, ...], network: nn.Module) -> Any:
    import torch

    from se_inject.inputs import parse_shape

    if not inputs:
        return None
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    return tuple(torch.empty(parse_shape(text), device="meta", dtype=dtype) for text in inputs)


def _plan(network: nn.Module, inputs: tuple[str, ...], options: dict[str, Any]) -> Plan:
    from se_inject.blocks import parsed_options
    from se_inject.plans import plan

    given = {key: options[key] for key in ("reduction", "divisor", "bias") if options[key] is not None}
    settings = parsed_options(options["block"], options["settings"])
    for key in given.keys() & settings.keys():
        raise OptionError(f"`{key}` is given twice", seen=f"{given[key]:g} and {settings[key]}", hint="leave one out")
    block_options = given | settings
    return plan(
        network,
        _example(inputs, network),
        stages=options["stages"],
        at=options["at"] or None,
        attended=options["attended"],
        block=options["block"],
        init=options["init"],
        position=options["position"],
        name=options["name"],
        **block_options,
    )


def _described(plan: Plan) -> str:
    """The plan in one line: how many blocks of which kind, where, with what options and start."""
    stages = sorted({step.stage for step in plan.steps if step.stage is not None})
    where = f"in stage{'s' * (len(stages) != 1)} {', '.join(map(str, stages))}" if stages else "outside of the stages"
    step = plan.steps[0]
    options = {"reduction": 16, "bias": True} | step.options if step.block == "se" else step.options
    told = [f"{'r' if key == 'reduction' else key} = {_plain(value)}" for key, value in options.items()]
    start = "identity start" if step.init == "identity" else "the paper's start"
    position = [f"position {step.position}"] if step.position != "standard" else []
    blocks = f"{len(plan)} {step.block.upper() if step.block == 'se' else step.block} block{'s' * (len(plan) != 1)}"
    return f"{blocks} {where}: {', '.join([*position, *told, start])}"


def _plain(value: Any) -> str:
    return (
        f"{value:g}"
        if isinstance(value, float)
        else ("yes" if value else "no")
        if isinstance(value, bool)
        else str(value)
    )


def _verify(network: nn.Module, injected: nn.Module, plan: Plan) -> Any:
    from se_inject.verification import verify

    return verify(network, injected, trace=plan.trace, fresh=True)


def _latency(network: nn.Module, injected: nn.Module, plan: Plan) -> Any:
    import torch

    from se_inject.cost import measure_latency
    from se_inject.inputs import real_inputs
    from se_inject.tracing import preserved

    parameter = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))
    assert plan.trace is not None
    args, kwargs = real_inputs(plan.trace.inputs, batch=1, device=parameter.device, dtype=parameter.dtype)
    with preserved(network), preserved(injected):
        return measure_latency(network.eval(), injected.eval(), args, kwargs)


def _export(injected: nn.Module, targets: tuple[Path, ...], plan: Plan, force: bool, options: dict[str, Any]) -> Any:
    import torch

    from se_inject.exporting import export_all
    from se_inject.inputs import real_inputs

    parameter = next((p for p in injected.parameters() if p.is_floating_point()), torch.zeros(()))
    assert plan.trace is not None
    args, kwargs = real_inputs(plan.trace.inputs, batch=2, device=parameter.device, dtype=parameter.dtype)
    chosen = {key: options[key] for key in ("device", "dtype", "memory_format", "opset")}
    return export_all(injected, targets, args, example_kwargs=kwargs, force=force, **chosen)


def _file_lines(item: Any) -> list[str]:
    lines = [f"wrote {item.path} ({report.short(item.size_bytes, 'B')}, {item.how})"]
    if item.checks:
        worst = max(item.checks, key=lambda check: check.max_rel_error)
        batches = ", ".join(str(check.batch) for check in item.checks)
        lines.append(
            f"      loaded back and run at batch {batches}: max error {worst.max_abs_error:.2g}, "
            f"relative {worst.max_rel_error:.2g} (limit {item.tolerance:.0e})"
        )
    return lines + [f"      {note}" for note in item.notes]


def _file_data(item: Any) -> dict[str, Any]:
    return {
        "path": str(item.path),
        "format": item.format,
        "bytes": item.size_bytes,
        "how": item.how,
        "checks": [check._asdict() for check in item.checks],
        "tolerance": item.tolerance,
        "notes": list(item.notes),
    }


def _default_output(model: str) -> Path:
    """``<model>-se.pt``, beside the input if that is a file."""
    path = Path(model)
    if path.is_file():
        return path.with_name(f"{path.stem}-se.pt")
    source, _, name = model.rpartition(":")
    name = name.partition(".")[0] if source == "timm" else name.rpartition(".")[2]
    return Path(f"{name or 'model'}-se.pt")


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 could not be done, 2 asked wrongly."""
    warnings.simplefilter("ignore")
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(1)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except InjectError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if os.environ.get("SE_INJECT_TRACEBACK"):
            raise
        click.echo(f"error: this should not have happened: {type(error).__name__}: {error}", err=True)
        click.echo("\nhint: please report it with what SE_INJECT_TRACEBACK=1 prints; nothing was written", err=True)
        sys.exit(1)
