"""Attach a network namespace to networks of CNI, and take it off them again, by this host's own configuration and plugins.

What was attached is remembered where libcni does, in its form: so that what made a container's network finds what is here
now, and we find what it has made.

Source: the CNI specification, sections 2 and 3; libcni's cache.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from migrate import network
from migrate.errors import NetworkFailed
from migrate.network import Attachment, Interface

CONFIGURATION = Path("/etc/cni/net.d")
PLUGINS = ("/opt/cni/bin", "/usr/libexec/cni", "/usr/lib/cni")
_CACHE = Path("/var/lib/cni/results")
_CACHES = (_CACHE, Path("/var/lib/cni/cache/results"))
_KIND = "cniCacheV1"
_TIMEOUT_S = 60.0
_OLDEST = (0, 3)  # which first has lists of plugins
Config = dict[str, Any]


def usable() -> dict[str, Config]:
    """Return the networks of the kind bridge that are configured here, all of whose plugins are here, too; by name."""
    found: dict[str, Config] = {}
    with contextlib.suppress(OSError):
        for path in sorted(CONFIGURATION.iterdir()):
            if path.suffix in (".conf", ".conflist", ".json"):
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                    config = _as_list(json.loads(path.read_bytes()))
                    is_bridge = config["plugins"][0]["type"] == "bridge"  # of others we know no way to keep them silent
                    if is_bridge and _version(config) >= _OLDEST and all(_find(p["type"]) for p in config["plugins"]):
                        found.setdefault(config["name"], config)
    return found


def _as_list(document: Config) -> Config:
    """Return what one file configures as a list of plugins. Raises: KeyError for what is no configuration."""
    if "plugins" in document:
        return {"name": document["name"], "cniVersion": document.get("cniVersion", "0.1.0"), "plugins": list(document["plugins"])}
    return {"name": document["name"], "cniVersion": document.get("cniVersion", "0.1.0"), "plugins": [document]}


def _version(config: Config) -> tuple[int, ...]:
    return tuple(int(n) for n in str(config["cniVersion"]).split("."))


def _find(plugin: str) -> str | None:
    if "/" in plugin:
        return None
    return next((p for d in PLUGINS if os.access(p := os.path.join(d, plugin), os.X_OK)), None)


def attachments(name: str) -> tuple[Attachment, ...]:
    """Return what a network namespace is attached to."""
    return tuple(a for a, _, _ in _remembered(name))


def _namespaces(document: Config) -> list[str]:
    """Return the paths of network namespaces in what is remembered of an attachment."""
    interfaces = (document.get("result") or {}).get("interfaces") or ()
    return [document.get("netns", ""), *(i.get("sandbox", "") for i in interfaces)]


def _remembered(name: str) -> list[tuple[Attachment, Path, Config]]:
    """Return what is remembered of a network namespace: the attachment, the file, and all that is in it."""
    found = []
    for cache in _CACHES:
        with contextlib.suppress(OSError):
            for path in sorted(cache.iterdir()):
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                    document = json.loads(path.read_bytes())
                    if document["kind"] == _KIND and any(network.name_of(p) == name for p in _namespaces(document)):
                        found.append((Attachment.from_cache(document), path, document))
    return found


def add(name: str, attachment: Attachment, interface: Interface) -> None:
    """Attach a network namespace; the interface gets its MAC and its addresses where the plugins heed what is asked of them.

    Raises: NetworkFailed; `delete_all` takes back what was done.
    """
    config = usable().get(attachment.network)
    if config is None:
        raise NetworkFailed(
            f"there is no CNI network {attachment.network} in {CONFIGURATION}, or not all of its plugins are here"
        )
    addresses = [a.address for a in interface.addresses if not ipaddress.ip_interface(a.address).is_link_local]
    asked = {**attachment.capabilities, "ips": addresses, "mac": interface.mac}
    kept = [(k, v) for k, v in attachment.arguments if k not in ("IgnoreUnknown", "IP", "MAC")]
    first = [("IP", addresses[0].partition("/")[0])] if addresses else []
    arguments = [("IgnoreUnknown", "1"), *kept, *first, ("MAC", interface.mac)]
    remembered: Config = {
        "kind": _KIND,
        "containerId": attachment.container_id,
        "config": base64.b64encode(json.dumps(config).encode()).decode(),
        "ifName": attachment.interface,
        "networkName": attachment.network,
        "netns": _path(name),
        "cniArgs": [list(a) for a in arguments],
        "capabilityArgs": attachment.capabilities,
    }
    path = _CACHE / f"{attachment.network}-{attachment.container_id}-{attachment.interface}"
    if (other := _owner(path)) not in (None, name):
        raise NetworkFailed(
            f"{attachment.container_id} is attached to the CNI network {attachment.network} already, by the namespace {other}"
        )
    # Before, so that whoever finds what a killed one left knows what to take back.
    _remember(path, remembered)
    result = None
    for plugin in config["plugins"]:
        given = {**plugin.get("args", {}), "cni": {**plugin.get("args", {}).get("cni", {}), "ips": addresses}}
        result = _execute("ADD", name, config, {**plugin, "args": given}, attachment, arguments, asked, result)
    _remember(path, {**remembered, "result": result})


def _owner(path: Path) -> str | None:
    """Return the network namespace that is remembered in a file, where that namespace is there."""
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        for where in _namespaces(json.loads(path.read_bytes())):
            if where and os.path.exists(where):
                return network.name_of(where) or str(where)
    return None


def _remember(path: Path, document: Config) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.write_text(json.dumps(document))
        new.chmod(0o600)
        new.rename(path)
    except OSError as e:
        raise NetworkFailed(f"cannot write {path}: {e.strerror}") from e


def delete_all(name: str) -> None:
    """Take a network namespace off all that it is attached to. Idempotent. Raises: NetworkFailed, when the rest is done."""
    errors: list[NetworkFailed] = []
    for attachment, path, document in _remembered(name):
        failed = len(errors)
        try:
            config = _as_list(json.loads(base64.b64decode(document["config"])))
            for plugin in reversed(config["plugins"]):
                result, asked = document.get("result"), attachment.capabilities
                try:
                    _execute("DEL", name, config, plugin, attachment, attachment.arguments, asked, result)
                except NetworkFailed as e:
                    errors.append(e)  # the others have something to take back, too
            if len(errors) == failed:
                path.unlink(missing_ok=True)
        except (ValueError, KeyError, TypeError, OSError) as e:
            errors.append(NetworkFailed(f"{path} cannot be understood: {e}", hint="take the container off that network by hand"))
    if errors:
        raise errors[0]


def _path(name: str) -> str:
    return f"{network.DIRECTORY}/{name}"


def _execute(
    command: str,
    name: str,
    config: Config,
    plugin: Config,
    attachment: Attachment,
    arguments: Any,
    asked: dict[str, Any],
    previous: Config | None,
) -> Config:
    """Run one plugin; return its result. Raises: NetworkFailed with what it says."""
    program = _find(str(plugin["type"]))
    if program is None:
        raise NetworkFailed(f"there is no CNI plugin {plugin['type']} in {', '.join(PLUGINS)}")
    able = plugin.get("capabilities") or {}
    given = {k: v for k, v in plugin.items() if k != "capabilities"} | {
        "name": config["name"],
        "cniVersion": config["cniVersion"],
    }
    if heard := {k: v for k, v in asked.items() if able.get(k)}:
        given["runtimeConfig"] = heard
    if previous is not None:
        given["prevResult"] = previous
    env = {
        **os.environ,
        "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": attachment.container_id,
        "CNI_NETNS": _path(name),
        "CNI_IFNAME": attachment.interface,
        "CNI_ARGS": ";".join(f"{k}={v}" for k, v in arguments),
        "CNI_PATH": ":".join(PLUGINS),
    }
    who = f"the CNI plugin {plugin['type']} of {config['name']}"
    try:
        done = subprocess.run(
            [program], input=json.dumps(given), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=env
        )
    except OSError as e:
        raise NetworkFailed(f"{who} cannot be run: {e.strerror}") from e
    except subprocess.TimeoutExpired as e:
        raise NetworkFailed(f"{who} does not end") from e
    try:
        said = json.loads(done.stdout) if done.stdout.strip() else {}
    except ValueError:
        said = {}
    if done.returncode:
        words = ": ".join(str(said[k]) for k in ("msg", "details") if said.get(k)) if isinstance(said, dict) else ""
        raise NetworkFailed(f"{who}: {words or done.stderr.strip() or f'exit status {done.returncode}'}")
    return said if isinstance(said, dict) else {}
