"""Model → files, each checked against the eager network in its own runtime.

A file is written under a temporary name, loaded back by what will run it (ONNX Runtime, `torch.jit.load`,
`torch.export.load`, `torch.load`), run at batch 1, 2 and 5 and compared; only then does it appear. A format
can have several roads (a dynamic batch or a fixed one, scripting or tracing). The first whose file computes
what the network computes is taken; the result says which it was, and why not the one before.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._files import atomic_all, check_all_writable, no_space, write_in_one_go
from .errors import ExportError, OptionError

BATCHES = (1, 2, 5)
"""The batch sizes a file is run at, unless its batch is fixed."""

FORMATS = {
    ".onnx": "onnx",
    ".torchscript": "torchscript",
    ".ts": "torchscript",
    ".pt2": "pt2",
    ".pt": "pt",
    ".pth": "pt",
}
"""The format that each suffix chooses."""

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""The relative error allowed; the coarsest type among weights, inputs and outputs decides.

A runtime adds up in another order and folds batch norm into convolutions. Measured in ONNX Runtime with random
weights: in float32 at most 1.3e-6 (ResNets, DenseNet, EfficientNet, ConvNeXt, MobileNet) and 8e-6 (ResNet-50
with blocks that gate strongly); in float16 1.2e-3, about one rounding. Roughly ten times that leaves room for
what was not measured; a wrong operator or weight is off by far more. bfloat16 rounds eight times as coarsely.
"""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Check(NamedTuple):
    """The largest errors of a file at one batch size, over all outputs.

    The relative error is the largest absolute one over the largest absolute value of that output. For outputs
    of integers or booleans, both are the share of elements that differ.
    """

    batch: int
    max_abs_error: float
    max_rel_error: float


@dataclasses.dataclass(frozen=True)
class Exported:
    """A file that was written: how, what the comparison measured and allowed, and what to know about it."""

    path: Path
    format: str
    size_bytes: int
    how: str
    checks: tuple[Check, ...]
    tolerance: float
    notes: tuple[str, ...]


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: tuple[Any, ...],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory_format: str | torch.memory_format | None = None,
    force: bool = False,
    opset: int | None = None,
) -> Exported:
    """Write the network to a file whose suffix chooses the format, and check the file.

    Does not change the model. This is `export_all` for one file, with its arguments and errors.
    """
    (exported,) = export_all(
        model,
        [path],
        example_inputs,
        example_kwargs=example_kwargs,
        device=device,
        dtype=dtype,
        memory_format=memory_format,
        force=force,
        opset=opset,
    )
    return exported


