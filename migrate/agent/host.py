"""What an agent says of its host; nothing here changes anything but `stop`."""

from __future__ import annotations

import os
from typing import Any

from migrate import layer_store, locks, places, probe, records
from migrate.agent.side import Side, checked_flags
from migrate.errors import MigrateError, ProtocolError
from migrate.facts import to_json
from migrate.ship import Shipper
from migrate.transport.local import ProcessStream


class HostSide(Side):
    def ping(self) -> None:
        """Say that the coordinator is there."""

    def facts(
        self,
        bundle: str | None = None,
        container: str | None = None,
        cpu: str | None = None,
        needs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return to_json(probe.host_facts(bundle, container, cpu, needs or {}))

    def container(self, container: str, flags: list[str], volumes: dict[str, str] | None = None) -> dict[str, Any]:
        places.lock(container)
        try:
            facts = probe.container_facts(container, checked_flags(flags), volumes or {})
        except (ValueError, AttributeError) as e:
            raise ProtocolError(f"that says nothing of volumes: {e}") from e
        return {"container": None if facts is None else to_json(facts)}

    def containers(self) -> dict[str, Any]:
        return {"containers": probe.list_containers()}

    def layers(self, prune: bool = False) -> dict[str, Any]:
        """Return the layers that are kept here; with `prune` those that no container has are removed."""
        if prune and self._permissions.restricted:
            raise ProtocolError("this agent may not remove layers")
        noted = [records.target(places.history(r.migration_id)) for r in records.unfinished() if r.role == "target"]
        with layer_store.locked():
            wanted = {layer["digest"] for note in noted for layer in (note.get("overlay") or {}).get("layers", ())}
            used = layer_store.in_use() | wanted
            kept = layer_store.stored()
            for digest in kept.keys() - used if prune else ():
                layer_store.remove(digest)
            layer_store.sweep()
        return {"layers": [{"digest": d, "size_bytes": size, "used": d in used} for d, size in kept.items()]}

    def reach(self, address: dict[str, Any], remote_command: str) -> dict[str, Any]:
        """Say why no agent of another host can be started from here, "" when it can."""
        try:
            argv = self._connection(address, remote_command)
            Shipper(ProcessStream(argv, "the other host"), "the other host").close()
        except ProtocolError:
            raise
        except MigrateError as e:
            return {"error": str(e)}
        return {"error": ""}

    def records(self, only_open: bool = False) -> dict[str, Any]:
        """Return what this host keeps of its moves, and who holds each."""
        locks.sweep()
        found = records.unfinished() if only_open else records.all_records()
        rows = []
        for r in found:
            holder = locks.holder(r.container) if r.container and r.open else None
            under_way = holder is not None and holder.get("migration") == r.migration_id
            waits = under_way and (places.working(r.migration_id) / "waiting").exists()
            released = r.role == "target" and records.was_released(r.migration_id)
            rows.append({**r.as_dict(), "under_way": under_way, "waits": waits, "released": released})
        return {"records": rows[-1000:]}

    def report(self, migration_id: str) -> dict[str, Any]:
        records.find(migration_id)
        return {"report": records.report(migration_id)}

    def plan(self, migration_id: str) -> dict[str, Any]:
        """Return what is needed to find the other host of a move: a source's plan, or a target's note."""
        record = records.find(migration_id)
        directory = places.history(migration_id)
        found = records.plan(directory) if record.role == "source" else records.target(directory)
        return {"role": record.role, "plan": found}

    def stop(self, migration_id: str) -> dict[str, Any]:
        """Have the move under way stop before its decision; says whether there is one under way. Idempotent."""
        record = records.find(migration_id)
        if record.role != "source":
            raise MigrateError(
                f"{migration_id} is stopped on its source, {record.source}", hint=f"migrate abort --from {record.source}"
            )
        holder = locks.holder(record.container)
        if holder is None or holder.get("migration") != migration_id:
            return {"under_way": False}
        os.close(os.open(places.working(migration_id) / "stop", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        return {"under_way": True}
