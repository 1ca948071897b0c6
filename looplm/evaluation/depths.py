"""At which depth a score is read: a fixed number of loops, or an exit rule that selects or freezes.

Ouro sections 3.2 and 5.4.2. Select: all loops run and each position is read at its exit, which saves nothing. Freeze: a
position past its exit is frozen for later ones too, as in generation; `prefill` says whether prompt positions
stop as well (a single-token answer under a full-depth prompt is always read at the last loop).
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

from looplm.exits import Confidence, ExitRule, FixedDepth, QExit, SampledExit, StateDifference

Mode = Literal["select", "freeze"]
Prefill = Literal["full", "adaptive"]
RULES = "q=Q, difference=E, max_probability=P, entropy=H, kl=K or sampled=SEED"
"""How exit rules are written."""


@dataclass(frozen=True)
class Depth:
    """One way to read a model.

    Attributes:
        loops: T of the pass: the fixed depth, or the most loops a rule may use (its exit distribution is over T).
        rule: None reads the last of the loops.
        mode, prefill: what a rule does (see above); without meaning where there is none.
        written: the rule as it is written, e.g. "q=0.8".
    """

    loops: int
    rule: ExitRule | None = None
    mode: Mode = "select"
    prefill: Prefill = "full"
    written: str = ""

    def __post_init__(self) -> None:
        if self.loops < 1:
            raise ValueError(f"loops is {self.loops}; it must be at least 1")
        if self.mode not in ("select", "freeze") or self.prefill not in ("full", "adaptive"):
            raise ValueError(f"mode is {self.mode!r}, prefill {self.prefill!r}; select or freeze, full or adaptive")

    @classmethod
    def of_rule(cls, written: str, loops: int, mode: Mode = "select", prefill: Prefill = "full") -> Self:
        """A rule from how it is written, at most `loops` loops. Raises ValueError as `parse_rule`."""
        return cls(loops, parse_rule(written), mode, prefill, written)

    @property
    def name(self) -> str:
        """Short and fit for a file name: "loops-4", "q-0.8-select", "q-0.8-freeze-adaptive"."""
        if self.rule is None:
            return f"loops-{self.loops}"
        more = "-adaptive" if self.mode == "freeze" and self.prefill == "adaptive" else ""
        return f"{(self.written or type(self.rule).__name__).replace('=', '-')}-{self.mode}{more}"

    def as_dict(self) -> dict[str, Any]:
        """The fields of a recipe that say how deep: `loops`, `exit_rule`, `exit_mode`, `prefill`."""
        if self.rule is None:
            return {"loops": self.loops, "exit_rule": None, "exit_mode": None, "prefill": "full"}
        rule = self.written or repr(self.rule)
        return {"loops": self.loops, "exit_rule": rule, "exit_mode": self.mode, "prefill": self.prefill}


def parse_rule(written: str) -> ExitRule:
    """An exit rule from "name=value" (see `RULES`).

    Raises:
        ValueError: another name, no number, or a value outside the rule's range.
    """
    name, _, value = written.partition("=")
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"exit rule {written!r} is not of the form name=number; give {RULES}") from None
    if name == "q":
        return QExit(number)
    if name == "difference":
        return StateDifference(number)
    if name in ("max_probability", "entropy", "kl"):
        return Confidence(name, number)  # type: ignore[arg-type]
    if name == "sampled" and number == int(number):
        return SampledExit(int(number))
    if name == "loops" and number == int(number):
        return FixedDepth(int(number))
    raise ValueError(f"exit rule {written!r} is not known; give {RULES}")


def parse_loops(written: str) -> list[int]:
    """Numbers of loops from "4", "1..8" or "1,2,4".

    Raises:
        ValueError: anything else, or a number below 1.
    """
    try:
        found: list[int] = []
        for part in written.split(","):
            first, dots, last = part.partition("..")
            found += range(int(first), int(last) + 1) if dots else [int(part)]
    except ValueError:
        raise ValueError(f"loops is {written!r}; write 4, 1..8 or 1,2,4") from None
    if not found or min(found) < 1:
        raise ValueError(f"loops is {written!r}; loops are counted from 1, the smaller number first")
    return sorted(set(found))
