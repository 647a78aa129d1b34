"""Steps → an injected model, and back. Nothing else in this package changes a model.

The one mutation is a class swap: an owner's ``__class__`` becomes a generated subclass of its own class whose
forward is the edited one, and the block becomes a child of the owner. Everything that can go wrong is found
before that, and if something does go wrong after all, the owners already swapped are put back.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from se_inject._tracer import Untraceable
from se_inject.blocks import build_block
from se_inject.bodies import encoded, generated_class, graph_data, original_class
from se_inject.errors import InjectError, SurgeryError
from se_inject.operations import labels, returned
from se_inject.tracing import Trace


@dataclass(frozen=True)
class Step:
    """One block at one site: what a plan is made of, as plain data.

    Args:
        site: the site's address.
        owner: path of the module whose forward is edited.
        value: label of the gated value in its graph; None: what it returns.
        channels: C at the site.
        rank: number of spatial dimensions at the site.
        block: name of the block.
        options: the block's options.
        init: how the block starts: ``identity`` or ``paper``.
        block_name: the attribute that the block becomes on the owner.
        stage: number of the site's stage.
        size: spatial size of the value in the observed call.
        position: where the block sits relative to its unit.
        readers: labels of the nodes that read the gated value; None: all that read the value.
    """

    site: str
    owner: str
    value: str | None
    channels: int
    rank: int
    block: str
    options: dict[str, Any] = field(default_factory=dict)
    init: str = "identity"
    block_name: str = "se"
    stage: int | None = None
    size: tuple[int, ...] = ()
    position: str = "standard"
    readers: tuple[str, ...] | None = None

    @property
    def path(self) -> str:
        """Where the block is in the injected model."""
        return f"{self.owner}.{self.block_name}" if self.owner else self.block_name

    def to_data(self) -> dict[str, Any]:
        """The step as a dict that JSON can hold."""
        readers = None if self.readers is None else list(self.readers)
        return {**asdict(self), "size": list(self.size), "readers": readers}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Step:
        """The step again from what ``to_data`` gave."""
        readers = None if data.get("readers") is None else tuple(data["readers"])
        return cls(**{**data, "size": tuple(data["size"]), "readers": readers})


@dataclass
class _Operation:
    """All that is needed to change one owner."""

    owner: nn.Module
    generated: type
    blocks: dict[str, nn.Module]
    was_none: dict[str, str]


def inject_(model: nn.Module, trace: Trace, steps: Iterable[Step]) -> nn.Module:
    """Put the blocks of these steps into the model itself. No weight of the model is touched or copied.

    Args:
        model: the traced model, or a copy of it.
        trace: an observed call of it.
        steps: what to put where; blocks at one value act in the order of the steps.

    Raises:
        SurgeryError: a step does not fit; the model is as it was.
    """
    by_owner: dict[str, list[Step]] = {}
    for step in steps:
        by_owner.setdefault(step.owner, []).append(step)
    operations = [_prepare(model, trace, path, group) for path, group in by_owner.items()]
    done: list[tuple[_Operation, type]] = []
    try:
        for operation in operations:
            done.append((operation, type(operation.owner)))
            for name, block in operation.blocks.items():
                setattr(operation.owner, name, block)
            operation.owner.__class__ = operation.generated
    except Exception as error:
        for operation, before in reversed(done):
            _restore(operation.owner, before, list(operation.blocks), operation.was_none)
        if isinstance(error, InjectError):
            raise
        raise SurgeryError(
            f"a {type(done[-1][0].owner).__name__} can't take another forward",
            seen=f"{type(error).__name__}: {error}",
        ) from error
    return model


def eject_(model: nn.Module) -> nn.Module:
    """Take every block of ours out again: the original classes, keys and outputs, bit for bit.

    A model without blocks is returned as it is.
    """
    for path, module in model.named_modules():
        if body_of(module) is not None and "_se_inject_body" not in type(module).__dict__:
            raise SurgeryError(
                f"`{path}` has become a {type(module).__name__} since blocks were put into it",
                hint="undo that first: remove its parametrizations, or eject before wrapping",
            )
    for module in list(model.modules()):
        body = body_of(module)
        if body is not None:
            names = [step["block_name"] for step in body["steps"]]
            _restore(module, type(module)._se_inject_original, names, body["was_none"])  # type: ignore[attr-defined]
    return model


def body_of(module: nn.Module) -> dict[str, Any] | None:
    """The body of a generated class; None for a module that holds no block of ours."""
    text = type(module).__dict__.get("_se_inject_body") or getattr(type(module), "_se_inject_body", None)
    return json.loads(text) if text else None


def steps_of(model: nn.Module) -> tuple[Step, ...]:
    """The steps that were applied to this model, read from the model itself."""
    found = []
    for path, module in model.named_modules():
        body = body_of(module)
        for data in body["steps"] if body else ():
            site = data["site"] if not data["site"].startswith(".") else path + data["site"]
            found.append(Step.from_data({**data, "owner": path, "site": site.lstrip(".")}))
    return tuple(found)


def injected_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every block of ours in a model."""
    for step in steps_of(model):
        yield step.path, model.get_submodule(step.path)


