"""Read the command line's DATA into batches: a folder of images, an array file, or a function of the user's.

Reading decodes images and unpickles nothing: ``.pt`` files are read as weights alone, ``.npz`` files without objects.
The one form that runs code is ``file.py:function``, which the user named.
"""

from __future__ import annotations

import importlib
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import DataError, OptionError, either
from se_inject.tables import counted
from se_inject.user_code import NoSuchFile, fact, named

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
"""The files in a folder that are taken for images."""
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the colours, by which most networks for photographs expect them normalised."""
_FORMS = "a folder of images (one folder for each class), an .npz or .pt file of arrays, or file.py:function"


@dataclass(frozen=True)
class Preprocessing:
    """How images become tensors: colours scaled to 0 … 1, resized, cropped in the centre, and normalised.

    Args:
        channels: 1 or 3.
        size: height and width; None: as the images are.
        mean: subtracted from each colour.
        std: what each colour is divided by.
    """

    channels: int = 3
    size: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]

    def __str__(self) -> str:
        size = "" if self.size is None else f"resized and cropped to {self.size[0]}×{self.size[1]}, "
        numbers = [", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std)]
        return f"images are scaled to 0 … 1, {size}minus ({numbers[0]}), divided by ({numbers[1]})"

    def normalised(self, images: Tensor) -> Tensor:
        """Normalise images of bytes, (N, C, H, W), for the network; other numbers are left as they are."""
        if images.dtype != torch.uint8:
            return images
        shape = (1, -1, *[1] * (images.dim() - 2))
        mean, std = (torch.tensor(values).reshape(shape) for values in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


def preprocessing_for(
    model: nn.Module, shape: Sequence[int], mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Preprocessing:
    """Find out how images are to be prepared for a network.

    Args:
        model: the network; timm's say how their images are normalised.
        shape: of its input, (N, C, H, W).
        mean: of each colour; None: what the network says, else ImageNet's for three colours and 0.5 for others.
        std: likewise.

    Raises:
        OptionError: the network takes no images, or there are not as many numbers as colours.
    """
    if len(shape) != 4:
        raise OptionError(
            "this network takes no images",
            seen=f"its input has the shape {'×'.join(map(str, shape))}",
            hint=either(
                "give arrays or file.py:function as `--data`", "give tensors, or arrays in a file, as the batches"
            ),
        )
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    own = [config.get(key) for key in ("mean", "std")] if isinstance(config, dict) else [None, None]
    colours = shape[1]
    general = IMAGENET if colours == 3 else ((0.5,) * colours, (0.5,) * colours)
    chosen = []
    for asked, stated, usual in zip((mean, std), own, general, strict=True):
        values = tuple(map(float, asked or (stated if _are_numbers(stated, colours) else usual)))  # type: ignore[arg-type]
        if len(values) != colours or not all(map(math.isfinite, values)):
            raise OptionError(f"{counted(len(values), 'number')} for {counted(colours, 'colour')}", seen=str(values))
        chosen.append(values)
    if 0 in chosen[1]:
        raise OptionError("a standard deviation of 0 can't be divided by", seen=str(chosen[1]))
    return Preprocessing(colours, (shape[2], shape[3]), *chosen)


def _are_numbers(stated: Any, count: int) -> bool:
    """Return whether what a network says is so many numbers."""
    return isinstance(stated, tuple | list) and len(stated) == count and all(type(n) in (int, float) for n in stated)


@dataclass
class Data:
    """Batches that can be gone through several times.

    Args:
        source: what the user named.
        count: how many examples there are; None if that is known only at the end.
        classes: the names of the classes; empty if there are no labels or no names.
        notes: what the user should know about how it is read.
        skipped: what could not be read, with the reason; filled while the data is gone through.
    """

    source: str
    count: int | None
    classes: tuple[str, ...]
    notes: list[str]
    batches: Callable[[], Iterator[Any]]
    skipped: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        return self.batches()

    def all_notes(self) -> list[str]:
        """Return the notes, including the images that were skipped so far."""
        lines = [f"skipped {name}: {reason}" for name, reason in list(self.skipped.items())[:5]]
        if len(self.skipped) > 5:
            lines.append(f"skipped {len(self.skipped) - 5} more; {len(self.skipped)} images can't be read")
        return [*self.notes, *lines]


def open_data(source: str, preprocessing: Callable[[], Preprocessing], *, batch: int = 32) -> Data:
    """Recognise the kind of DATA and open it. Images are read later, batch by batch.

    Args:
        source: a folder with one folder of images for each class, or of images; an ``.npz`` or ``.pt`` file; or
            ``file.py:function``, a function without arguments that returns batches.
        preprocessing: says how images are prepared; called for images and arrays of bytes alone.
        batch: examples in a batch; a function makes its own.

    Raises:
        NoSuchFile: there is no such file or folder.
        DataError: it holds no image or array, or is of another form.
    """
    if batch < 1:
        raise OptionError("a batch needs at least one example", seen=f"batch size {batch}")
    path = Path(source)
    if path.is_dir():
        return _folder(path, preprocessing(), batch)
    place, _, attribute = source.rpartition(":")
    if place and attribute and not path.exists():
        return _function(source, place, attribute)
    if not path.exists():
        raise NoSuchFile(f"no file or folder `{source}`", hint=_FORMS)
    if path.suffix.lower() in (".npz", ".npy", ".pt", ".pth"):
        return _arrays(path, preprocessing, batch)
    raise DataError(f"`{source}` can't be read as data", seen=f"a file with the suffix `{path.suffix}`", hint=_FORMS)


# -- a folder of images ------------------------------------------------------------------------------------


def _folder(path: Path, preprocessing: Preprocessing, batch: int) -> Data:
    check_pillow(f"images in `{path}`")
    names = sorted(each.name for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
    found = [(file, number) for number, name in enumerate(names) for file in _images(path / name, "**/*")]
    notes = []
    if not found:
        found, names = [(file, -1) for file in _images(path, "*")], []
    else:
        if loose := len(_images(path, "*")):
            notes.append(f"left out: {counted(loose, 'image')} beside the folders of classes")
        counts = [sum(number == each for _, number in found) for each in range(len(names))]
        if empty := [name for name, count in zip(names, counts, strict=True) if not count]:
            notes.append(f"left out: {counted(len(empty), 'folder')} without images, `{empty[0]}` the first")
            kept = [number for number, count in enumerate(counts) if count]
            found = [(file, kept.index(number)) for file, number in found]
            names = [names[number] for number in kept]
    if not found:
        raise DataError(
            f"no images in `{path}`",
            seen=f"no file that ends in {', '.join(sorted(SUFFIXES)[:6])}, …",
            hint=_FORMS,
        )
    notes.append(str(preprocessing))
    data = Data(str(path), len(found), tuple(names), notes, lambda: iter(()))
    data.batches = lambda: _read_folder(data, found, preprocessing, batch)
    return data


def _images(folder: Path, pattern: str) -> list[Path]:
    return sorted(file for file in folder.glob(pattern) if file.suffix.lower() in SUFFIXES and file.is_file())


def _read_folder(
    data: Data, found: list[tuple[Path, int]], preprocessing: Preprocessing, batch: int
) -> Iterator[tuple[Tensor, Tensor] | Tensor]:
    images: list[Tensor] = []
    labels: list[int] = []
    read = 0
    for file, label in found:
        try:
            images.append(_image(file, preprocessing))
        except Exception as error:  # Pillow's decoders raise what they like
            data.skipped[str(file)] = fact(error)
            continue
        labels.append(label)
        read += 1
        if len(images) == batch:
            yield _stacked(images, labels)
            images, labels = [], []
    if images:
        yield _stacked(images, labels)
    if not read:
        name, reason = next(iter(data.skipped.items()))
        raise DataError(f"none of {counted(len(found), 'image')} could be read", seen=f"{name}: {reason}")


def _stacked(images: list[Tensor], labels: list[int]) -> tuple[Tensor, Tensor] | Tensor:
    if len({image.shape for image in images}) > 1:
        raise DataError(
            "images of different sizes in one batch",
            hint=either(
                "give a size: `--input 3x224x224`",
                "resize them to one size, or give `example_inputs` of the size they are to have",
            ),
        )
    return torch.stack(images) if labels[0] < 0 else (torch.stack(images), torch.tensor(labels))


def _image(file: Path, preprocessing: Preprocessing) -> Tensor:
    """Read one image as a tensor, (C, H, W): the shorter side resized so that the crop takes seven eighths of it."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as opened:
            image = opened.convert("RGB" if preprocessing.channels == 3 else "L")
    if preprocessing.size is not None:
        height, width = preprocessing.size
        factor = max(height / image.height, width / image.width) * 8 / 7
        size = max(width, round(image.width * factor)), max(height, round(image.height * factor))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = flat.reshape(1, image.height, image.width, -1).permute(0, 3, 1, 2)
    if pixels.shape[1] != preprocessing.channels:
        pixels = pixels.expand(-1, preprocessing.channels, -1, -1)
    return preprocessing.normalised(pixels)[0]


