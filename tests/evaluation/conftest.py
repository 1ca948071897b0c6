"""Scores and studies are held against the tiny models of the model's tests; benchmarks are read from a made-up hub."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "model"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Files in the place of the hub (`hub_files.Hub`)."""
    from hub_files import Hub

    return Hub(tmp_path / "hub", monkeypatch)
