"""A host as the user named it, and what OpenSSH's own configuration makes of that name."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

from migrate.errors import HostUnreachable

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
    names_ciphers: bool


def resolve(name: str) -> Host:
    """Ask OpenSSH what a host name means.

    Raises: HostUnreachable when the name cannot be one, or `ssh` is not installed or refuses its configuration.
    """
    if not _NAME.fullmatch(name):
        raise HostUnreachable(f"{name!r} is no host name")
    config = _ssh_g(name)
    default_ciphers = _ssh_g(name, "-F", "none").get("ciphers")
    return parse(name, config, names_ciphers=config.get("ciphers") != default_ciphers)


def parse(name: str, config: dict[str, list[str]], names_ciphers: bool) -> Host:
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
        names_ciphers=names_ciphers,
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


def bulk_command(host: Host, remote_command: str) -> list[str]:
    """Return the `ssh` command that carries bulk data: OpenSSH is faster than any SSH in Python.

    It asks nothing, accepts no new host key, and finds out within 15 s that the other side is gone. AES-GCM is put
    first, which processors have instructions for, unless the user's configuration chose the ciphers.
    """
    options = ["BatchMode=yes", "StrictHostKeyChecking=yes", "ServerAliveInterval=5", "ServerAliveCountMax=3"]
    options += ["ConnectTimeout=15", "ControlPath=none", "ClearAllForwardings=yes", "Compression=no", "EscapeChar=none"]
    if not host.names_ciphers:
        options.append("Ciphers=^aes128-gcm@openssh.com,aes256-gcm@openssh.com")
    return ["ssh", *(part for option in options for part in ("-o", option)), "-T", host.name, remote_command]
