"""The network that a container takes along, on the host that it leaves: what comes for it is kept, it is silenced and removed."""

from __future__ import annotations

import contextlib
from typing import Any

from migrate import locks, netns, probe
from migrate.agent.side import Side, network_of
from migrate.backlog import MAX_BYTES, Backlog
from migrate.errors import MigrateError, NetworkFailed, ProtocolError
from migrate.network import Network


class SourceNetwork(Side):
    _ports: tuple[str, ...] = ()  # of the bridges that the network is joined to
    _backlog: Backlog | None = None
    _lost_network = ""  # which went with a reboot

    def _take_network(self, plan: dict[str, Any], bundle: str) -> int | None:
        """Take on the network of a plan; return what tells it from all others. Raises: ProtocolError, MigrateError; OSError."""
        self._network = self._checked_network(plan, bundle)
        self._find_joints()
        self._ports = tuple(port for bridge in {i.bridge for i in self._joints} for port in netns.ports(bridge))
        return netns.inode(self._network.name) if self._network is not None else None

    def _leave_network(self) -> None:
        """Keep nothing for it any more. Idempotent."""
        self._end_announcer()
        if self._backlog is not None:
            self._backlog.close()
            self._backlog = None

    @staticmethod
    def _checked_network(plan: dict[str, Any], bundle: str) -> Network | None:
        """Return the network that moves along, which must be the container's. Raises: ProtocolError, MigrateError."""
        wanted = network_of(plan.get("network"))
        if wanted is not None and wanted.name != probe.network_name(bundle):
            raise ProtocolError(f"the network {wanted.name} of the plan is not the container's")
        return wanted

    def _keep_frames(self) -> None:
        """From now on keep what comes for the container. Should that not be possible, it is sent again."""
        if self._joints:
            with contextlib.suppress(OSError):
                self._backlog = Backlog(self._joints, self._ports)

    def frames(self, most_bytes: int = MAX_BYTES) -> dict[str, Any]:
        """Return what has come for the container since it was frozen, or since the last time that this was asked.

        `kept` says whether anything is kept here at all.
        """
        kept = self._backlog.take(min(int(most_bytes), MAX_BYTES)) if self._backlog is not None else []
        return {"kept": self._backlog is not None, "frames": kept}

    def _silence(self) -> None:
        """Have the kernel answer for the container's addresses no more. Should it fail, the target's announcements come later."""
        with contextlib.suppress(NetworkFailed):
            netns.disconnect(self._joints)

    def _adopt_network(self, plan: dict[str, Any]) -> None:
        """Take the network of a move that was left behind for ours, when it is still the same one."""
        try:
            found = network_of(plan.get("network"))
            if found is not None and plan.get("boot_id") != locks.boot_id():
                self._lost_network = found.name
            if found is None or plan.get("boot_id") != locks.boot_id() or plan.get("network_inode") != netns.inode(found.name):
                return
            self._network = found
            self._find_joints()
        except (MigrateError, OSError):
            return  # what is not known of it must not stand in the way of the container

    def _remove_network(self) -> None:
        if self._lost_network:
            netns.forget(self._lost_network)
        if self._network is None or not netns.exists(self._network.name):
            return
        if users := netns.users(self._network.name):
            words = f"the network {self._network.name} is kept: {', '.join(users)} use it"
            raise NetworkFailed(words, hint="remove it by hand")
        netns.remove(self._network.name)
