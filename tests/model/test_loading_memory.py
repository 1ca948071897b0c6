"""Loading copies no weight: the peak of a fresh process stays near the size of the file."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import looplm

ROOT = Path(looplm.__file__).parent.parent
BENCHMARK = ROOT / "benchmarks" / "loading.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
def test_the_peak_of_loading_is_under_1_2_times_the_weights(tmp_path):
    spec = importlib.util.spec_from_file_location("loading_benchmark", BENCHMARK)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.write_checkpoint(tmp_path / "model", small=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(BENCHMARK), "--load", str(tmp_path / "model"), "bfloat16"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    finally:
        shutil.rmtree(tmp_path / "model")
    assert float(done.stdout.split()[-1].removesuffix("x")) < 1.2  # a copy of the embedding alone would be 1.4
