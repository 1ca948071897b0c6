"""Scores and studies are held against the tiny models of the model's tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "model"))