def check_pillow(what: str) -> None:
    """Ask whether Pillow is there, which reads images.

    Raises:
        DataError: it is not.
    """
    try:
        importlib.import_module("PIL.Image")
    except ImportError as error:
        raise DataError(
            f"{what} can't be read", seen="Pillow is not installed", hint="pip install 'se-inject[images]'"
        ) from error


# -- arrays ------------------------------------------------------------------------------------------------


def _arrays(path: Path, preprocessing: Callable[[], Preprocessing], batch: int) -> Data:
    arrays = _read_arrays(path)
    usual = [key for key in ("images", "x", "inputs", "data", "arr_0", "0") if key in arrays]
    images = next(iter([*usual, *(key for key, value in arrays.items() if value.dim() > 1)]), None)
    if images is None:
        raise DataError(f"`{path}` holds no array of examples", seen=", ".join(arrays) or "nothing", hint=_FORMS)
    values, notes = arrays[images], []
    keys = ("labels", "y", "label", "targets", "arr_1", "1")
    labels = next((arrays[key] for key in keys if key in arrays and _fits(arrays[key], len(values))), None)
    if labels is None and any(key in arrays for key in keys):
        notes.append("left out: labels that are not one whole number for each example")
    if not len(values):
        raise DataError(f"`{path}` holds no example", seen=f"`{images}` of shape {tuple(values.shape)}")
    if values.dtype == torch.uint8:
        prepared = preprocessing()
        if values.dim() == 3:
            values = values[:, None]
        if values.dim() == 4 and values.shape[1] != prepared.channels and values.shape[3] == prepared.channels:
            values = values.permute(0, 3, 1, 2)
            notes.append("the colours are the last dimension of the images, and become the second")
        notes.append(str(Preprocessing(prepared.channels, None, prepared.mean, prepared.std)))
    else:
        prepared = Preprocessing()
        values = values.float() if values.dtype == torch.float64 else values

    def batches() -> Iterator[Any]:
        for start in range(0, len(values), batch):
            part = prepared.normalised(values[start : start + batch])
            yield part if labels is None else (part, labels[start : start + batch])

    return Data(str(path), len(values), (), notes, batches)


