"""What the commands do: files and options in, text or JSON out. Together with `cli` the only module that prints."""

from __future__ import annotations

import functools
import inspect
import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from se_inject.adapters import Adapter, read_adapter
from se_inject.blocks import block_names, build_block, find_block, has_identity_start
from se_inject.cli.block_texts import parsed_blocks
from se_inject.cli.running import default_output
from se_inject.cost import Latency, cost_data, cost_lines, cost_text, latency_line, measure_latency
from se_inject.errors import InjectError, OptionError
from se_inject.exporting import check_outputs, check_targets, export_all, exported_data, exported_lines, write_all
from se_inject.forwards import original_class
from se_inject.loading import describe, is_program, load, load_program
from se_inject.plans import (
    EACH,
    Plan,
    block_costs,
    block_costs_data,
    block_costs_text,
    check_plot,
    cost_grid,
    grid_data,
    grid_text,
    plan,
    plan_lines,
    plot_grid,
    start_factors,
    start_notes,
)
from se_inject.progress import step
from se_inject.sites import ATTENDED, sites_data, sites_in, sites_text, stages_text
from se_inject.surgery import eject_, own_steps
from se_inject.tables import as_json, counted, table
from se_inject.tracing import example_of, float_like, observe_model, parse_shape, preserved, real_inputs
from se_inject.verification import check_against_file, verdict_data, verdict_lines, verify, weight_warnings


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
    targets = () if dry_run else outputs or (default_output(model),)
    check_outputs(targets, force=force, **_conversion(options, "opset"))
    stored = _stored(options, trust)
    if seed is not None:
        torch.manual_seed(seed)
    step(f"reading {model}")
    network = load(model, arch=arch, weights=weights, trust=_packages(trust), mmap=True)
    say = _Talk(as_json or style == "csv")
    say(f"{original_class(network).__name__} from {model}")
    step("finding sites")
    planned = _plan(network, inputs, options) if stored is None else _replayed(stored, network, inputs)
    trained = isinstance(stored, Adapter)
    notes = [*planned.notes, *([] if trained else start_notes(start_factors(planned.steps)))]
    for note in notes:
        say(f"note: {note}")
    step("counting the cost")
    cost = planned.cost()
    data: dict[str, Any] = {
        "model": original_class(network).__name__,
        "plan": [step.to_data() for step in planned.steps],
        "notes": notes,
        "cost": cost_data(cost),
    }
    say("\n".join(plan_lines(planned)) + "\n")
    if not as_json:
        click.echo(cost_text(cost, style, by_site=verbose))
        if style == "text":
            click.echo("\n" + "\n".join(cost_lines(cost)))
    if dry_run and not latency:
        for warning in weight_warnings(network):
            say("\n" + warning)
    else:
        step("injecting")
        injected = stored.put_into(network) if isinstance(stored, Adapter) else planned.apply(network)
        step("verifying")
        verdict = verify(network, injected, trace=planned.trace, fresh=not trained)
        if is_program(model) and planned.trace is not None:
            check = check_against_file(network, load_program(model), planned.trace)
            verdict = replace(verdict, checks=(check, *verdict.checks))
        data["verification"] = verdict_data(verdict)
        say("\n" + "\n".join(verdict_lines(verdict)))
        if as_json and not verdict.passed:
            _print_json(data)
        verdict.expect_passed()
        if latency:
            step("measuring the latency")
            measured = _latency(network, injected, planned)
            data["latency"] = vars(measured)
            say(latency_line(measured))
        if targets:
            args, kwargs = _real_inputs(planned, injected)
            exported = write_all(
                injected,
                planned,
                targets,
                args,
                example_kwargs=kwargs,
                force=force,
                **_conversion(options, "opset", "dynamic_size"),
            )
            data["files"] = [exported_data(item) for item in exported]
            say("\n" + "\n".join(line for item in exported for line in exported_lines(item)))
    if as_json:
        _print_json(data)


def _conversion(options: dict[str, Any], *more: str) -> dict[str, Any]:
    return {key: options[key] for key in ("device", "dtype", "memory_format", *more)}


def _packages(trust: tuple[str, ...]) -> tuple[str, ...]:
    """What may be imported for a pickle: blocks may come from a ``.py`` file as well."""
    return tuple(name for name in trust if not name.endswith(".py"))


def _plan(network: nn.Module, inputs: tuple[str, ...], options: dict[str, Any]) -> Plan:
    """The plan that the options make: the sum of those of the blocks."""
    plans = []
    for block in parsed_blocks(options["blocks"], options["settings"], _given(options)):
        if block.stages is not None and (options["stages"] or options["at"]):
            raise OptionError(
                "the stages are given twice",
                seen=f"`{block.stages}={block.name}`, and --stages or --at",
                hint="give them with every block, or with none",
            )
        plans.append(
            plan(
                network,
                _example(inputs, network),
                stages=block.stages or options["stages"],
                at=options["at"] or None,
                attended=options["attended"],
                block=block.name,
                init=options["init"],
                position=options["position"],
                name=options["name"],
                require_all=options["require_all"],
                **block.options,
            )
        )
    return functools.reduce(operator.add, plans)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The block's options that the command has options for."""
    return {key: options[key] for key in ("reduction", "divisor", "bias") if options.get(key) is not None}


