"""Keep injected blocks in a trainer of Ultralytics': YOLO, RT-DETR, in every task.

>>> yolo = ultralytics.YOLO("yolo11n.pt")
>>> plan = si.plan(yolo.model, stages=[3, 4])
>>> yolo.train(data="coco8.yaml", trainer=trainer_for(plan))
"""

from __future__ import annotations

import importlib
from typing import Any

from se_inject.errors import OptionError, SurgeryError
from se_inject.plans import Plan
from se_inject.surgery import steps_of


def trainer_for(plan: Plan, base: type | None = None) -> type:
    """Make a trainer class for ``YOLO(...).train(trainer=...)`` that keeps the blocks of a plan.

    ``YOLO.train`` builds the network anew and copies the weights that fit by their names; blocks that were put into
    ``yolo.model`` are lost in that, without a word. This trainer puts the blocks into the new network before the weights
    are loaded, so that those of trained blocks are among them. From there the blocks are part of the network: of its
    average, its checkpoints, of ``resume``, ``val``, ``predict`` and ``export``. ``resume`` builds anew as well: give it
    the trainer again, ``trainer_for(si.plan_of(yolo.model))``.

    Does not change the network that the plan was made on.

    Args:
        plan: blocks and their places, from ``si.plan(yolo.model, ...)``.
        base: the trainer to extend. None: the task's own, found by the class of network that the plan was made on.

    Returns:
        a subclass of the trainer.

    Raises:
        OptionError: ultralytics is not installed, or no task of it has such a network.
    """
    text, name = plan.to_json(), plan.model
    base = base or _trainer_of(name)

    class Trainer(base):  # type: ignore[misc,valid-type]
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
            model = super().get_model(cfg, None, verbose)
            put_blocks_into_(model, text, weights)
            if weights:
                model.load(weights)
            return model

    Trainer.__name__ = f"{base.__name__}WithBlocks"
    Trainer.__doc__ = f"{base.__name__} that puts {len(plan)} blocks into the network that it builds."
    return Trainer


def put_blocks_into_(model: Any, plan: str, weights: Any = None) -> None:
    """Put the blocks of a plan, as JSON, into a network that a trainer has just built.

    Args:
        model: the network.
        plan: what ``Plan.to_json`` gave.
        weights: the network whose weights are loaded next; None: none.

    Raises:
        SurgeryError: the plan doesn't fit, or the weights are those of a network with other blocks.
    """
    planned = Plan.from_json(plan)
    held = {step.path: step.block for step in steps_of(weights)} if weights is not None else {}
    wanted = {step.path: step.block for step in planned.steps}
    if held and held != wanted:
        odd = next(path for path in (*held, *wanted) if held.get(path) != wanted.get(path))
        raise SurgeryError(
            "the weights are those of a network with other blocks than the plan's",
            seen=f"`{odd}`: {held.get(odd, 'nothing')} in the weights, {wanted.get(odd, 'nothing')} in the plan",
            hint="trainer_for(si.plan_of(yolo.model)) keeps those that are there",
        )
    planned.apply_(model)


def _trainer_of(name: str) -> type:
    """Return the trainer of the task whose network is of the class of this name."""
    try:
        ultralytics: Any = importlib.import_module("ultralytics")
    except ImportError as error:
        raise OptionError(
            "there is no trainer to extend",
            seen="ultralytics is not installed",
            hint="pip install 'se-inject[ultralytics]'",
        ) from error
    known: dict[str, type] = {}
    for kind in (ultralytics.YOLO, ultralytics.RTDETR):
        for task in kind.task_map.fget(None).values():
            known.setdefault(task["model"].__name__, task["trainer"])
    if name not in known:
        raise OptionError(
            f"no task of Ultralytics' has a network of the class {name}",
            seen=", ".join(known),
            hint="give the trainer: `trainer_for(plan, base=MyTrainer)`",
        )
    return known[name]
