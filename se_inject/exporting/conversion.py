"""Choose the format of a file, and the device, dtype and memory format of the network in it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from se_inject.errors import ExportError, OptionError, either
from se_inject.tracing import duplicate, rehearsed

FORMATS = {
    ".onnx": "onnx",
    ".torchscript": "torchscript",
    ".ts": "torchscript",
    ".pt2": "pt2",
    ".pt": "pt",
    ".pth": "pt",
}
"""The format that each suffix chooses."""

BLOCKS_ALONE = (".safetensors", ".json")
"""Suffixes of files that hold the blocks' weights, or the plan, without a network; the command line writes them."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Conversion(NamedTuple):
    """The device, dtype and memory format that a network and its inputs are converted to; None leaves them as they are."""

    device: torch.device | None
    dtype: torch.dtype | None
    memory_format: torch.memory_format | None

    @classmethod
    def asked(cls, device: Any, dtype: Any, memory_format: Any) -> Conversion:
        """Make a conversion from a user's options.

        Raises:
            OptionError: there is no such device, dtype or memory format.
            ExportError: the device is not in this machine.
        """
        return cls(
            _device(device), _choice("dtype", dtype, _DTYPES), _choice("memory format", memory_format, _MEMORY_FORMATS)
        )

    def on(self, model: nn.Module) -> Conversion:
        """Return the same conversion with the network's own device."""
        return self._replace(device=next((p.device for p in model.parameters()), self.device))

    def tensor(self, tensor: Tensor) -> Tensor:
        """Convert an input or a weight."""
        dtype = self.dtype if tensor.is_floating_point() else None
        tensor = tensor.detach().to(device=self.device, dtype=dtype)
        if self.memory_format is not None and tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=self.memory_format)
        return tensor

    def model(self, model: nn.Module) -> nn.Module:
        """Make a twin with the model's own parameters if nothing is asked for, else a converted copy; the model is not called."""
        if self == (None, None, None):
            return rehearsed(model)
        model = duplicate(model).to(device=self.device, dtype=self.dtype)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = self.tensor(tensor)
        return model


def _suffixes(path: Path) -> str:
    """Suggest the suffix that may be meant, and list all there are."""
    known = [*FORMATS, *(either(suffix, "") for suffix in BLOCKS_ALONE)]
    close = difflib.get_close_matches(path.suffix.lower(), known, n=1, cutoff=0.5)
    meant = f"did you mean `{path.with_suffix(close[0])}`? " if close else ""
    return f"{meant}known: {' '.join(filter(None, known))}"


def format_of(path: Path) -> str:
    """Choose a format by a file's suffix.

    Raises:
        OptionError: it chooses none.
    """
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise OptionError(
            f"no export format has the suffix of `{path}`",
            seen=f"suffix `{path.suffix}`" if path.suffix else "it has none",
            hint=_suffixes(path),
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
            f"asked for {wanted}, torch finds {count or 'none'} here",
            seen=None if torch.version.cuda or torch.version.hip else "this torch is a build for the CPU alone",
            hint="export on the CPU: an ONNX file made there runs on a GPU as well, through onnxruntime-gpu",
        )
    return wanted
