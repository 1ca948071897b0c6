"""What runs leave: one tidy Parquet file, a row for every run, step, loop and difficulty scored, or for an exit rule.

`load("runs/lab/results.parquet").to_pandas()` is where a notebook begins. Settings stand in `settings` as JSON, the
most used ones beside it in columns of their own.
"""

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from looplm.lab.settings import RunSettings

FILE = "results.parquet"
SCHEMA = pa.schema(
    [
        ("run", pa.string()),  # RunSettings.key
        ("task", pa.string()),
        ("layers", pa.int32()),
        ("loops", pa.int32()),  # L, of training
        ("width", pa.int32()),
        ("objective", pa.string()),
        ("learning_rate", pa.float64()),
        ("seed", pa.int64()),
        ("settings", pa.string()),  # all of them
        ("commit", pa.string()),  # of the code that ran
        ("began", pa.int64()),  # seconds since 1970
        ("cpu_seconds", pa.float64()),  # of the whole run
        ("parameters", pa.int64()),
        ("diverged", pa.bool_()),
        ("step", pa.int64()),  # steps done when this was scored
        ("flops", pa.float64()),  # of training until then
        ("loop", pa.int32()),  # that was read; missing in rows of exit rules
        ("difficulty", pa.int32()),  # of the items; missing in rows of exit rules, which are over all levels
        ("items", pa.int32()),  # scored
        ("score", pa.float64()),  # share of exact matches
        ("loss", pa.float64()),  # nats a graded target
        ("exit_probability", pa.float64()),  # mean p_t at graded targets; missing beyond the trained loops
        ("bits_per_parameter", pa.float64()),  # of Capo
        ("rule", pa.string()),  # of exit (`looplm.lab.frontier`); missing where a fixed loop was read
        ("over", pa.string()),  # which positions' loops are counted
        ("mean_loops", pa.float64()),  # what the rule was read at, or an oracle's own
    ]
)
NEWER = ("rule", "over", "mean_loops")
"""Columns that older files lack: nothing but fixed loops was read there."""
_COLUMNS = ("task", "layers", "loops", "width", "objective", "learning_rate", "seed")


def load(path: str | os.PathLike[str]) -> pa.Table:
    """The rows of a results file, or of none yet.

    Raises:
        ValueError: a file that is something else.
    """
    if not Path(path).exists():
        return SCHEMA.empty_table()
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {' '.join(str(error).split())}") from None
    if table.schema.names == [name for name in SCHEMA.names if name not in NEWER]:
        for name in NEWER:
            table = table.append_column(name, pa.nulls(len(table), SCHEMA.field(name).type))
    if table.schema.names != SCHEMA.names:
        raise ValueError(f"{path} has other columns than results of the lab; choose another folder")
    return table.cast(SCHEMA)


def save(table: pa.Table, path: Path) -> None:
    """Put a whole results file in the place of the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def table_of(settings: RunSettings, commit: str, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """The rows of a finished run (`looplm.lab.training.run`) as a table."""
    values = settings.model_dump(mode="json")
    same = {"run": settings.key, "settings": settings.canonical(), "commit": commit}
    same |= {name: values[name] for name in _COLUMNS}
    return pa.Table.from_pylist([{**same, **row} for row in rows], schema=SCHEMA)


def finished(table: pa.Table) -> set[str]:
    """The keys of the runs in a table."""
    return set(pc.unique(table["run"]).to_pylist())


def by_run(table: pa.Table) -> dict[str, list[dict[str, Any]]]:
    """The rows by the key of their run."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        runs.setdefault(row["run"], []).append(row)
    return runs


def settings_of(row: Mapping[str, Any]) -> RunSettings:
    """The settings of a row's run."""
    return RunSettings.validated(json.loads(row["settings"]), FILE)
