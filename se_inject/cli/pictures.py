"""The command that draws a network."""

from __future__ import annotations

from typing import Any

import click

from se_inject.cli import options
from se_inject.cli.running import WorkerCommand
from se_inject.cli.talk import note


@click.command(cls=WorkerCommand, short_help="Draw MODEL with the blocks in it.")
@options.network
@options.outputs("File to write: .svg, or .png (needs matplotlib); may be repeated.")
@options.force
@click.option("--stages", metavar="LIST", help="Stages as for the main command.")
@click.option("--at", multiple=True, metavar="PATTERN", help="Sites by address, as for the main command.")
@options.attended
@click.option("--r", "--reduction", "reduction", type=float, help="Reduction ratio.  [default: 16]")
@options.block
def draw(**given: Any) -> None:
    """Draw MODEL as data flows through it: stages, units, and where in a unit each block sits.

    Of an injected MODEL, its own blocks are drawn; of another, those that the main command would put in. Nothing is
    computed or changed.
    """
    from se_inject.cli.arguments import block_options, example, network_of
    from se_inject.cli.block_texts import parsed_blocks
    from se_inject.errors import OptionError
    from se_inject.pictures import check_picture
    from se_inject.plans import plan, plan_of
    from se_inject.surgery import steps_of

    for path in given["outputs"]:
        check_picture(path, force=given["force"])
    network = network_of(given, mmap=True)
    inputs = example(given["inputs"], network)
    if steps_of(network):
        if given["stages"] or given["at"]:
            raise OptionError("MODEL holds blocks, and these are drawn", hint="leave out --stages and --at")
        drawn = plan_of(network, inputs, trust=given["trust"]).draw(network, example_inputs=inputs)
    else:
        block = parsed_blocks([given["block"]], given["settings"], block_options(given))[0]
        drawn = plan(
            network,
            inputs,
            stages=given["stages"],
            at=given["at"] or None,
            attended=given["attended"],
            block=block.name,
            position=given["position"],
            init=given["init"],
            **block.options,
        ).draw()
    for path in given["outputs"]:
        drawn.save(path, force=given["force"])
        note(f"wrote {path}")
