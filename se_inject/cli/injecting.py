"""The command ``se-inject MODEL``: plan, report, put blocks in, verify, write."""

from __future__ import annotations

import functools
import operator
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from se_inject.adapters import Adapter
from se_inject.cli.arguments import block_options, check_inference, conversion, example, packages, stored_plan
from se_inject.cli.block_texts import parsed_blocks
from se_inject.cli.confined import default_output
from se_inject.cli.talk import Talk, is_quiet, print_json
from se_inject.cost import Latency, cost_data, cost_lines, cost_text, graphed, latency_line, measure_latency
from se_inject.errors import OptionError
from se_inject.exporting import check_outputs, exported_data, exported_lines, write_all
from se_inject.forwards import original_class
from se_inject.inference import for_inference
from se_inject.loading import is_program, load, load_program
from se_inject.plans import Plan, plan, plan_lines, start_factors, start_notes
from se_inject.progress import step
from se_inject.reports import check_report
from se_inject.reports import report as write_report
from se_inject.tables import counted
from se_inject.tracing import float_like, preserved, real_inputs
from se_inject.verification import check_against_file, verdict_data, verdict_lines, verify, weight_warnings


def inject(
    *, model: str, weights: Path | None, arch: str | None, entry: str | None, trust: tuple[str, ...], inputs: tuple[str, ...],
    outputs: tuple[Path, ...], force: bool, dry_run: bool, latency: bool, style: str, as_json: bool, verbose: bool, seed: int | None, report: Path | None,
    **options: Any,
) -> None:  # fmt: skip
    """Put blocks into a network, verify the result, and write it."""
    targets = () if dry_run else outputs or (default_output(model),)
    check_outputs(targets, force=force, **conversion(options, "opset"))
    check_inference(targets, options)
    if report is not None:
        check_report(report, force=force)
    found: dict[str, Any] = {}
    stored = stored_plan(options, trust)
    if seed is not None:
        torch.manual_seed(seed)
    step(f"reading {model}")
    read: list[str] = []
    network = load(model, arch=arch, weights=weights, entry=entry, trust=packages(trust), mmap=True, notes=read)
    say = Talk(as_json or style == "csv")
    say(f"{original_class(network).__name__} from {model}")
    step("finding sites")
    planned = planned_blocks(network, inputs, options) if stored is None else replayed(stored, network, inputs)
    trained = isinstance(stored, Adapter)
    notes = [*read, *planned.notes, *([] if trained else start_notes(start_factors(planned.steps)))]
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
    if not as_json and (style != "text" or not is_quiet()):
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
            check = check_against_file(network, load_program(model, trust=packages(trust)), planned.trace)
            verdict = replace(verdict, checks=(check, *verdict.checks))
        data["verification"] = verdict_data(verdict)
        found["verdict"] = verdict
        say("\n" + "\n".join(verdict_lines(verdict)))
        if as_json and not verdict.passed:
            print_json(data)
        verdict.expect_passed()
        written = _for_inference(injected, planned) if options["for_inference"] else injected
        if latency:
            step("measuring the latency")
            others = (_for_inference(network, planned), written) if options["for_inference"] else None
            for name, measured in _latencies(network, injected, others, planned).items():
                found.setdefault("latency", measured)
                data[name.replace(" ", "_").replace(",", "").lower()] = vars(measured)
                say(latency_line(measured, name))
        if targets:
            args, kwargs = _real_inputs(planned, injected)
            exported = write_all(
                written,
                planned,
                targets,
                args,
                example_kwargs=kwargs,
                force=force,
                **conversion(options, "opset", "dynamic_size"),
            )
            found["exported"] = exported
            data["files"] = [exported_data(item) for item in exported]
            say("\n" + "\n".join(line for item in exported for line in exported_lines(item)))
    if report is not None:
        step("writing the report")
        command = shlex.join(["se-inject", *sys.argv[1:]])
        write_report(planned, report, notes=notes, command=command, force=force, **found)
        say(f"\nwrote {report}")
    if as_json:
        print_json(data)


def planned_blocks(network: nn.Module, inputs: tuple[str, ...], options: dict[str, Any]) -> Plan:
    """Make the plan that the options describe: the sum of those of the blocks."""
    plans = []
    blocks = parsed_blocks(options["blocks"], options["settings"], block_options(options))
    if options["budget"] and len(blocks) > 1:
        raise OptionError("a budget is for one block", seen=counted(len(blocks), "block"), hint="give one --block")
    if options["budget"] and options["device"] and any(text.startswith("latency") for text in options["budget"]):
        network.to(options["device"])  # latency is measured where the network is
    for block in blocks:
        if block.stages is not None and (options["stages"] or options["at"]):
            raise OptionError(
                "the stages are given twice",
                seen=f"`{block.stages}={block.name}`, and --stages or --at",
                hint="give them with every block, or with none",
            )
        plans.append(
            plan(
                network,
                example(inputs, network),
                stages=block.stages or options["stages"],
                at=options["at"] or None,
                attended=options["attended"],
                block=block.name,
                init=options["init"],
                position=options["position"],
                name=options["name"],
                require_all=options["require_all"],
                budget=options["budget"] or None,
                **block.options,
            )
        )
    return functools.reduce(operator.add, plans)


def replayed(stored: Plan | Adapter, network: nn.Module, inputs: tuple[str, ...]) -> Plan:
    """Fit the stored plan to this network; for an adapter, with a note if the network has other weights."""
    kept = stored.plan if isinstance(stored, Adapter) else stored
    differences = stored.other_weights(network) if isinstance(stored, Adapter) else None
    notes = () if differences is None else (f"the adapter was made for other weights: {differences}",)
    return replace(kept.fitted(network, example(inputs, network)), notes=notes)


def _for_inference(network: nn.Module, planned: Plan) -> nn.Module:
    step("making a copy for inference")
    args, kwargs = _real_inputs(planned, network)
    if kwargs:
        raise OptionError("`--for-inference` is for networks whose inputs are positional", seen=", ".join(kwargs))
    return for_inference(network, args)


def _latencies(
    network: nn.Module, injected: nn.Module, others: tuple[nn.Module, nn.Module] | None, planned: Plan
) -> dict[str, Latency]:
    """Measure the network against the injected one, and the inference copies of both; on a GPU as CUDA graphs as well."""
    found = {"latency": _latency(network, injected, planned)}
    if others is not None:
        found["for inference"] = _latency(*others, planned)
    if float_like(network).is_cuda:
        found["CUDA graph"] = _latency(network, injected, planned, recorded=True)
        if others is not None:
            found["CUDA graph, for inference"] = _latency(*others, planned, recorded=True)
    return found


def _latency(network: nn.Module, injected: nn.Module, planned: Plan, *, recorded: bool = False) -> Latency:
    with preserved(network), preserved(injected):
        for module in (network, injected):
            module.eval()
        args, kwargs = _real_inputs(planned, network, batch=1)
        try:
            with torch.no_grad():
                network(*args, **kwargs)
        except Exception:  # its batch is fixed
            args, kwargs = _real_inputs(planned, network)
        if recorded:
            replays = [graphed(each, args, kwargs) for each in (network, injected)]
            return measure_latency(replays[0], replays[1], args, kwargs)
        return measure_latency(network, injected, args, kwargs)


def _real_inputs(planned: Plan, network: nn.Module, batch: int | None = None) -> Any:
    parameter = float_like(network)
    assert planned.trace is not None
    return real_inputs(planned.trace.inputs, batch=batch, device=parameter.device, dtype=parameter.dtype)
