"""The command line: each subcommand is a thin call into one wing, and `--help` imports none of them.

Mistakes of the user end with one line on standard error and exit code 2; a run that went wrong by itself (a loss that
is not finite) with exit code 1.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import tyro

from looplm.commands.benching import bench
from looplm.commands.calibrating import calibrate
from looplm.commands.converting import retrofit
from looplm.commands.data import data
from looplm.commands.evaluating import completed, evaluate
from looplm.commands.generating import generate
from looplm.commands.inspecting import trace
from looplm.commands.lab import lab
from looplm.commands.study import study
from looplm.commands.training import demo, train
from looplm.commands.tuning import grpo, merge, sft
from looplm.commands.upcycling import convert, upcycle
from looplm.commands.verifying import verify

COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "train": train,
    "data": data,
    "generate": generate,
    "trace": trace,
    "retrofit": retrofit,
    "upcycle": upcycle,
    "convert": convert,
    "verify": verify,
    "sft": sft,
    "grpo": grpo,
    "merge": merge,
    "eval": evaluate,
    "study": study,
    "calibrate": calibrate,
    "lab": lab,
    "bench": bench,
}

ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "OMP_WAIT_POLICY": "passive",
    "TQDM_DISABLE": "1",
}
"""Defaults set before any library loads: no chatter of others in our output, and threads that sleep while they wait.

Spinning threads are ruinous where another process wants a core: a training step took 14 s instead of 0.5 s.
"""


def main() -> None:
    """Entry point of the `looplm` command."""
    try:
        run = tyro.extras.subcommand_cli_from_dict
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        run(
            COMMANDS, args=completed(sys.argv[1:]), prog="looplm", description="The toolkit for looped language models."
        )
    except (ValueError, OSError) as error:
        _fail(error, 2)
    except FloatingPointError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        print("looplm: interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(error: Exception, code: int) -> None:
    print(f"looplm: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)
