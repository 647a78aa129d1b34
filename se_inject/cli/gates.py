"""Commands that run an injected network on data: ``excitations``, ``prune``, ``compare``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from se_inject.cli import options
from se_inject.cli.running import OutputPath, WorkerCommand
from se_inject.cli.talk import note
from se_inject.progress import step

if TYPE_CHECKING:
    from torch import nn

    from se_inject.gates import Data

data = options.together(
    click.option(
        "--data",
        "source",
        required=True,
        metavar="DATA",
        help="A folder of images (one folder for each class), an .npz or .pt file of arrays, or file.py:function that "
        "returns batches.",
    ),
    click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Examples in a batch."),
    click.option("--limit", type=click.IntRange(1), help="Use so many batches at most.  [default: all]"),
    click.option("--mean", type=options.Ratios(), help="Mean of each colour of images, 0.485,0.456,0.406."),
    click.option("--std", type=options.Ratios(), help="Standard deviation of each colour of images."),
)
""" Which data, and how images become tensors."""


@click.command(cls=WorkerCommand, short_help="What the gates of an injected MODEL do on data.")
@options.network
@data
@click.option("--classes", is_flag=True, help="By class as well, where the data has labels.")
@click.option("--plot", type=OutputPath(), help="Draw them by channel: .png, .svg or .pdf. Needs matplotlib.")
@click.option(
    "--draw",
    type=OutputPath(),
    help="Draw the network, its blocks coloured by how much their gates vary: .svg or .png.",
)
@options.force
@options.tables
def excitations(**given: Any) -> None:
    """Print what the gates of an injected MODEL do on data: means, spreads, saturation, what depends on the image.

    The network runs once over the data, in eval mode. Nothing of it is changed or written.
    """
    from se_inject.cli.arguments import example
    from se_inject.gates import excitations as measure
    from se_inject.gates import excitations_data, excitations_text, plot_gates
    from se_inject.pictures import check_picture
    from se_inject.plans import check_plot, plan_of
    from se_inject.tables import as_json

    if given["plot"] is not None:
        check_plot(given["plot"], force=given["force"])
    if given["draw"] is not None:
        check_picture(given["draw"], force=given["force"])
    network, batches = loaded(given)
    found = measure(network, limited(batches, given["limit"]), progress=progress())
    for line in batches.all_notes():
        note(f"note: {line}")
    if given["as_json"]:
        click.echo(as_json({**excitations_data(found, by_class=given["classes"]), "data": batches.all_notes()}))
    else:
        click.echo(excitations_text(found, given["style"], by_class=given["classes"]))
    if given["plot"] is not None:
        plot_gates(found, given["plot"], force=given["force"])
        note(f"wrote {given['plot']}")
    if given["draw"] is not None:
        inputs = example(given["inputs"], network)
        plan = plan_of(network, inputs, trust=given["trust"])
        plan.draw(network, found, example_inputs=inputs).save(given["draw"], force=given["force"])
        note(f"wrote {given['draw']}")


@click.command(cls=WorkerCommand, short_help="Fold away the blocks of MODEL whose gates hardly depend on the image.")
@options.network
@data
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    default=0.01,
    show_default=True,
    help="The most that the output may change: the root mean square of the difference over that of the output.",
)
@click.option(
    "--metric",
    metavar="FILE.py:FUNCTION",
    help="Measure with this function of the network instead, better the larger it is; the tolerance is the most it may lose.",
)
@options.outputs("File to write: .onnx, .torchscript, .pt2 or .pt; may be repeated.")
@options.force
@options.targets
@options.tables
def prune(**given: Any) -> None:
    """Fold away the blocks of MODEL whose gates hardly depend on the image, and write what is left.

    Such a block becomes the mean of its gate, multiplied into the convolution or norm in front of it. The blocks whose
    gates vary least go first, as long as the measured change stays within the tolerance. Nothing is trained.
    """
    import copy

    from se_inject.cli.arguments import conversion
    from se_inject.cli.arguments import example as example_inputs
    from se_inject.cost import latency_line
    from se_inject.errors import OptionError
    from se_inject.exporting import check_targets, export_all, exported_data, exported_lines
    from se_inject.gates import excitations as measure
    from se_inject.gates import latency_beside, prune_blocks_, pruned_data, pruned_text
    from se_inject.tables import as_json
    from se_inject.tracing import example_of
    from se_inject.user_code import named

    check_targets(given["outputs"], force=given["force"], **conversion(given, "opset"))
    metric = None
    if given["metric"] is not None:
        place, _, attribute = given["metric"].rpartition(":")
        if not callable(metric := named(place, attribute)):
            raise OptionError(
                f"`{given['metric']}` is not a function", hint="it takes the network and returns a number"
            )
    network, batches = loaded(given)
    batches = limited(batches, given["limit"])
    example = example_inputs(given["inputs"], network)
    found = measure(network, batches, progress=progress("gates: "))
    before = copy.deepcopy(network)
    pruned = prune_blocks_(
        network,
        found,
        tolerance=given["tolerance"],
        metric=metric,
        example_inputs=example,
        progress=progress("pruning: "),
    )
    args, kwargs = example_of(network, example)
    latency = latency_beside(before, network, args, kwargs) if pruned.dropped else None
    del before
    exported = export_all(
        network,
        given["outputs"],
        args,
        example_kwargs=kwargs,
        force=given["force"],
        **conversion(given, "opset", "dynamic_size"),
    )
    for line in (*found.notes, *batches.all_notes()):
        note(f"note: {line}")
    if given["as_json"]:
        timed = None if latency is None else vars(latency)
        click.echo(
            as_json({**pruned_data(pruned), "latency": timed, "files": [exported_data(each) for each in exported]})
        )
    else:
        click.echo(pruned_text(pruned, given["style"]))
        for line in [latency_line(latency)] if latency is not None else []:
            click.echo(f"\n{line}", err=given["style"] == "csv")
        click.echo(
            "\n" + "\n".join(line for each in exported for line in exported_lines(each)), err=given["style"] == "csv"
        )


@click.command(cls=WorkerCommand, short_help="Compare networks A and B on the same data.")
@click.argument("models", nargs=2, metavar="A B")
@options.reading
@data
@click.option("--latency", is_flag=True, help="Measure both in turns.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def compare(**given: Any) -> None:
    """Compare two networks on the same data: with and without blocks, or with two ratios.

    Says how often they agree and, where there are labels, how accurate they are, with the standard error of the
    difference: nobody should take noise for gain.
    """
    from se_inject.cli.arguments import network_of
    from se_inject.gates import compare as measure
    from se_inject.gates import comparison_data, comparison_text
    from se_inject.tables import as_json

    first, second = given["models"]
    rest = {"arch": None, "weights": None, "entry": None}
    a, batches = loaded({**given, **rest, "model": first})
    b = network_of({**given, **rest, "model": second})
    batches = limited(batches, given["limit"])
    found = measure(a, b, batches, latency_seconds=3.0 if given["latency"] else 0.0, progress=progress())
    for line in batches.all_notes():
        note(f"note: {line}")
    click.echo(as_json(comparison_data(found)) if given["as_json"] else comparison_text(found))


def loaded(given: dict[str, Any]) -> tuple[nn.Module, Data]:
    """Load the network and the data that the options name."""
    from se_inject.cli.arguments import network_of
    from se_inject.gates import open_data, preprocessing_for

    network = network_of(given)

    def prepared() -> Any:
        return preprocessing_for(network, _shape(network, given["inputs"]), given["mean"], given["std"])

    return network, open_data(given["source"], prepared, batch=given["batch_size"])


def _shape(network: nn.Module, inputs: tuple[str, ...]) -> tuple[int, ...]:
    """Return the shape of the network's first input: as given, or as inferred."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    from se_inject.tracing import observe_model, parse_shape

    if inputs:
        return parse_shape(inputs[0])
    return next(tuple(leaf.shape) for leaf in tree_leaves(observe_model(network).inputs) if isinstance(leaf, Tensor))


def limited(batches: Data, limit: int | None) -> Data:
    """Limit the data to its first batches."""
    import itertools
    from dataclasses import replace

    if limit is None:
        return batches
    whole = replace(batches, count=None, batches=lambda: itertools.islice(iter(batches), limit))
    whole.skipped = batches.skipped
    return whole


def progress(what: str = "") -> Callable[[int, int | None], None]:
    """Say how far a pass over the data has come."""

    def show(done: int, whole: int | None) -> None:
        step(f"{what}{done:,} of {whole:,} examples" if whole else f"{what}{done:,} examples")

    return show
