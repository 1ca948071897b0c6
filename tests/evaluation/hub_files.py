"""Data sets laid out as the hub has them: configurations, splits and typed columns, of made-up rows."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features
from eval_models import save_pair
from lm_eval.tasks import TaskManager

from looplm.evaluation.depths import Depth
from looplm.evaluation.results import Result
from looplm.evaluation.running import Settings, run_tasks

Rows = list[dict[str, Any]]


class Hub:
    """A folder in the place of the hub, and lm-eval's own tasks without the rest of its index.

    Attributes:
        root: holds parquet files, `owner/name/configuration/split.parquet`.
        asked: the data sets and configurations that were asked for, in order.
        cache: where `datasets` keeps what it makes of them; None: nowhere.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = root, monkeypatch
        self.asked: list[tuple[str, str | None]] = []
        self.cache: Path | None = None
        monkeypatch.setattr(datasets, "load_dataset", self._load)

    def put(self, data: str, configs: Mapping[str, Mapping[str, Rows]], features: Features | None = None) -> None:
        """A data set by configuration ("default" where it has one) and split."""
        for config, splits in configs.items():
            folder = self.root / data / config
            folder.mkdir(parents=True)
            for split, rows in splits.items():
                pq.write_table(Dataset.from_list(rows, features=features).data.table, folder / f"{split}.parquet")

    def lm_eval(self, *folders: str) -> None:
        """The tasks in these folders of lm-eval are known, and no other."""
        paths = [str(Path(lm_eval.__file__).parent / "tasks" / folder) for folder in folders]
        manager = TaskManager(include_path=paths, include_defaults=False)
        self.patch.setattr("looplm.evaluation.tasks._manager", lambda: manager)

    def _load(self, path: str, name: str | None = None, split: str | None = None, **options: Any) -> Any:
        """What `datasets.load_dataset` gives of the files: typed columns, an error where the hub's would be one."""
        self.asked.append((path, name))
        known = sorted(folder.name for folder in (self.root / path).iterdir())
        config = known[0] if name is None and len(known) == 1 else name
        if config not in known:
            raise ValueError(f"BuilderConfig {name!r} not found. Available: {known}")
        parts = {file.stem: self._read(file) for file in sorted((self.root / path / config).iterdir())}
        return DatasetDict(parts) if split is None else parts[split]

    def _read(self, file: Path) -> Dataset:
        if self.cache is None:
            return Dataset(pq.read_table(file))
        return Dataset.from_parquet(str(file), cache_dir=str(self.cache))


def answering(monkeypatch: pytest.MonkeyPatch, reply: Callable[[str], str]) -> None:
    """A model that writes what `reply` makes of the prompt, up to the task's first stop text as lm-eval cuts it."""

    def generate(self: Any, requests: Any, disable_tqdm: bool = False) -> list[str]:
        texts = []
        for request in requests:
            prompt, settings = request.args
            text = reply(prompt)
            for stop in settings["until"]:
                text = text.partition(stop)[0]
            texts.append(text)
        return texts

    monkeypatch.setattr("looplm.evaluation.harness.LoopedLM.generate_until", generate)


def choosing(monkeypatch: pytest.MonkeyPatch, choose: Callable[[str], str]) -> None:
    """A model for which the continuation that `choose` makes of the context is by far the likeliest."""

    def loglikelihood(self: Any, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return [(0.0 if target.strip() == choose(context) else -9.0, True) for context, target in map(_args, requests)]

    monkeypatch.setattr("looplm.evaluation.harness.LoopedLM.loglikelihood", loglikelihood)


def _args(request: Any) -> tuple[str, str]:
    return request.args


def run(names: tuple[str, ...], folder: Path, **settings: Any) -> list[Result]:
    """The results of tasks for a tiny model with two loops."""
    model = folder / "small" / "model"
    if not model.exists():
        save_pair(model, max_position_embeddings=4096)
    return run_tasks(str(model), Settings(names, (Depth(2),), batch_size=4, **settings), folder / "out")