def _restore(owner: nn.Module, original: type, names: list[str], was_none: dict[str, str]) -> None:
    for name in names:
        if was_none.get(name) == "module":
            owner._modules[name] = None
        elif name in owner._modules:
            delattr(owner, name)
        if was_none.get(name) == "attribute":
            setattr(owner, name, None)
    owner.__class__ = original


def _prepare(model: nn.Module, trace: Trace, path: str, steps: list[Step]) -> _Operation:
    """Everything for one owner, with nothing changed yet."""
    try:
        owner = model.get_submodule(path)
    except AttributeError as error:
        raise SurgeryError(f"the plan has a block in `{path}`", seen="the model has no such module") from error
    before = body_of(owner)
    original = original_class(owner)
    was_none = dict(before["was_none"]) if before else {}
    earlier = [Step.from_data(step) for step in before["steps"]] if before else []
    for step in steps:
        if hasattr(owner, step.block_name):
            if getattr(owner, step.block_name) is not None:
                raise SurgeryError(
                    f"`{step.path}` is to become a block",
                    seen=f"{type(owner).__name__} has an attribute of that name",
                    hint="choose another name with `name=` in Python, `--name` on the command line",
                )
            was_none[step.block_name] = "module" if step.block_name in owner._modules else "attribute"
    kept = [replace(step, owner="", site=_relative(step.site, path)) for step in (*earlier, *steps)]
    body: dict[str, Any] = {
        "steps": [step.to_data() for step in kept],
        "output": all(step.value is None for step in kept),
        "eval": None,
        "train": None,
        "constants": {},
        "settings": {},
        "was_none": was_none,
    }
    if body["output"] and was_none:
        # the original forward, which still runs, would find its attribute taken
        raise SurgeryError(
            f"`{path}` reads an attribute of the name the block is to get: `{next(iter(was_none))}`",
            hint="choose another name with `name=` in Python, `--name` on the command line",
        )
    if not body["output"]:
        _write_graphs(body, trace, path, steps)
    blocks = {step.block_name: _surrounded(owner, model, step) for step in steps}
    try:
        generated = generated_class(original, json.dumps(body))
    except InjectError:
        raise
    except Exception as error:
        raise SurgeryError(
            f"no subclass of {original.__name__} (`{path}`) can be made", seen=f"{type(error).__name__}: {error}"
        ) from error
    return _Operation(owner, generated, blocks, was_none)


def _relative(site: str, path: str) -> str:
    """A site's address within its owner, so that equal owners have equal bodies."""
    return site[len(path) :] if path and site.startswith(path + ".") else site