def export_all(
    model: nn.Module,
    paths: Sequence[str | os.PathLike[str]],
    example_inputs: tuple[Any, ...],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory_format: str | torch.memory_format | None = None,
    force: bool = False,
    opset: int | None = None,
) -> list[Exported]:
    """Write the network to several files and check each; either all of them appear or none.

    Does not change the model: conversions are done on a copy, and what an exporter leaves behind is put back.
    `.onnx`, `.torchscript` and `.pt2` hold the network in eval mode, `.pt` the module with the modes it has.

    Args:
        model: an eager network.
        paths: the files; the suffix (see `FORMATS`) chooses the format.
        example_inputs: positional arguments of one call: tensors, or lists, tuples and dicts of them. The
            first dimension of the first tensor is the batch, and so is an equal one of any other tensor.
        example_kwargs: keyword arguments of that call.
        device: "cpu" or "cuda", if the file is for another one than the model is on.
        dtype: "float32", "float16" or "bfloat16", for the weights and for inputs in floating point.
        memory_format: "channels_last" or "contiguous", for weights and inputs of four dimensions.
        force: replace files that exist.
        opset: the ONNX opset; None for the exporter's own choice.

    Raises:
        OptionError: an unknown suffix, device, dtype or memory format.
        ExportError: a file can't be written, or no road leads to one that computes what the network computes.
    """
    to, formats = _checked(paths, device, dtype, memory_format, force)
    targets = [Path(path) for path in paths]
    with (
        atomic_all(targets, force) as temporary,
        _quiet(),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        network = _Network(model, to, opset, example_inputs, example_kwargs or {})
        return [_export_one(network, *each) for each in zip(targets, temporary, formats, strict=True)]


def check_targets(
    paths: Sequence[str | os.PathLike[str]],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory_format: str | torch.memory_format | None = None,
    force: bool = False,
) -> None:
    """Whether these files could be written and these conversions made here, before anything else is done.

    Raises:
        OptionError: an unknown suffix, device, dtype or memory format, or a file named twice.
        ExportError: a file can't be written, or there is no such device.
    """
    _checked(paths, device, dtype, memory_format, force)


def _checked(
    paths: Sequence[str | os.PathLike[str]], device: Any, dtype: Any, memory_format: Any, force: bool
) -> tuple[_To, list[str]]:
    targets = [Path(path) for path in paths]
    formats = [_format_of(target) for target in targets]
    check_all_writable(targets, force)
    to = _To(
        _device(device), _choice("dtype", dtype, _DTYPES), _choice("memory format", memory_format, _MEMORY_FORMATS)
    )
    return to, formats


class _Rejected(Exception):
    """A file that is not right; the message says how."""


class _To(NamedTuple):
    device: torch.device | None
    dtype: torch.dtype | None
    memory_format: torch.memory_format | None

    def tensor(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else None
        tensor = tensor.detach().to(device=self.device, dtype=dtype)
        if self.memory_format is not None and tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=self.memory_format)
        return tensor

    def model(self, model: nn.Module) -> nn.Module:
        """The model itself if nothing is asked for, else a converted copy."""
        if self == (None, None, None):
            return model
        model = copy.deepcopy(model).to(device=self.device, dtype=self.dtype)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = self.tensor(tensor)
        return model


_Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


class _Network:
    """The network, the calls its files are checked with, and what it answers: the same for every format."""

    def __init__(
        self, model: nn.Module, to: _To, opset: int | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.model = to.model(model)
        self.opset = opset
        self.signature = inspect.signature(self.model.forward)
        ordered = {name: kwargs[name] for name in self.signature.parameters if name in kwargs}
        self.example: _Call = args, {**ordered, **kwargs}  # the order in which exporters number the inputs
        self.to = to._replace(device=next((p.device for p in self.model.parameters()), to.device))
        sizes = [leaf.size(0) for leaf in pytree.tree_leaves(self.example) if isinstance(leaf, Tensor) and leaf.dim()]
        self.batch = sizes[0] if sizes else 1
        self.calls: dict[int, _Call] = {}
        self.answers: dict[int, list[tuple[str, Tensor]]] = {}
        self._observe(self.batch)
        self.fixed = None if sizes else "no input has a batch dimension"
        for batch in BATCHES if sizes else ():
            try:
                self._observe(batch)
            except ExportError as error:
                self.fixed = f"the network itself fails at batch {batch}: {_reason(error)}"
                break
        leaves = pytree.tree_leaves((self.calls, self.answers, list(self.model.parameters())))
        self.dtypes = {leaf.dtype for leaf in leaves if isinstance(leaf, Tensor)}
        coarsest = max(TOLERANCES.get(dtype, 0.0) for dtype in self.dtypes)
        if self.to.device is not None and self.to.device.type == "cuda":
            coarsest = max(coarsest, TOLERANCES[torch.float16])  # convolutions in TF32 round as float16 does
        self.tolerance = max(coarsest, TOLERANCES[torch.float32])

    def has_batch(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.size(0) == self.batch

    def _observe(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(batch)

        def resized(tensor: Tensor) -> Tensor:
            return self.to.tensor(_at_batch(tensor, batch, generator) if self.has_batch(tensor) else tensor)

        self.calls[batch] = pytree.tree_map_only(Tensor, resized, self.example)
        try:
            with _untouched(self.model):
                self.answers[batch] = list(_tensors(self.run(self.model.eval(), batch)))
        except Exception as error:
            raise ExportError(
                "the network's own forward fails on the example inputs",
                seen=_reason(error),
                hint="pass example inputs, of a shape and type that the network accepts",
            ) from error
        if not self.answers[batch]:
            raise ExportError("the network's output holds no tensor: there is nothing to compare a file with")

    def call(self, dynamic: bool) -> _Call:
        """What to export with; for a dynamic batch not at 1, which exporters take for a constant."""
        return _cloned(self.calls[BATCHES[-1] if dynamic else self.batch])

    def run(self, function: Callable[..., Any], batch: int) -> Any:
        """Call the network or a file; an operation in place spoils only a copy of the inputs."""
        args, kwargs = _cloned(self.calls[batch])
        return function(*args, **kwargs)

    def dynamic_shapes(self, dimension: Any) -> dict[str, Any]:
        """`dimension` for the batch of every input that has one, by the names of forward's parameters."""
        args, kwargs = self.example
        shapes: dict[str, Any] = pytree.tree_map(
            lambda leaf: {0: dimension} if self.has_batch(leaf) else None,
            dict(self.signature.bind(*args, **kwargs).arguments),
        )
        return shapes

    def check(self, run: Callable[..., Any], dynamic: bool, tolerance: float) -> Iterator[Check]:
        """Compare a file with the network; `_Rejected` when it computes something else."""
        for batch in BATCHES if dynamic else (self.batch,):
            want = self.answers[batch]
            check = Check(batch, *_difference(_tensors(self.run(run, batch)), want))
            if not check.max_rel_error <= tolerance:
                if max(_difference(_tensors(self.run(self.model.eval(), batch)), want)) > 0:
                    raise ExportError("the network's own output changes from call to call in eval mode")
                seen, allowed = f"{check.max_rel_error:.1e}", f"{tolerance:.0e}"
                raise _Rejected(f"relative error {seen} at batch {batch}, allowed {allowed}")
            yield check


class _Written(NamedTuple):
    how: str
    run: Callable[..., Any] | None
    """The file, loaded back, as a function of the network's arguments; None if it can't be run here."""
    notes: tuple[str, ...] = ()


def _export_one(network: _Network, target: Path, path: Path, format: str) -> Exported:
    exact = format == "pt" and network.to.device == torch.device("cpu")
    tolerance = 0.0 if exact else network.tolerance
    failures: list[str] = []
    for road, write, dynamic in _roads(network, format):
        try:
            with _untouched(network.model):
                written = write(network, path, dynamic)
                checks = tuple(network.check(written.run, dynamic, tolerance)) if written.run else ()
        except ExportError:
            raise
        except Exception as error:
            if no_space(error):
                raise
            cause, reason = error, _reason(error)
            if not any(failure.endswith(reason) for failure in failures):
                failures.append(f"{road} failed: {reason}")
            for leftover in path.parent.iterdir():
                leftover.unlink()
            continue
        how, notes = _described(network, written, format, dynamic, failures)
        files = sorted(path.parent.iterdir())
        notes += [f"its weights are in `{file.name}`: keep the two together" for file in files if file != path]
        size = sum(file.stat().st_size for file in files)
        return Exported(target, format, size, how, checks, tolerance, tuple(notes))
    others = ", ".join(sorted({*FORMATS.values()} - {format}))
    raise ExportError(
        f"cannot export to `{target}`",
        seen="\n      ".join(failures),
        hint=f"another format may do: {others}",
    ) from cause


def _roads(network: _Network, format: str) -> list[_Road]:
    """The ways to try, in order; where the network's own batch is fixed, each once and with a fixed batch."""
    if network.fixed is None:
        return _ROADS[format]
    with_fixed_twin = {write for _, write, dynamic in _ROADS[format] if not dynamic}
    roads = [road for road in _ROADS[format] if not (road[2] and road[1] in with_fixed_twin)]
    return [(name, write, False) for name, write, _ in roads]


def _described(
    network: _Network, written: _Written, format: str, dynamic: bool, failures: list[str]
) -> tuple[str, list[str]]:
    how, notes = written.how, [*written.notes]
    if format == "torchscript" and failures:
        how += f" ({failures[0]})"
    if format != "pt":
        how += ", dynamic batch" if dynamic else f", batch fixed at {network.batch}"
        notes += [] if dynamic else [f"batch fixed at {network.batch}: {network.fixed or failures[-1]}"]
    for name, tensor in network.answers[network.batch]:
        if lost := tensor.numel() - int(tensor.isfinite().sum()):
            notes.append(f"{lost} of {tensor.numel()} numbers in the network's own `{name}` are not finite")
    return how, notes


def _write_onnx(network: _Network, path: Path, dynamic: bool) -> _Written:
    import onnx
    from onnx_ir.traversal import RecursiveGraphIterator

    model = network.model.eval()
    # exporters know neither dataclasses nor numbers among the outputs; `_untouched` takes the hook away again
    model.register_forward_hook(lambda module, args, output: tuple(tensor for _, tensor in _tensors(output)))
    args, kwargs = network.call(dynamic)
    # convolutions in bfloat16 exist since opset 22, and optimize would fold batch norm into them in float32
    brain_float = torch.bfloat16 in network.dtypes
    program = torch.onnx.export(
        model,
        args if kwargs else (*args, {}),  # or else a last argument that is a dict is taken for the keywords
        kwargs=kwargs,
        dynamic_shapes=network.dynamic_shapes("batch") if dynamic else None,
        opset_version=network.opset or (22 if brain_float else None),
        optimize=not brain_float,
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise _Rejected("the exporter returned nothing")
    graph = program.model.graph
    nodes = list(RecursiveGraphIterator(graph))
    for node in nodes:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # would tell paths on this machine
    made = [value for node in nodes for value in node.outputs]
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values(), *made)}
    taken -= {value.name for value in graph.outputs}
    for value, (name, _) in zip(graph.outputs, network.answers[network.batch], strict=True):
        while name in taken:
            name += "_out"
        value.name = name
        taken.add(name)
    program.save(path, external_data=False)  # above 1.5 GB the weights go to a file beside it all the same
    onnx.checker.check_model(os.fspath(path), full_check=brain_float)
    imports = onnx.load(path, load_external_data=False).opset_import
    (opset,) = (entry.version for entry in imports if entry.domain in ("", "ai.onnx"))
    if network.opset not in (None, opset):
        raise _Rejected(f"opset {network.opset} was asked for, this exporter wrote {opset}")
    notes = ["ONNX has no memory format: the runtime chooses its own"] if network.to.memory_format else []
    run = None
    try:
        run = _in_onnxruntime(path)
    except Exception as error:
        kernel = re.search(r"NOT_IMPLEMENTED.* implementation for (\w+)", str(error))
        if kernel is None:
            raise
        notes.append(f"not compared: on the CPU, ONNX Runtime has no kernel for `{kernel[1]}` in this type")
    return _Written(f"dynamo exporter, opset {opset}", run, tuple(notes))


def _in_onnxruntime(path: Path) -> Callable[..., list[Tensor]]:
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong comes as an exception
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        feeds = {name: leaf.numpy(force=True) for name, leaf in zip(names, leaves, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return run


def _write_scripted(network: _Network, path: Path, dynamic: bool) -> _Written:
    return _write_torchscript(torch.jit.script(network.model.eval()), path, "scripted")


def _write_traced(network: _Network, path: Path, dynamic: bool) -> _Written:
    args, kwargs = network.call(dynamic)
    inputs: dict[str, Any] = {"example_inputs": args}
    if kwargs:  # a trace takes positions or names, not both
        inputs = {"example_kwarg_inputs": dict(network.signature.bind(*args, **kwargs).arguments)}
    model = network.model.eval()
    traced = torch.jit.trace(model, check_trace=False, strict=False, **inputs)  # type: ignore[no-untyped-call]
    return _write_torchscript(traced, path, "traced")


def _write_torchscript(module: Any, path: Path, how: str) -> _Written:
    write_in_one_go(path, lambda buffer: torch.jit.save(module, buffer))
    note = "PyTorch has deprecated TorchScript and recommends `.pt2`"
    return _Written(how, torch.jit.load(os.fspath(path)), (note,))  # type: ignore[no-untyped-call]


def _write_pt2(network: _Network, path: Path, dynamic: bool) -> _Written:
    args, kwargs = network.call(dynamic)
    shapes = network.dynamic_shapes(torch.export.Dim("batch")) if dynamic else None
    program = torch.export.export(network.model.eval(), args, kwargs, dynamic_shapes=shapes, strict=False)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # would tell paths on this machine
    write_in_one_go(path, lambda buffer: torch.export.save(program, buffer))
    note = "for inference: `torch.export.load(path).module()` runs it, and its `.train()` raises"
    return _Written("torch.export", torch.export.load(path).module(), (note,))


def _write_module(network: _Network, path: Path, dynamic: bool) -> _Written:
    model = network.model
    write_in_one_go(path, lambda buffer: torch.save(model, buffer))
    loaded = torch.load(path, weights_only=False)  # written a moment ago, so it may be trusted
    modes = [[(name, module.training) for name, module in net.named_modules()] for net in (model, loaded)]
    before, after = model.state_dict(), loaded.state_dict()
    same = before.keys() == after.keys() and all(_same(before[key], after[key]) for key in before)
    if not same or modes[0] != modes[1]:
        raise _Rejected("what is loaded back has other weights or modes")
    model.eval()
    note = f"a pickle: loading it needs the code of `{type(model).__module__}.{type(model).__qualname__}`"
    return _Written("whole module", loaded.eval(), (note,))


_Road = tuple[str, Callable[[_Network, Path, bool], _Written], bool]
"""A name, a writer, and whether the file's batch is left open."""

_ROADS: dict[str, list[_Road]] = {
    "onnx": [("dynamic batch", _write_onnx, True), ("fixed batch", _write_onnx, False)],
    "torchscript": [
        ("scripting", _write_scripted, True),
        ("tracing", _write_traced, True),
        ("tracing, fixed batch", _write_traced, False),
    ],
    "pt2": [("dynamic batch", _write_pt2, True), ("fixed batch", _write_pt2, False)],
    "pt": [("whole module", _write_module, True)],
}


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put back, afterwards, every module's attributes, flags, tables and hooks, and the buffers' values."""
    modules = [(vars(module), dict(vars(module))) for module in model.modules()]
    values = [value for _, saved in modules for value in saved.values()]
    tables = [(value, dict(value)) for value in values if isinstance(value, dict)]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for current, saved in (*modules, *tables):
            current.clear()
            current.update(saved)
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' warnings, log lines and prints from the user; their errors come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in an output of any structure, each with a name made of keys, fields and positions."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Tensor):
        yield name or "output", value
        return
    if isinstance(value, Mapping):
        items = value.items()
    elif dataclasses.is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, (list, tuple)):
        items = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    else:  # another container that torch knows, or nothing with tensors
        items = [(i, leaf) for i, leaf in enumerate(pytree.tree_leaves(value)) if isinstance(leaf, Tensor)]
    for key, item in items:
        prefix = name or ("output" if isinstance(key, int) else "")
        yield from _tensors(item, f"{prefix}_{key}" if prefix else str(key))


def _difference(got: Iterable[tuple[str, Tensor]], want: Iterable[tuple[str, Tensor]]) -> tuple[float, float]:
    """The largest absolute and the largest relative error over all outputs; see `Check`."""
    ours = [tensor.detach().cpu() for _, tensor in got]
    theirs = [tensor.detach().cpu() for _, tensor in want]
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (ours, theirs)]
        raise _Rejected(f"outputs of shapes {shapes[0]}, the network's are {shapes[1]}")
    worst = [(0.0, 0.0)]
    for a, b in zip(ours, theirs, strict=True):
        if not (b.is_floating_point() or b.is_complex()):
            worst.append(((a != b).double().mean().item(),) * 2 if b.numel() else (0.0, 0.0))
            continue
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            worst.append((float("inf"), float("inf")))
        elif finite.any():
            wide = torch.promote_types(b.dtype, torch.float64)
            error = (a.to(wide) - b.to(wide))[finite].abs().max().item()
            worst.append((error, error / (b[finite].abs().max().item() or 1.0)))
    return max(absolute for absolute, _ in worst), max(relative for _, relative in worst)


def _at_batch(tensor: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """The same kind of values at another batch size: rows repeated, or drawn anew if in floating point."""
    rows = tensor[torch.arange(batch, device=tensor.device) % tensor.size(0)]
    if not tensor.is_floating_point() or not tensor.numel():
        return rows
    values = tensor.detach().flatten()
    if (values == values[0]).all():  # zeros or ones tell little
        return rows + torch.randn(rows.shape, generator=generator).to(rows)
    if batch == tensor.size(0):
        return tensor
    return values[torch.randint(len(values), rows.shape, generator=generator).to(tensor.device)]


def _cloned(call: _Call) -> _Call:
    clone: _Call = pytree.tree_map_only(Tensor, torch.clone, call)
    return clone


def _same(before: Any, after: Any) -> bool:
    if not isinstance(before, Tensor):
        return bool(before == after)
    return before.dtype == after.dtype and torch.equal(before.nan_to_num(), after.nan_to_num())


def _reason(error: BaseException) -> str:
    """The line of an exception that says most: of its root cause, without colours and advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line] or [""]
    if lines[0].startswith("Constraints violated"):  # torch.export: what was violated comes after
        lines = [line.removeprefix("- ") for line in lines if line.startswith("- ")] or lines
    line = lines[0] if isinstance(error, (_Rejected, ExportError)) else f"{type(error).__name__}: {lines[0]}"
    return line.rstrip(": ")[:200]


def _format_of(path: Path) -> str:
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise OptionError(
            f"no export format has the suffix of `{path}`",
            seen=f"suffix `{path.suffix}`",
            hint=f"known: {' '.join(FORMATS)}",
        ) from None


def _choice(what: str, value: Any, known: Mapping[str, Any]) -> Any:
    if value is None or value in known.values():
        return value
    if value in known:
        return known[value]
    raise OptionError(f"no such {what} to export to", seen=str(value), hint=f"known: {', '.join(known)}")


def _device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = torch.device("meta")
    if wanted.type not in ("cpu", "cuda"):
        raise OptionError("no such device to export to", seen=str(device), hint="known: cpu, cuda, cuda:1 and so on")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        raise ExportError(
            f"asked for {wanted}, this machine has {count or 'none'}",
            hint="export on the CPU: an ONNX file made there runs on a GPU as well, through onnxruntime-gpu",
        )
    return wanted
