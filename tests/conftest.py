"""One thread, so that sums are taken in one order and the suite's time says something; how many networks are drawn."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start, too

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from tests.slow import SLOW

torch.set_num_threads(1)

_operators = []
_register = torch.jit._builtins._register_builtin


def _register_and_keep(operator, name):
    """List an operator for TorchScript, as torch does, and keep it.

    torch frees operators that get another overload, as when inductor is imported, and leaves their addresses listed:
    `torch.jit.script` then fails in whichever test has something at such an address.
    """
    _operators.append(operator)
    _register(operator, name)


torch.jit._builtins._register_builtin = _register_and_keep

settings.register_profile(
    "short",
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
settings.register_profile("long", settings.get_profile("short"), max_examples=5000, derandomize=False)
settings.load_profile("short")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests."""
    for item in items:
        names = SLOW.get(item.path.parent.name, {}).get(item.path.stem)
        name = item.name.partition("[")[0]
        if names is not None and (not names or name in names):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Let the garbage collector skip all that was imported and collected: a tenth of the suite's time and more."""
    gc.collect()
    gc.freeze()
