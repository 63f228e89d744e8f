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

    What is `repeatable` may be asked again when the answer was lost: doing it twice is the same as doing it once. `role` is whose
    part in a move it is, source or target, "" for anybody's.
    """

    side: type[Side]
    handler: Callable[..., dict[str, Any] | None]
    timeout_s: float
    repeatable: bool
    role: str = ""


VERBS: dict[str, Verb] = {
    # of any host
    "ping": Verb(HostSide, HostSide.ping, 15, True),
    "facts": Verb(HostSide, HostSide.facts, 180, True),
    "container": Verb(HostSide, HostSide.container, 300, True),
    "list": Verb(HostSide, HostSide.containers, 60, True),
    "reach": Verb(HostSide, HostSide.reach, 60, True, "source"),
    "layers": Verb(HostSide, HostSide.layers, 180, True),
    "records": Verb(HostSide, HostSide.records, 60, True),
    "report": Verb(HostSide, HostSide.report, 30, True),
    "plan": Verb(HostSide, HostSide.plan, 30, True),
    "stop": Verb(HostSide, HostSide.stop, 30, True, "source"),
    # of the source
    "begin": Verb(SourceSide, SourceSide.begin, 30, False, "source"),
    "journal": Verb(SourceSide, SourceSide.journal, 30, False, "source"),
    "open_data": Verb(SourceSide, SourceSide.open_data, 60, False, "source"),
    "listen_data": Verb(SourceSide, SourceSide.listen_data, 30, False, "source"),
    "accept_data": Verb(SourceSide, SourceSide.accept_data, 60, False, "source"),
    "source_storage": Verb(SourceSide, SourceSide.storage, 30, True, "source"),
    "stamp": Verb(SourceSide, SourceSide.stamp, 30, True, "source"),
    "unstamp": Verb(SourceSide, SourceSide.unstamp, 30, True, "source"),
    "ship_bundle": Verb(SourceSide, SourceSide.ship_bundle, 120, True, "source"),
    "ship_layers": Verb(SourceSide, SourceSide.ship_layers, 120, True, "source"),
    "follow": Verb(SourceSide, SourceSide.follow, 90, False, "source"),
    "send_memory": Verb(SourceSide, SourceSide.send_memory, 120, False, "source"),
    "throttle": Verb(SourceSide, SourceSide.throttle, 90, True, "source"),
    "hold_checkpoint": Verb(SourceSide, SourceSide.hold_checkpoint, 90, False, "source"),
    "freeze": Verb(SourceSide, SourceSide.freeze, 600, False, "source"),
    "ship_images": Verb(SourceSide, SourceSide.ship_images, 120, True, "source"),
    "serve": Verb(SourceSide, SourceSide.serve, 30, False, "source"),
    "served": Verb(SourceSide, SourceSide.served, 3600, True, "source"),
    "decide": Verb(SourceSide, SourceSide.decide, 30, True, "source"),
    "frames": Verb(SourceSide, SourceSide.frames, 30, False, "source"),
    "revoke": Verb(SourceSide, SourceSide.revoke, 30, True, "source"),
    "kill": Verb(SourceSide, SourceSide.kill, 30, False, "source"),
    "killed": Verb(SourceSide, SourceSide.done, 90, False, "source"),
    "let_go": Verb(SourceSide, SourceSide.abort, 660, True, "source"),
    "source_take_over": Verb(SourceSide, SourceSide.take_over, 960, False, "source"),
    "look": Verb(SourceSide, SourceSide.look_here, 60, True, "source"),
    "thaw": Verb(SourceSide, SourceSide.thaw, 60, True, "source"),
    "freeze_now": Verb(SourceSide, SourceSide.freeze_now, 60, True, "source"),
    "forget": Verb(SourceSide, SourceSide.forget, 300, True, "source"),
    "ended": Verb(SourceSide, SourceSide.ended, 60, True, "source"),
    "leave": Verb(SourceSide, SourceSide.leave, 120, True, "source"),
    # of the target
    "prepare": Verb(TargetSide, TargetSide.prepare, 60, False, "target"),
    "target_storage": Verb(TargetSide, TargetSide.storage, 30, True, "target"),
    "sees": Verb(TargetSide, TargetSide.sees, 90, True, "target"),
    "keep_layers": Verb(TargetSide, TargetSide.keep_layers, 300, False, "target"),
    "hold_restore": Verb(TargetSide, TargetSide.hold_restore, 90, False, "target"),
    "restore": Verb(TargetSide, TargetSide.restore, 600, False, "target"),
    "release": Verb(TargetSide, TargetSide.release, 90, False, "target"),
    "deliver": Verb(TargetSide, TargetSide.deliver, 30, False, "target"),
    "released": Verb(TargetSide, TargetSide.done, 90, False, "target"),
    "abort": Verb(TargetSide, TargetSide.abort, 120, True, "target"),
    "discard": Verb(TargetSide, TargetSide.discard, 120, True, "target"),
    "drained": Verb(TargetSide, TargetSide.drained, 90, False, "target"),
    "settle": Verb(TargetSide, TargetSide.settle, 300, True, "target"),
    "confirm": Verb(TargetSide, TargetSide.confirm, 60, True, "target"),
    "target_take_over": Verb(TargetSide, TargetSide.take_over, 960, False, "target"),
    "verdict": Verb(TargetSide, TargetSide.verdict, 180, False, "target"),
    "restore_again": Verb(TargetSide, TargetSide.restore_again, 700, False, "target"),
    # of the second agent of a host
    "attach": Verb(BulkSide, BulkSide.attach, 30, True, "target"),
    "lane": Verb(BulkSide, BulkSide.lane, 30, False, "target"),
    "widen": Verb(BulkSide, BulkSide.widen, 60, False, "target"),
    "relay": Verb(BulkSide, BulkSide.relay, 30, False, "source"),
    "receive_tree": Verb(BulkSide, BulkSide.receive_tree, 60, False, "target"),
}
