"""One thread a worker: the models are tiny, and results do not depend on how many tests run beside each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
