"""The lab's tasks: synthetic problems from the papers, each with a seeded generator and an exact score.

`make_task("mano", modulus=7).batch(seed=0, index=0, size=64)`; see `base.Task`, and docs/lab.md for what each shows.
"""

from typing import Any, Literal

from looplm.lab.tasks.addition import Addition
from looplm.lab.tasks.assignment import Assignment
from looplm.lab.tasks.base import IGNORED, Batch, Task
from looplm.lab.tasks.capo import Capo
from looplm.lab.tasks.draws import SPLITS, Split
from looplm.lab.tasks.group import Group
from looplm.lab.tasks.gsm import SymbolicGSM
from looplm.lab.tasks.mano import Mano
from looplm.lab.tasks.multi_hop import MultiHop
from looplm.lab.tasks.p_hop import PHop
from looplm.lab.tasks.reachability import Reachability
from looplm.settings import nearest

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Capo, Mano, MultiHop, PHop, Addition, SymbolicGSM, Group, Reachability, Assignment)
}

__all__ = ["IGNORED", "SPLITS", "TASKS", "Batch", "Split", "Task", "make_task", "task_class"]


def task_class(name: str) -> type[Task]:
    """The task of a name. Raises ValueError, with the nearest known name, if there is none."""
    if name not in TASKS:
        raise ValueError(f"no such task: {name}; {nearest(name, TASKS)}")
    return TASKS[name]


def make_task(name: str, scale: Literal["paper", "laptop"] = "laptop", **changes: Any) -> Task:
    """A task at the paper's or a laptop's size, with some settings changed.

    Raises:
        ValueError: an unknown task or setting, or settings that cannot be.
    """
    kind = task_class(name)
    if scale not in ("paper", "laptop"):
        raise ValueError(f"scale is {scale!r}; choose paper or laptop")
    settings = kind.Settings.paper() if scale == "paper" else kind.Settings.laptop()
    return kind(type(settings).validated({**settings.model_dump(), **changes}, name))
