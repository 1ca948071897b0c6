"""The engine is held against the oracle and the tiny models of the model's tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "model"))