def _write_graphs(body: dict[str, Any], trace: Trace, path: str, steps: list[Step]) -> None:
    """Fill in the edited graphs, for eval and, where the owner looks at its mode, for training."""
    owner = trace.graphs.get(path)
    if owner is None:
        raise SurgeryError(
            f"the forward of `{path}` can't be edited", seen=trace.failures.get(path, "it was not called")
        )
    try:
        body["eval"] = graph_data(_edited(owner.graph, owner.guards, steps))
        if owner.reads_training:
            training, guards = trace.training_graph(owner)
            if _text(training) != _text(owner.graph):
                body["train"] = graph_data(_edited(training, guards, steps))
        body["settings"] = {name: encoded(value) for name, value in owner.settings.items()}
        body["constants"] = {name: encoded(value) for name, value in owner.constants.items()}
    except (SurgeryError, Untraceable) as error:
        message = error.message if isinstance(error, SurgeryError) else str(error)
        raise SurgeryError(f"the forward of `{path}` can't be edited", seen=message) from error


def _text(graph: fx.Graph) -> list[str]:
    return [node.format_node() or "" for node in graph.nodes]


def _edited(graph: fx.Graph, guards: list[tuple[fx.Node, bool]], steps: list[Step]) -> fx.Graph:
    """A copy of the graph in which every step's value goes through its block, for all who read it."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = copy.graph_copy(graph, mapping)
    copy.output(output)
    names = {label: mapping[node] for node, label in labels(graph).items() if node in mapping}
    result = returned(graph)
    for step in steps:
        value = mapping[result] if step.value is None and result is not None else names.get(step.value or "")
        if value is None:
            raise SurgeryError(f"its forward has no value `{step.value}` in training mode")
        if step.readers is None:
            _gate(copy, value, step.block_name)
        else:
            _gate_for(copy, value, step.block_name, [names[reader] for reader in step.readers])
    for node, answer in guards:
        _assert(copy, mapping[node], answer)
    return copy


def _gate(graph: fx.Graph, value: fx.Node, block_name: str) -> None:
    users = list(value.users)
    after = value
    for user in users:  # chain behind the blocks that are there already
        if user.op == "call_module" and user.meta.get("block"):
            return _gate(graph, user, block_name)
    with graph.inserting_after(after):
        gated = graph.call_module(block_name, (value,))
    gated.meta["block"] = True
    for user in users:
        user.replace_input_with(value, gated)
    return None


def _gate_for(graph: fx.Graph, value: fx.Node, block_name: str, readers: list[fx.Node]) -> None:
    """Let only these nodes read the gated value."""
    with graph.inserting_before(readers[0]):
        gated = graph.call_module(block_name, (value,))
    gated.meta["block"] = True
    for reader in readers:
        reader.replace_input_with(value, gated)


def _assert(graph: fx.Graph, condition: fx.Node, answer: bool) -> None:
    """Check that a condition that the traced branch depends on still has its answer."""
    with graph.inserting_after(condition):
        if not answer:
            condition = graph.call_function(operator.not_, (condition,))
    with graph.inserting_after(condition):
        graph.call_function(torch._assert, (condition, "the input's shape takes another branch than the one edited"))


def _surrounded(owner: nn.Module, model: nn.Module, step: Step) -> nn.Module:
    """A new block with the dtype, device, memory format and mode of the modules around it."""
    with torch.inference_mode(False):
        block = build_block(step.block, step.channels, step.size, step.options, step.init)
    near = next((p for p in (*owner.parameters(), *model.parameters()) if p.is_floating_point()), None)
    if near is not None:
        block = block.to(device=near.device, dtype=near.dtype)
    last = torch.channels_last
    if step.rank == 2 and any(
        p.dim() == 4 and p.is_contiguous(memory_format=last) and not p.is_contiguous() for p in owner.parameters()
    ):
        block = block.to(memory_format=last)  # type: ignore[call-overload]
    return block.train(owner.training)
