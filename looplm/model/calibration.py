"""The table of mean depth to threshold that `looplm calibrate` leaves beside the weights, and whether it still holds.

calibration.json says of every exit rule which setting gives which mean depth on the text it was calibrated on. A
`depth_budget` begins at the Q-exit threshold of its own depth instead of 0.5. The file names the weights that it was
measured on: after tuning, quantising or a change of dtype it is refused, since the gate then means something else.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

CALIBRATION = "calibration.json"
"""The file's name within a model folder."""

UNCALIBRATED = 0.5
"""The threshold that a budget begins with where nothing is known."""

_SEEN: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class DepthTable:
    """Q-exit thresholds by mean depth, both ascending, equally many."""

    depths: tuple[float, ...]
    thresholds: tuple[float, ...]

    def threshold(self, depth: float | Tensor) -> float | Tensor:
        """The threshold of a mean depth, linear between the table's own and constant beyond them; as `depth`."""
        found = np.interp(torch.as_tensor(depth).cpu().numpy(), self.depths, self.thresholds)
        return torch.as_tensor(found, dtype=torch.float64) if isinstance(depth, Tensor) and depth.ndim else float(found)


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters as they are in memory.

    Computed once for a model, and again when a parameter has been changed in place.
    """
    versions = tuple(x for p in model.parameters() for x in (p.data_ptr(), 0 if p.is_inference() else p._version))
    if model in _SEEN and _SEEN[model][0] == versions:
        return _SEEN[model][1]
    total = hashlib.sha256()
    for name, weight in model.named_parameters():
        total.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        total.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    _SEEN[model] = (versions, total.hexdigest())
    return total.hexdigest()


def read_calibration(folder: str | Path) -> dict[str, Any] | None:
    """What stands in a model folder's calibration.json; None where there is none.

    Raises:
        ValueError: a file that is not one.
    """
    path = Path(folder) / CALIBRATION
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values["weights"], str):
            raise TypeError
        for rule in values["rules"].values():
            _table(rule)
        return values
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{path} is no calibration that can be read; run `looplm calibrate {folder}` again") from None


def starting_threshold(model: Any, budget: float | Tensor) -> float | Tensor:
    """The Q-exit threshold that a budget begins with: of the folder's calibration, or `UNCALIBRATED`.

    Args:
        model: a module whose `name_or_path` is the folder that it was loaded from.
        budget: mean loops, or (B,) with one a row.

    Raises:
        ValueError: the calibration is of other weights.
    """
    folder = str(getattr(model, "name_or_path", "") or "")
    values = read_calibration(folder) if folder else None
    if values is None or "q" not in values["rules"]:
        return UNCALIBRATED
    if values["weights"] != weights_fingerprint(model):
        raise ValueError(
            f"{Path(folder) / CALIBRATION} was measured on other weights than these (tuned, quantised or in another "
            f"dtype since): calibrate again with `looplm calibrate {folder}`, or remove the file"
        )
    return _table(values["rules"]["q"]).threshold(budget)


def _table(rule: Any) -> DepthTable:
    """The rows [mean depth, setting] of a rule, by depth."""
    rows = sorted((float(depth), float(setting)) for depth, setting in rule["table"])
    if not rows:
        raise ValueError("empty table")
    depths, settings = zip(*rows, strict=True)
    return DepthTable(depths, settings)