def _stored(options: dict[str, Any], trust: tuple[str, ...]) -> Plan | Adapter | None:
    """What ``--plan`` or ``--adapter`` holds; it leaves nothing to choose."""
    files = {key: options[key] for key in ("plan_file", "adapter") if options[key] is not None}
    if not files:
        return None
    names = {
        "plan_file": "--plan",
        "adapter": "--adapter",
        "blocks": "--block",
        "settings": "--set",
        "reduction": "--r",
    }
    choices = ("stages", "at", "attended", "blocks", "settings", "reduction", "divisor", "bias", "init", "name")
    chosen = [key for key in choices if options[key] not in (None, ()) and (options[key] or key == "bias")]
    if options["position"] != "standard":
        chosen.append("position")
    given = [*files, *chosen]
    if len(given) > 1:
        first, second = (names.get(key, f"--{key}") for key in given[:2])
        raise OptionError(f"`{first}` leaves nothing to choose, and `{second}` is given", hint=f"leave `{second}` out")
    if "adapter" in files:
        return read_adapter(files["adapter"], trust=trust)
    return Plan.load(files["plan_file"], trust=trust)


def _replayed(stored: Plan | Adapter, network: nn.Module, inputs: tuple[str, ...]) -> Plan:
    """The stored plan, fitted to this network; for an adapter, with a note if the network has other weights."""
    replayed = stored.plan if isinstance(stored, Adapter) else stored
    told = stored.other_weights(network) if isinstance(stored, Adapter) else None
    notes = () if told is None else (f"the adapter was made for other weights: {told}",)
    return replace(replayed.fitted(network, _example(inputs, network)), notes=notes)


def _latency(network: nn.Module, injected: nn.Module, planned: Plan) -> Latency:
    with preserved(network), preserved(injected):
        for module in (network, injected):
            module.eval()
        args, kwargs = _real_inputs(planned, network, batch=1)
        try:
            with torch.no_grad():
                network(*args, **kwargs)
        except Exception:  # its batch is fixed
            args, kwargs = _real_inputs(planned, network)
        return measure_latency(network, injected, args, kwargs)


def _real_inputs(planned: Plan, network: nn.Module, batch: int | None = None) -> Any:
    parameter = float_like(network)
    assert planned.trace is not None
    return real_inputs(planned.trace.inputs, batch=batch, device=parameter.device, dtype=parameter.dtype)


def _example(inputs: tuple[str, ...], network: nn.Module) -> Any:
    if not inputs:
        return None
    dtype = float_like(network).dtype
    return tuple(torch.empty(parse_shape(text), device="meta", dtype=dtype) for text in inputs)


def _print_json(data: Any) -> None:
    click.echo(as_json(data))


# -- eject -------------------------------------------------------------------------------------------------


def eject(
    *, model: str, weights: Path | None, arch: str | None, trust: tuple[str, ...], inputs: tuple[str, ...],
    outputs: tuple[Path, ...], force: bool, **options: Any,
) -> None:  # fmt: skip
    """Take the blocks out of a network, and write what is left."""
    check_targets(outputs, force=force, **_conversion(options, "opset"))
    step(f"reading {model}")
    network = load(model, arch=arch, weights=weights, trust=_packages(trust))
    taken, entries = len(own_steps(network)), len(network.state_dict())
    eject_(network)
    click.echo(
        f"{counted(taken, 'block')} taken out of {original_class(network).__name__} from {model}: {len(network.state_dict())} of "
        f"{entries} entries of the state dict left, as they were\n"
    )
    args, kwargs = example_of(network, _example(inputs, network))
    exported = export_all(
        network, outputs, args, example_kwargs=kwargs, force=force, **_conversion(options, "opset", "dynamic_size")
    )
    click.echo("\n".join(line for item in exported for line in exported_lines(item)))


# -- sites, cost, blocks -----------------------------------------------------------------------------------


def sites(
    *, model: str, weights: Path | None, arch: str | None, trust: tuple[str, ...], inputs: tuple[str, ...], style: str,
    as_json: bool, verbose: bool,
) -> None:  # fmt: skip
    """List the stages of a network, and all its sites and refusals."""
    step(f"reading {model}")
    network = load(model, arch=arch, weights=weights, trust=trust, mmap=True)
    step("finding sites")
    if line := describe(model, network, arch):
        click.echo(line, err=True)
    trace = observe_model(network, _example(inputs, network))
    found = sites_in(trace)
    if as_json:
        _print_json({"model": original_class(network).__name__, "notes": list(trace.notes), **sites_data(found)})
    else:
        for note in trace.notes:
            click.echo(note, err=True)
        click.echo(stages_text(found, style))
        if verbose:
            click.echo("\n" + sites_text(found, style))
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
    step(f"reading {model}")
    network = load(model, arch=arch, weights=weights, trust=trust, mmap=True)
    step("counting the cost")
    grid = cost_grid(
        network,
        _example(inputs, network),
        reductions=reductions,
        stages=stages or EACH,
        attended=options["attended"],
        block=options["block"],
        position=options["position"],
        init=options["init"],
        **parsed_blocks([options["block"]], options["settings"], _given(options))[0].options,
    )
    for note in grid.notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        _print_json(grid_data(grid))
    else:
        click.echo(grid_text(grid, style))
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
        step(f"reading {model}")
        network = load(model, trust=trust, mmap=True)
        step("counting the cost of every block")
        found = block_costs(network, _example(inputs, network), None if name is None else [name])
        _print_json(block_costs_data(found)) if as_json else click.echo(block_costs_text(found, style))
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
