"""Modules of a program that can't be made ordinary modules, and stay within the network as they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from se_inject.errors import LoadError


class Leaves:
    """The modules of one program that stay as they are.

    Args:
        program: what the program is: "a TorchScript archive".
        what: what such a module is: "TorchScript".
    """

    def __init__(self, program: str, what: str) -> None:
        self.program = program
        self.what = what
        self.found: dict[str, tuple[nn.Module, str]] = {}

    def keep(self, path: str, name: str, module: nn.Module, error: LoadError) -> nn.Module:
        """Keep a module, and none of those within it; return it.

        Args:
            path: in the network.
            name: of the class that its author wrote.
            module: the program's.
            error: why it can't be made a module.

        Raises:
            LoadError: it is the whole network.
        """
        if not path:
            raise self._refused(path, name, error.message) from error
        self.found = {other: leaf for other, leaf in self.found.items() if not other.startswith(f"{path}.")}
        self.found[path] = (module, error.message)
        return module

    def check(self, network: nn.Module, notes: list[str] | None) -> nn.Module:
        """Check that what stays has tensors of its own alone, and make a note of each; return the network.

        Raises:
            LoadError: such a module shares weights with one that does not stay.
        """
        for path, (leaf, reason) in self.found.items():
            if _shares_weights(network, leaf):
                raise self._refused(path, type(leaf).__name__, f"{reason}, and it shares weights with other modules")
            if notes is not None:
                notes.append(f"`{path}` stays {self.what}, with no place for a block in it: {reason}")
        return network

    def _refused(self, path: str, name: str, reason: str) -> LoadError:
        return LoadError(
            f"{f'`{path}` ({name})' if path else f'the {name}'} in {self.program} can't be made a module",
            seen=reason,
            hint="pass the eager module that it was made from",
        )


def _shares_weights(network: nn.Module, leaf: nn.Module) -> bool:
    """Return whether a module outside of a leaf has one of its tensors."""
    own = {tensor.data_ptr() for tensor in (*leaf.parameters(), *leaf.buffers()) if tensor.numel()}
    todo: list[nn.Module] = [network]
    seen: set[Any] = set()
    while todo:
        module = todo.pop()
        if module is leaf or module in seen:
            continue
        seen.add(module)
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(tensor is not None and tensor.data_ptr() in own for tensor in tensors):
            return True
        todo += [child for child in module._modules.values() if child is not None]
    return False
