"""Runs code that a model has written, apart from everything: a process of its own with limits, no network, no files.

Used by `looplm.evaluation.programs` only, and only where it is allowed by name. Each run has an empty temporary folder,
a bare environment, limits on processor time, memory, file size and processes, and where the system lets it (unshare of
user and network namespaces) no network. That keeps accidents in; it is no wall against an attacker, for which one needs
a virtual machine.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SECONDS = 5.0
"""A program's time; processor time too, rounded up."""
MEMORY = 1 << 30
"""Bytes of address space."""
_FILE = 1 << 20
_PROCESSES = 64
_SHOWN = 200


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: it ended by itself with code 0, and reached its last line.
        reason: "passed", "timeout", or the last line of what it said.
    """

    passed: bool
    reason: str


@cache
def network_wall() -> tuple[str, ...]:
    """The command in front of a program that takes the network from it; empty where the system has none."""
    command = ("unshare", "--user", "--map-root-user", "--net")
    if shutil.which("unshare") is None:
        return ()
    tried = subprocess.run([*command, sys.executable, "-c", ""], capture_output=True, check=False)
    return command if tried.returncode == 0 else ()


def run_program(source: str, seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """Run a Python program to its end or its limit.

    It passes only by reaching its end: `sys.exit(0)` in what the model wrote is no success.
    """
    with tempfile.TemporaryDirectory(prefix="looplm-sandbox-") as name:
        folder = Path(name)
        token = os.urandom(16).hex()
        marked = f"{source}\nimport sys as _looplm_sys\n_looplm_sys.__stderr__.write('\\n{token}\\n')\n"
        (folder / "program.py").write_text(marked, encoding="utf-8")
        command = [*network_wall(), sys.executable, "-I", "-X", "utf8", "program.py"]
        said = open(folder / "said", "wb+")  # noqa: SIM115 - closed below; a file, so that its size has a limit
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={"PATH": os.environ.get("PATH", ""), "HOME": name, "TMPDIR": name, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
            preexec_fn=lambda: _limit(seconds, memory),
        )
        try:
            process.wait(timeout=seconds)
            text = (folder / "said").read_text(encoding="utf-8", errors="replace")
        except subprocess.TimeoutExpired:
            return Outcome(False, "timeout")
        finally:
            _end(process)
            said.close()
    if process.returncode == 0 and token in text:
        return Outcome(True, "passed")
    if process.returncode == -signal.SIGXCPU:
        return Outcome(False, "timeout")
    lines = [line for line in text.replace(token, "").splitlines() if line.strip()]
    return Outcome(False, (lines[-1] if lines else f"exit code {process.returncode}")[:_SHOWN])


def _limit(seconds: float, memory: int) -> None:
    """Limits of the new process; all of its children share them."""
    for what, most in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, _FILE),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, _PROCESSES),
    ):
        hard = resource.getrlimit(what)[1]
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (limit, limit))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the whole group of processes, and wait for the first of them."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
