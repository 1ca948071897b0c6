"""The README's commands and Python run as printed, against a model trained here where the demo would leave its own."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = "The state of the Union is strong, and the Congress of the United States has met its duty.\n"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/demo/model, made by `looplm train`."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "corpus.txt").write_text("\n\n".join(TEXT * 3 for _ in range(40)), encoding="utf-8")
    recipe = {
        "output": "runs/demo",
        "data": {"sources": {"text": {"location": "corpus.txt"}}},
        "tokenizer": {"train_bpe": 300},
        "model": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
        "defaults": {"sequence_length": 32, "batch_tokens": 64, "compile": "off", "evaluations": 1},
        "stages": [{"name": "short", "steps": 3}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run(folder, "looplm train recipe.yaml")
    return folder


def run(folder: Path, command: str) -> str:
    words = shlex.split(command, comments=True)
    assert words[0] == "looplm"
    done = subprocess.run(
        [sys.executable, "-m", "looplm", *words[1:]], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_make_targets_exist() -> None:
    targets = [line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("make ")]
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:.*##", makefile, flags=re.MULTILINE) for target in targets)


def test_the_commands_run(workplace: Path) -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("looplm ")]
    assert len(commands) >= 2
    for command in commands:
        assert "The state of the Union" in run(workplace, command)


def test_the_python_runs(workplace: Path) -> None:
    examples = blocks("python")
    assert examples
    for example in examples:
        done = subprocess.run(
            [sys.executable, "-c", example], cwd=workplace, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "tensor" in done.stdout or "loops a token" in done.stdout


def test_every_file_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"\]\(([\w./-]+)\)|`((?:looplm|docs|benchmarks)/[\w./-]+)`", README))
    paths = {a or b for a, b in named}
    assert {"CONTRIBUTING.md", "docs/log.md", "benchmarks/training_step.py"} <= paths
    assert all((ROOT / path).exists() for path in paths)