def _fits(labels: Tensor, count: int) -> bool:
    return labels.dim() == 1 and len(labels) == count and not labels.is_floating_point() and labels.dtype != torch.bool


def _read_arrays(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix.lower() in (".npz", ".npy"):
            import numpy

            with open(path, "rb") as file:
                found = numpy.load(file, allow_pickle=False)
                with_names = dict(found) if hasattr(found, "files") else {"images": found}
            return {key: torch.from_numpy(value) for key, value in with_names.items() if value.dtype.kind in "fiub"}
        content: Any = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, ValueError, RuntimeError, TypeError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"`{path}` can't be read as arrays", seen=fact(error), hint=_FORMS) from error
    except Exception as error:  # the unpickler of weights raises its own kinds
        raise DataError(
            f"`{path}` holds more than tensors", seen=fact(error), hint="torch.save((images, labels), 'data.pt')"
        ) from error
    if isinstance(content, Tensor):
        content = {"images": content}
    elif isinstance(content, list | tuple):
        content = {str(number): value for number, value in enumerate(content)}
    if not isinstance(content, dict):
        raise DataError(f"`{path}` holds no tensors", seen=f"a {type(content).__name__}", hint=_FORMS)
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


# -- a function of the user's ------------------------------------------------------------------------------


def _function(source: str, place: str, attribute: str) -> Data:
    found = named(place, attribute)

    def batches() -> Iterator[Any]:
        made = found() if callable(found) else found
        try:
            return iter(made)
        except TypeError as error:
            raise DataError(f"`{source}` gave no batches", seen=f"a {type(made).__name__}", hint=_FORMS) from error

    return Data(source, None, (), [], batches)
