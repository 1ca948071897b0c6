"""The subcommands: functions whose signature is the command line; they import a wing only when they run."""

import shlex
import sys


def command_line() -> str:
    """The command as it was typed, for reports."""
    return shlex.join(["looplm", *sys.argv[1:]])
