"""What the commands do: files and options in, text or JSON out. Together with `cli` the only module that prints."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from se_inject import exporting, report, verification
from se_inject.blocks import block_names, build_block, find_block, has_identity_start, parsed_options
from se_inject.checkpoints import describe, load
from se_inject.cost import Latency, measure_latency
from se_inject.errors import InjectError, OptionError
from se_inject.finding import find_sites
from se_inject.grid import EACH, block_costs, cost_grid
from se_inject.inputs import observe_model, parse_shape, real_inputs
from se_inject.plans import Plan, plan
from se_inject.plotting import check_plot, plot_grid
from se_inject.sites import ATTENDED
from se_inject.starts import start_factors
from se_inject.tables import as_json, counted, table
from se_inject.tracing import preserved


class _Talk:
    """What is said to people: on stdout with the tables, on stderr beside data for machines."""

    def __init__(self, for_machines: bool) -> None:
        self.err = for_machines

    def __call__(self, text: str) -> None:
        click.echo(text, err=self.err)


# -- inject ------------------------------------------------------------------------------------------------


def inject(
    *, model: str, weights: Path | None, arch: str | None, trust: tuple[str, ...], inputs: tuple[str, ...],
    outputs: tuple[Path, ...], force: bool, dry_run: bool, latency: bool, style: str, as_json: bool, verbose: bool, seed: int | None, **options: Any,
) -> None:  # fmt: skip
    """Put blocks into a network, verify the result, and write it."""
    targets = () if dry_run else outputs or (_default_output(model),)
    _check_targets(targets, force, options)
    if seed is not None:
        torch.manual_seed(seed)
    network = load(model, arch=arch, weights=weights, trust=trust, mmap=True)
    say = _Talk(as_json or style == "csv")
    say(f"{type(network).__name__} from {model}")
    planned = _plan(network, inputs, options)
    notes = [*planned.notes, *report.start_notes(start_factors(planned.steps))]
    for note in notes:
        say(f"note: {note}")
    cost = planned.cost()
    data: dict[str, Any] = {
        "model": type(network).__name__,
        "plan": [step.to_data() for step in planned.steps],
        "notes": notes,
        "cost": report.cost_data(cost),
    }
    say(report.plan_line(planned) + "\n")
    if not as_json:
        click.echo(report.cost_text(cost, style, by_site=verbose))
        if style == "text":
            click.echo("\n" + "\n".join(report.cost_lines(cost)))
    if dry_run and not latency:
        for warning in verification.weight_warnings(network):
            say("\n" + warning)
    else:
        injected = planned.apply(network)
        verdict = verification.verify(network, injected, trace=planned.trace, fresh=True)
        data["verification"] = report.verdict_data(verdict)
        say("\n" + "\n".join(report.verdict_lines(verdict)))
        if as_json and not verdict.passed:
            _print_json(data)
        verdict.expect_passed()
        if latency:
            measured = _latency(network, injected, planned)
            data["latency"] = vars(measured)
            say(report.latency_line(measured))
        if targets:
            exported = _export(injected, targets, planned, force, options)
            data["files"] = [report.exported_data(item) for item in exported]
            say("\n" + "\n".join(line for item in exported for line in report.exported_lines(item)))
    if as_json:
        _print_json(data)


def _default_output(model: str) -> Path:
    """``<model>-se.pt``, beside the input if that is a file."""
    path = Path(model)
    if path.is_file():
        return path.with_name(f"{path.stem}-se.pt")
    source, _, name = model.rpartition(":")
    name = name.partition(".")[0] if source == "timm" else name.rpartition(".")[2]
    return Path(f"{name or 'model'}-se.pt")


def _check_targets(targets: tuple[Path, ...], force: bool, options: dict[str, Any]) -> None:
    if targets:
        chosen = {key: options[key] for key in ("device", "dtype", "memory_format")}
        exporting.check_targets(targets, force=force, **chosen)


def _plan(network: nn.Module, inputs: tuple[str, ...], options: dict[str, Any]) -> Plan:
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
        **_block_options(options),
    )


def _block_options(options: dict[str, Any]) -> dict[str, Any]:
    """The block's options, from those of the command that stand for them and from ``--set``."""
    given = {key: options[key] for key in ("reduction", "divisor", "bias") if options.get(key) is not None}
    settings = parsed_options(options["block"], options["settings"])
    for key in given.keys() & settings.keys():
        raise OptionError(f"`{key}` is given twice", seen=f"{given[key]:g} and {settings[key]}", hint="leave one out")
    return given | settings


def _latency(network: nn.Module, injected: nn.Module, planned: Plan) -> Latency:
    args, kwargs = _real_inputs(planned, network, batch=1)
    with preserved(network), preserved(injected):
        return measure_latency(network.eval(), injected.eval(), args, kwargs)


