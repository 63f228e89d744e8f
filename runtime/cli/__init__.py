"""The command line: runc's verbs and flags. One file for each verb, imported only when it is used."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; the exit status is the error class's, or the container's."""
    from runtime.cli.main import run

    sys.exit(run(sys.argv[1:]))
