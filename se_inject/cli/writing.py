"""Commands that write a network as it is, or without its blocks: ``export``, ``eject``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from se_inject.adapters import Adapter
from se_inject.cli.arguments import check_inference, conversion, example, packages, read_network, stored_plan
from se_inject.cli.talk import Talk, print_json
from se_inject.errors import LoadError, OptionError
from se_inject.exporting import check_outputs, check_targets, export_all, exported_data, exported_lines, write_all
from se_inject.forwards import original_class
from se_inject.inference import for_inference
from se_inject.loading import load
from se_inject.plans import Plan, plan_of
from se_inject.progress import step
from se_inject.surgery import eject_, own_steps, steps_of
from se_inject.tables import counted
from se_inject.tracing import describe, example_of


def export(
    *, model: str, weights: Path | None, arch: str | None, entry: str | None, trust: tuple[str, ...], inputs: tuple[str, ...],
    outputs: tuple[Path, ...], force: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Write a network to files, injected or not, each checked in its own runtime."""
    check_outputs(outputs, force=force, **conversion(options, "opset"))
    check_inference(outputs, options)
    stored = stored_plan(options, trust)
    say = Talk(as_json)
    step(f"reading {model}")
    network = _network(model, weights, arch, entry, trust, stored)
    blocks = len(steps_of(network))
    held = f", with {counted(blocks, 'block')} in it" if blocks else ""
    planned = stored.plan if isinstance(stored, Adapter) else stored
    given = example(inputs, network) or (planned.stored_inputs() if planned is not None else None)
    args, kwargs = example_of(network, given)
    assumed = f"note: input inferred: {describe(args, kwargs)}; --input takes another\n" if given is None else ""
    say(f"{original_class(network).__name__} from {model}{held}\n{assumed}")
    plan = plan_of(network) if blocks else None
    if options["for_inference"]:
        step("making a copy for inference")
        network = for_inference(network, args)
    write: dict[str, Any] = {"example_kwargs": kwargs, "force": force, **conversion(options, "opset", "dynamic_size")}
    if plan is not None:
        exported = write_all(network, plan, outputs, args, **write)
    else:
        for path in outputs:
            if path.suffix.lower() in (".json", ".safetensors"):
                raise OptionError(
                    f"`{path}` holds blocks alone, and there are none in {model}", hint="put some in first"
                )
        exported = export_all(network, outputs, args, **write)
    if as_json:
        data = {"model": original_class(network).__name__, "blocks": blocks}
        print_json({**data, "files": [exported_data(item) for item in exported]})
    say("\n".join(line for item in exported for line in exported_lines(item)))


def _network(
    model: str,
    weights: Path | None,
    arch: str | None,
    entry: str | None,
    trust: tuple[str, ...],
    stored: Plan | Adapter | None,
) -> nn.Module:
    """Make the network to write: a stored plan is applied before trained weights are loaded, an adapter after."""
    given: dict[str, Any] = {"arch": arch, "weights": weights, "entry": entry, "trust": packages(trust)}
    if not isinstance(stored, Plan):
        network = read_network(model, **given)
        if stored is None:
            return network
        if other := stored.other_weights(network):
            Talk(True)(f"note: the adapter was made for other weights: {other}")
        return stored.put_into(network)
    if weights is None and arch is None:
        raise OptionError(
            "`--plan` holds no trained weights, and the blocks would be new ones",
            hint="give the trained network's with --weights; or use the main command, which puts new blocks in",
        )
    try:
        return read_network(model, **given, prepare=stored.apply_)
    except LoadError as error:
        try:
            load(model, **given)
        except LoadError:
            raise error from None
        raise LoadError(
            f"the weights in `{weights or model}` are those of the network without blocks",
            hint="the main command puts new blocks in: the same without `export`",
        ) from error


def eject(
    *, model: str, weights: Path | None, arch: str | None, entry: str | None, trust: tuple[str, ...], inputs: tuple[str, ...],
    outputs: tuple[Path, ...], force: bool, **options: Any,
) -> None:  # fmt: skip
    """Take the blocks out of a network, and write the original."""
    check_targets(outputs, force=force, **conversion(options, "opset"))
    step(f"reading {model}")
    network = read_network(model, arch=arch, weights=weights, entry=entry, trust=packages(trust))
    taken, entries = len(own_steps(network)), len(network.state_dict())
    eject_(network)
    Talk()(
        f"{counted(taken, 'block')} taken out of {original_class(network).__name__} from {model}: {len(network.state_dict())} of "
        f"{entries} entries of the state dict left, as they were\n"
    )
    args, kwargs = example_of(network, example(inputs, network))
    exported = export_all(
        network, outputs, args, example_kwargs=kwargs, force=force, **conversion(options, "opset", "dynamic_size")
    )
    Talk()("\n".join(line for item in exported for line in exported_lines(item)))
