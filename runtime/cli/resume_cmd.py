"""`runtime resume`"""

from __future__ import annotations

import click

from runtime.cli.main import Globals
from runtime.container.container import Container


@click.command(help="Let the processes of a paused container run.")
@click.argument("container_id")
@click.pass_obj
def command(g: Globals, container_id: str) -> None:
    container = Container(g.store, container_id)
    if container.was_being_dumped() is not None:
        # By a verb that was killed. One that is at work holds the container's lock.
        from runtime.criu.sweep import sweep

        with container.store.locked(container_id):
            if (locks := container.was_being_dumped()) is not None:
                sweep(container.state.pid, container.manager().pids(), locks)
                container.being_dumped(None)
    container.resume()