def _export(
    injected: nn.Module, targets: tuple[Path, ...], planned: Plan, force: bool, options: dict[str, Any]
) -> list[exporting.Exported]:
    args, kwargs = _real_inputs(planned, injected, batch=2)
    chosen = {key: options[key] for key in ("device", "dtype", "memory_format", "opset")}
    return exporting.export_all(injected, targets, args, example_kwargs=kwargs, force=force, **chosen)


def _real_inputs(planned: Plan, network: nn.Module, batch: int) -> Any:
    parameter = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))
    assert planned.trace is not None
    return real_inputs(planned.trace.inputs, batch=batch, device=parameter.device, dtype=parameter.dtype)


def _example(inputs: tuple[str, ...], network: nn.Module) -> Any:
    if not inputs:
        return None
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    return tuple(torch.empty(parse_shape(text), device="meta", dtype=dtype) for text in inputs)


def _print_json(data: Any) -> None:
    click.echo(as_json(data))


# -- sites, cost, blocks -----------------------------------------------------------------------------------


def sites(
    *, model: str, weights: Path | None, arch: str | None, trust: tuple[str, ...], inputs: tuple[str, ...], style: str,
    as_json: bool, verbose: bool,
) -> None:  # fmt: skip
    """List the stages of a network, and all its sites and refusals."""
    network = load(model, arch=arch, weights=weights, trust=trust, mmap=True)
    if line := describe(model, network, arch):
        click.echo(line, err=True)
    trace = observe_model(network, _example(inputs, network))
    found = find_sites(trace)
    if as_json:
        _print_json({"model": type(network).__name__, "notes": trace.notes, **report.sites_data(found)})
    else:
        for note in trace.notes:
            click.echo(note, err=True)
        click.echo(report.stages_text(found, style))
        if verbose:
            click.echo("\n" + report.sites_text(found, style))
        attended = sum(site.held_back == ATTENDED for site in found.all_sites)
        if attended:
            have = "site already has" if attended == 1 else "sites already have"
            click.echo(f"{attended} {have} attention, left out unless --attended is given", err=True)
        if found.refused and not verbose:
            click.echo(f"{counted(len(found.refused), 'place')} refused: -v says why", err=True)
    found.everything(attended=True)


def cost(
    *, model: str, weights: Path | None, arch: str | None, trust: tuple[str, ...], inputs: tuple[str, ...],
    reductions: tuple[float, ...] | None, stages: tuple[str, ...], plot: Path | None, force: bool, style: str,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Print, and draw, what blocks would add for every ratio and choice of stages."""
    if plot is not None:
        check_plot(plot, force=force)
    network = load(model, arch=arch, weights=weights, trust=trust, mmap=True)
    grid = cost_grid(
        network,
        _example(inputs, network),
        reductions=reductions,
        stages=stages or EACH,
        attended=options["attended"],
        block=options["block"],
        position=options["position"],
        init=options["init"],
        **_block_options(options),
    )
    for note in grid.notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        _print_json(report.grid_data(grid))
    else:
        click.echo(report.grid_text(grid, style))
    if plot is not None:
        plot_grid(grid, plot, force=force)
        click.echo(f"wrote {plot}", err=True)


def blocks(
    *, name: str | None, model: str | None, trust: tuple[str, ...], inputs: tuple[str, ...], style: str, as_json: bool
) -> None:
    """Print the card of a block; or list the blocks, with what they cost at 256 channels or on a network."""
    if name is not None:
        card = inspect.getdoc(find_block(name)) or f"block `{name}` has no card"
    if model is not None:
        network = load(model, trust=trust, mmap=True)
        found = block_costs(network, _example(inputs, network), None if name is None else [name])
        _print_json(report.block_costs_data(found)) if as_json else click.echo(report.block_costs_text(found, style))
    elif name is not None:
        click.echo(card)
    else:
        rows = [_known(known, origin) for known, origin in sorted(block_names().items())]
        if as_json:
            keys = ("block", "params", "identity_start", "about", "from")
            _print_json([dict(zip(keys, row, strict=True)) for row in rows])
        else:
            click.echo(table(("block", "params at C = 256", "identity start", "what it is", "from"), rows, style))


def _known(name: str, origin: str) -> list[Any]:
    try:
        block = build_block(name, 256, (14, 14), {}, "paper")
        about = (inspect.getdoc(find_block(name)) or "").split("\n")[0]
    except InjectError as error:
        return [name, None, None, f"broken: {error.message}", origin]
    return [name, sum(p.numel() for p in block.parameters()), has_identity_start(block), about, origin]
