"""Real processes that die come from the tests of training."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "training"))
