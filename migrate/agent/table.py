"""Every verb that can be asked of an agent; nothing else can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from migrate.agent.bulk import BulkSide
from migrate.agent.host import HostSide
from migrate.agent.side import Side
from migrate.agent.source import SourceSide
from migrate.agent.target import TargetSide


@dataclass(frozen=True, slots=True)
class Verb:
    """Units: `timeout_s` is how long the coordinator waits for the answer.

    What is `repeatable` may be asked again when the answer was lost: doing it twice is the same as doing it once.
    """

    side: type[Side]
    handler: Callable[..., dict[str, Any] | None]
    timeout_s: float
    repeatable: bool


VERBS: dict[str, Verb] = {
    # of any host
    "ping": Verb(HostSide, HostSide.ping, 15, True),
    "facts": Verb(HostSide, HostSide.facts, 60, True),
    "container": Verb(HostSide, HostSide.container, 120, True),
    "list": Verb(HostSide, HostSide.containers, 60, True),
    "status": Verb(HostSide, HostSide.status, 60, True),
    "reach": Verb(HostSide, HostSide.reach, 60, True),
    "records": Verb(HostSide, HostSide.records, 60, True),
    "report": Verb(HostSide, HostSide.report, 30, True),
    "plan": Verb(HostSide, HostSide.plan, 30, True),
    "stop": Verb(HostSide, HostSide.stop, 30, True),
    # of the source
    "begin": Verb(SourceSide, SourceSide.begin, 30, False),
    "journal": Verb(SourceSide, SourceSide.journal, 30, False),
    "open_data": Verb(SourceSide, SourceSide.open_data, 60, False),
    "listen_data": Verb(SourceSide, SourceSide.listen_data, 30, False),
    "accept_data": Verb(SourceSide, SourceSide.accept_data, 60, False),
    "ship_bundle": Verb(SourceSide, SourceSide.ship_bundle, 120, True),
    "hold_checkpoint": Verb(SourceSide, SourceSide.hold_checkpoint, 90, False),
    "freeze": Verb(SourceSide, SourceSide.freeze, 600, False),
    "ship_images": Verb(SourceSide, SourceSide.ship_images, 120, True),
    "decide": Verb(SourceSide, SourceSide.decide, 30, True),
    "revoke": Verb(SourceSide, SourceSide.revoke, 30, True),
    "kill": Verb(SourceSide, SourceSide.kill, 30, False),
    "killed": Verb(SourceSide, SourceSide.done, 90, False),
    "let_go": Verb(SourceSide, SourceSide.abort, 660, True),
    "source_take_over": Verb(SourceSide, SourceSide.take_over, 960, False),
    "look": Verb(SourceSide, SourceSide.look_again, 60, True),
    "thaw": Verb(SourceSide, SourceSide.thaw, 60, True),
    "freeze_now": Verb(SourceSide, SourceSide.freeze_now, 60, True),
    "forget": Verb(SourceSide, SourceSide.forget, 300, True),
    "ended": Verb(SourceSide, SourceSide.ended, 60, True),
    "leave": Verb(SourceSide, SourceSide.leave, 120, True),
    # of the target
    "prepare": Verb(TargetSide, TargetSide.prepare, 60, False),
    "hold_restore": Verb(TargetSide, TargetSide.hold_restore, 90, False),
    "restore": Verb(TargetSide, TargetSide.restore, 600, False),
    "release": Verb(TargetSide, TargetSide.release, 90, False),
    "released": Verb(TargetSide, TargetSide.done, 90, False),
    "abort": Verb(TargetSide, TargetSide.abort, 120, True),
    "discard": Verb(TargetSide, TargetSide.discard, 120, True),
    "settle": Verb(TargetSide, TargetSide.settle, 300, True),
    "confirm": Verb(TargetSide, TargetSide.confirm, 60, True),
    "target_take_over": Verb(TargetSide, TargetSide.take_over, 960, False),
    "verdict": Verb(TargetSide, TargetSide.verdict, 180, False),
    "restore_again": Verb(TargetSide, TargetSide.restore_again, 700, False),
    # of the second agent of a host
    "attach": Verb(BulkSide, BulkSide.attach, 30, True),
    "relay": Verb(BulkSide, BulkSide.relay, 30, False),
    "receive_tree": Verb(BulkSide, BulkSide.receive_tree, 60, False),
}
