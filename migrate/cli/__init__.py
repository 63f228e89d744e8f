"""The command line of `migrate`. One file for each verb, imported only when it is used."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; the exit status is the outcome's, see docs/move.md."""
    if sys.argv[1:2] == ["agent"]:
        from migrate.agent.server import main as agent

        agent(sys.argv[2:])
        return
    from migrate.cli.main import run

    sys.exit(run(sys.argv[1:]))
