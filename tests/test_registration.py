"""`looplm` and transformers' Auto classes find each other in either order, without remote code and without cost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import looplm

ROOT = Path(looplm.__file__).parent.parent
FIXTURE = Path(__file__).parent / "fixtures" / "ouro-tiny"
LOAD = """
model = AutoModelForCausalLM.from_pretrained({folder!r})
assert type(model).__name__ == "OuroForCausalLM" and type(model).__module__ == "looplm.model.modeling", type(model)
assert type(AutoConfig.from_pretrained({folder!r})).__module__ == "looplm.model.configuration"
assert type(AutoModel.from_config(model.config)).__name__ == "OuroModel"
assert type(model) is looplm.OuroForCausalLM and type(model.config) is looplm.OuroConfig
looplm.registration.register_with_transformers()
"""


def run(code: str, folder: Path) -> None:
    """Run in a fresh interpreter that sees no network."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code.replace("LOAD", LOAD.format(folder=str(folder)))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The tiny model with a pointer to remote code that must not be needed."""
    config = json.loads((FIXTURE / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_ouro.OuroConfig",
        "AutoModel": "modeling_ouro.OuroModel",
        "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(FIXTURE / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "code",
    [
        """
import sys, looplm
heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
assert looplm.__version__ and "OuroForCausalLM" in dir(looplm)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
LOAD
""",
        """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
import looplm
LOAD
""",
        """
import transformers
import looplm
from looplm import OuroForCausalLM
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
LOAD
""",
        """
from transformers.models.auto.configuration_auto import AutoConfig
import looplm.model.modeling
from transformers import AutoModel, AutoModelForCausalLM
LOAD
""",
    ],
    ids=["looplm-first-and-light", "transformers-first", "class-first", "half-loaded"],
)
def test_import_orders(code: str, checkpoint: Path) -> None:
    run(code, checkpoint)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Ouro'; it has Engine, ExitRule"):
        _ = looplm.Ouro
