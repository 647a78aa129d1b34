"""The network as an ONNX file, and the file as a function again."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from se_inject.errors import ExportError
from se_inject.exporting.reference import Network, Written
from se_inject.verification import Rejected, tensors


def write_onnx(network: Network, path: Path, dynamic: bool) -> Written:
    """Through torch's dynamo exporter to one file, checked by ONNX itself and loaded into ONNX Runtime."""
    # convolutions in bfloat16 exist since opset 22, and optimize would fold batch norm into them in float32
    brain_float = torch.bfloat16 in network.dtypes
    program = _exported(network, dynamic, network.opset or (22 if brain_float else None), optimize=not brain_float)
    _forget_paths(program)
    _name_outputs(program, [name for name, _ in network.answers[network.batch]])
    program.save(path, external_data=False)  # above 1.5 GB the weights go to a file beside it all the same
    opset = _checked_opset(path, full_check=brain_float)
    if network.opset not in (None, opset):
        raise ExportError(
            f"opset {network.opset} was asked for, this exporter wrote {opset}",
            hint="leave the opset out for the exporter's own choice",
        )
    notes = ["ONNX has no memory format: the runtime chooses its own"] if network.conversion.memory_format else []
    run = None
    try:
        run = _in_onnxruntime(path)
    except Exception as error:
        kernel = re.search(r"NOT_IMPLEMENTED.* implementation for (\w+)", str(error))
        if kernel is None:
            raise
        notes.append(f"not compared: on the CPU, ONNX Runtime has no kernel for `{kernel[1]}` in this type")
    return Written(f"dynamo exporter, opset {opset}", run, tuple(notes))


def _exported(network: Network, dynamic: bool, opset: int | None, optimize: bool) -> Any:
    model = network.model.eval()
    # exporters know neither dataclasses nor numbers among the outputs; `untouched` takes the hook away again
    model.register_forward_hook(lambda module, args, output: tuple(tensor for _, tensor in tensors(output)))
    args, kwargs = network.call(dynamic)
    program = torch.onnx.export(
        model,
        args if kwargs else (*args, {}),  # or else a last argument that is a dict is taken for the keywords
        kwargs=kwargs,
        dynamic_shapes=network.dynamic_shapes("batch") if dynamic else None,
        opset_version=opset,
        optimize=optimize,
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise Rejected("the exporter returned nothing")
    return program


def _forget_paths(program: Any) -> None:
    """Take out the stack traces, which would tell paths on this machine."""
    from onnx_ir.traversal import RecursiveGraphIterator

    for node in RecursiveGraphIterator(program.model.graph):
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)


def _name_outputs(program: Any, names: list[str]) -> None:
    """Give the outputs these names, with a suffix where another value has one already."""
    from onnx_ir.traversal import RecursiveGraphIterator

    graph = program.model.graph
    made = [value for node in RecursiveGraphIterator(graph) for value in node.outputs]
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values(), *made)}
    taken -= {value.name for value in graph.outputs}
    for value, name in zip(graph.outputs, names, strict=True):
        while name in taken:
            name += "_out"
        value.name = name
        taken.add(name)


def _checked_opset(path: Path, full_check: bool) -> int:
    """The opset of a file that ONNX's own checker accepts."""
    import onnx

    onnx.checker.check_model(os.fspath(path), full_check=full_check)
    imports = onnx.load(path, load_external_data=False).opset_import
    (opset,) = (entry.version for entry in imports if entry.domain in ("", "ai.onnx"))
    return int(opset)


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
