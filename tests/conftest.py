"""One thread a worker: the models are tiny, and results do not depend on how many tests run beside each other.

Nor on where in memory weights lie: without AVX-512, MKL's products of loaded and of new weights differ in the last bit.
"""

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


@pytest.fixture
def quiet():
    """What `main` sets in the environment comes too late for a transformers that is loaded already."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture
def looplm_command(quiet, monkeypatch, capfd):
    """Runs `looplm ARGUMENTS` in this process; gives (exit code, stdout, stderr)."""
    from looplm import cli

    def run(*arguments) -> tuple[int, str, str]:
        for name, value in cli.ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["looplm", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def refused(looplm_command):
    """Runs a command that must fail with exit code 2 and one line; gives the line."""

    def run(*arguments) -> str:
        code, out, err = looplm_command(*arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("looplm: ") and err.endswith("\n") and err.count("\n") == 1, err
        return err.removeprefix("looplm: ").strip()

    return run
