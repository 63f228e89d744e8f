"""A host as the user named it, and what OpenSSH's own configuration makes of that name."""

from __future__ import annotations

import re
import subprocess
from dataclasses import asdict, dataclass
from typing import Any, Self

from migrate.errors import HostUnreachable, ProtocolError
from migrate.liveness import DEAD_AFTER_S

_NAME = re.compile(r"(?!-)[A-Za-z0-9_.:@%\[\]-]+")


@dataclass(frozen=True, slots=True)
class Host:
    """What `ssh -G` says: the same files, Match blocks, Include lines and tokens count as for `ssh` itself."""

    name: str
    hostname: str
    port: int
    user: str
    identity_files: tuple[str, ...]
    identities_only: bool
    known_hosts: tuple[str, ...]
    host_key_alias: str | None
    identity_agent: str | None
    proxy_command: str | None

    def address(self, seen_from_here: bool) -> Address:
        """Return what others connect to: on this host the name, whose configuration is here; elsewhere what it means."""
        return Address(self.name, 0) if seen_from_here else Address(f"{self.user}@{self.hostname}", self.port)


@dataclass(frozen=True, slots=True)
class Address:
    """Where an `ssh` command leads to. Units: port 0 is what its configuration says."""

    destination: str
    port: int

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """Read what another host sent. Raises: ProtocolError."""
        destination, port = document.get("destination"), document.get("port")
        if not isinstance(destination, str) or not _NAME.fullmatch(destination):
            raise ProtocolError(f"{destination!r} is no host name")
        if type(port) is not int or not 0 <= port < 65536:
            raise ProtocolError(f"{port!r} is no port")
        return cls(destination, port)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve(name: str, port: int = 0) -> Host:
    """Ask OpenSSH what a host name means; a port that is given counts more than its configuration.

    Raises: HostUnreachable when the name cannot be one, or `ssh` is not installed or refuses its configuration.
    """
    if not _NAME.fullmatch(name):
        raise HostUnreachable(f"{name!r} is no host name")
    return parse(name, _ssh_g(name, *(["-p", str(port)] if port else [])))


def parse(name: str, config: dict[str, list[str]]) -> Host:
    """Read the output of `ssh -G`. Pure."""

    def one(key: str) -> str | None:
        value = config.get(key, ["none"])[0]
        return None if value == "none" else value

    proxy = one("proxycommand")
    jump = one("proxyjump")
    if proxy is None and jump is not None:
        hops = jump.split(",")
        proxy = f"ssh {'-J ' + ','.join(hops[:-1]) + ' ' if len(hops) > 1 else ''}-o BatchMode=yes -W [%h]:%p {hops[-1]}"
    hostname, port, user = one("hostname") or name, one("port") or "22", one("user") or "root"
    if proxy is not None:
        proxy = proxy.replace("%h", hostname).replace("%p", port).replace("%r", user)
    known = [f for key in ("userknownhostsfile", "globalknownhostsfile") for f in (one(key) or "").split()]
    return Host(
        name=name,
        hostname=hostname,
        port=int(port),
        user=user,
        identity_files=tuple(config.get("identityfile", [])),
        identities_only=one("identitiesonly") == "yes",
        known_hosts=tuple(known),
        host_key_alias=one("hostkeyalias"),
        identity_agent=one("identityagent"),
        proxy_command=proxy,
    )


def _ssh_g(name: str, *options: str) -> dict[str, list[str]]:
    try:
        done = subprocess.run(
            ["ssh", "-G", *options, name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except FileNotFoundError:
        raise HostUnreachable("the ssh command is not installed", hint="install openssh-client") from None
    except subprocess.TimeoutExpired:
        raise HostUnreachable(f"{name}: ssh -G does not end", hint="is there a Match exec in ~/.ssh/config?") from None
    if done.returncode:
        raise HostUnreachable(f"{name}: ssh refuses its configuration: {done.stderr.strip()}")
    config: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition(" ")
        config.setdefault(key.lower(), []).append(value)
    return config


def bulk_command(address: Address, remote_command: str) -> list[str]:
    """Return the `ssh` command that carries bulk data: OpenSSH is faster than any SSH in Python.

    It asks nothing, accepts no new host key, and finds out by itself that the other side is gone. AES-GCM is put
    first, which processors have instructions for, unless the user's configuration chose the ciphers.
    """
    third = max(1, round(DEAD_AFTER_S / 3))
    options = ["BatchMode=yes", "StrictHostKeyChecking=yes", f"ServerAliveInterval={third}", "ServerAliveCountMax=3"]
    options += [f"ConnectTimeout={max(1, round(DEAD_AFTER_S))}", "ControlPath=none", "ClearAllForwardings=yes"]
    options += ["Compression=no", "EscapeChar=none"]
    name = address.destination
    if _ssh_g(name).get("ciphers") == _ssh_g(name, "-F", "none").get("ciphers"):
        options.append("Ciphers=^aes128-gcm@openssh.com,aes256-gcm@openssh.com")
    port = ["-p", str(address.port)] if address.port else []
    return ["ssh", *(part for option in options for part in ("-o", option)), *port, "-T", "--", name, remote_command]
