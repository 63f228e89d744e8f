"""Look at network namespaces of this host, make them, and join them to its bridges, by the commands of iproute2.

A made one is silent: the host's ends of its interfaces are down, so that there is no carrier, until `connect`. `ip` is a small
program: nothing here costs a start of the interpreter, and no namespace is entered by a process with threads.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

from migrate import cni, network
from migrate.errors import MigrateError, NetworkFailed
from migrate.network import Interface, Network, Route

_TIMEOUT_S = 5.0
# The kernel asks for a neighbour's address again after a second when its question was not heard, which it is not while there
# is no carrier: clients would wait for that second. Units: milliseconds, questions.
_ASK_AGAIN_MS, _QUESTIONS = 10, 6000
_NEIGHBOURS = ("arp_cache", "ndisc_cache")


def _run(*argv: str, given: str | None = None) -> str:
    """Raises: NetworkFailed with the command's own words."""
    env = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "LC_ALL": "C"}
    try:
        done = subprocess.run(argv, input=given or "", capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=env)
    except OSError as e:
        raise NetworkFailed(f"cannot run {argv[0]}: {e.strerror}", hint="are iproute2 and util-linux installed?") from e
    except subprocess.TimeoutExpired as e:
        raise NetworkFailed(f"{' '.join(argv)} does not end") from e
    if done.returncode:
        raise NetworkFailed(f"{' '.join(argv)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout


def _json(*argv: str) -> list[dict[str, Any]]:
    try:
        return [d for d in json.loads(_run(*argv) or "[]") if d]
    except ValueError as e:
        raise NetworkFailed(f"{' '.join(argv)} prints what is no JSON: {e}") from e


def describe(name: str, sysctl: dict[str, str]) -> Network:
    """Return what is in a network namespace of this host, but for its processes.

    `sysctl` are the kernel parameters that the container asks for. Raises: NetworkFailed.
    """
    addresses, unsure = network.read_addresses(_json("ip", "-j", "-n", name, "addr"))
    outside = _json("ip", "-d", "-j", "link")
    interfaces, unsupported = network.read_links(_json("ip", "-d", "-j", "-n", name, "link"), outside, addresses, _id(name))
    routes, lost = network.read_routes(_json("ip", "-j", "-n", name, "route", "show", "table", "all"))
    parameters = {k: v for k, v in sysctl.items() if k.startswith("net")}
    others = [*unsupported, *unsure, *lost, *(k for k in parameters if not network.is_parameter(k))]
    if any(network.has_own_rules(_json("ip", "-j", "-n", name, family, "rule")) for family in ("-4", "-6")):
        others.append("its routing rules (ip rule)")
    attachments = cni.attachments(name)
    usable = network.plain_bridges(outside)
    others += [f"{i.name}, since the bridge {i.bridge} filters VLANs" for i in interfaces if i.bridge not in usable]
    known = {i.name for i in interfaces}
    others += [f"{a.interface}, by which the CNI network {a.network} joins it" for a in attachments if a.interface not in known]
    return Network(
        name=name,
        interfaces=interfaces,
        routes=routes,
        sysctl={k: v for k, v in parameters.items() if network.is_parameter(k)},
        unsupported=tuple(others),
        has_rules=_has_firewall(name),
        attachments=attachments,
    )


def _id(name: str) -> int | None:
    """Return the number by which interfaces of this host name a namespace; None where none has its other end there."""
    return next((d.get("id") for d in _json("ip", "-j", "netns", "list") if d.get("name") == name), None)


def _has_firewall(name: str) -> bool:
    """Say whether there are rules of nft, or of the iptables that is made of it."""
    with contextlib.suppress(NetworkFailed):
        return bool(_run(*_inside(name), "nft", "list", "ruleset").strip())
    return False


def _inside(name: str) -> tuple[str, ...]:
    return ("nsenter", f"--net={network.DIRECTORY}/{name}")


def users(name: str) -> tuple[str, ...]:
    """Return the processes in a namespace: "pid (name)". Raises: OSError."""
    own = inode(name)
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{entry}/ns/net").st_ino == own:
                    found.append(f"{entry} ({Path('/proc', entry, 'comm').read_text().strip()})")
    return tuple(found)


def inode(name: str) -> int:
    """Return what tells a namespace from all others of this boot. Raises: OSError."""
    return os.stat(f"{network.DIRECTORY}/{name}").st_ino


def exists(name: str) -> bool:
    """Say whether there is a namespace of that name here."""
    return os.path.lexists(f"{network.DIRECTORY}/{name}")


def bridges() -> tuple[str, ...]:
    """Return the bridges of this host that do not filter VLANs. Raises: NetworkFailed."""
    return network.plain_bridges(_json("ip", "-d", "-j", "link", "show", "type", "bridge"))


def own_addresses() -> tuple[str, ...]:
    """Return the addresses of this host itself. Raises: NetworkFailed."""
    return tuple(a["local"] for link in _json("ip", "-j", "addr") for a in link.get("addr_info", ()) if "local" in a)


def make(net: Network) -> None:
    """Make a namespace and all that is in it, silent. Raises: NetworkFailed; nothing is left then."""
    plain = [i for i in net.interfaces if net.attachment_of(i) is None]
    if missing := {i.bridge for i in plain} - set(bridges()):
        raise NetworkFailed(f"there is no bridge {', '.join(sorted(missing))} here, or it filters VLANs")
    _run("ip", "netns", "add", net.name)  # fails when somebody has one of that name: it stays theirs
    try:
        _batch("-n", net.name, lines=["link set lo up"])
        taken = _devices()
        for interface in plain:
            peer = _free_name(interface.peer, taken)
            taken.add(peer)
            _make_pair(net.name, interface, peer)
        if net.attachments:
            _attach(net)
        _set_parameters(net)
        for is_ipv6, family in ((False, "-4"), (True, "-6")):
            _batch(family, "-n", net.name, lines=[_route(r) for r in net.routes if r.is_ipv6 == is_ipv6])
        _ask(net, dict.fromkeys(_NEIGHBOURS, (_ASK_AGAIN_MS, _QUESTIONS)))
    except BaseException:
        with contextlib.suppress(MigrateError):
            remove(net.name)
        raise


def _ask(net: Network, how: dict[str, tuple[int, int]]) -> None:
    """Say after how many milliseconds, and how often, neighbours are asked for their addresses again."""
    # An interface too small for IPv6, or a host without it, has no table for its neighbours.
    there = {(d["name"], d.get("dev")) for d in _json("ip", "-j", "-n", net.name, "ntable", "show")}
    lines = [
        f"ntable change name {table} dev {i.name} retrans {retrans_ms} mcast_probes {probes}"
        for table, (retrans_ms, probes) in how.items()
        for i in net.interfaces
        if (table, i.name) in there
    ]
    _batch("-n", net.name, lines=lines)


def calm(net: Network) -> None:
    """Ask for neighbours as usual again, when the carrier is there. Idempotent. Raises: NetworkFailed."""
    # Loopback has what interfaces have from the beginning, and nobody changes it.
    usual = {
        d["name"]: (int(d["retrans"]), int(d["mcast_probes"]))
        for d in _json("ip", "-j", "-n", net.name, "ntable", "show", "dev", "lo")
    }
    _ask(net, {table: usual[table] for table in _NEIGHBOURS if table in usual})
    _set_parameters(net, only=".neigh.")


def _set_parameters(net: Network, only: str = "") -> None:
    for key, value in net.sysctl.items():
        if only in key:
            _run(*_inside(net.name), "tee", "/proc/sys/" + key.replace(".", "/"), given=value)


def _devices() -> set[str]:
    return {str(d["ifname"]) for d in _json("ip", "-j", "link")}


def _attach(net: Network) -> None:
    """Have CNI's plugins make their interfaces, and see that these are what they were. Raises: NetworkFailed.

    Plugins put their interfaces up, and announce them: until these are down, no bridge lets anything in from what is new.
    """
    table = _mute_table(net.name)
    known = ", ".join(f'"{d}"' for d in sorted(_devices()))
    rules = (
        f"table bridge {table} {{ chain new {{ type filter hook prerouting priority -300; iifname != {{ {known} }} drop; }}; }}"
    )
    _run("nft", "-f", "-", given=rules)
    try:
        for interface in net.interfaces:
            if made := net.attachment_of(interface):
                cni.add(net.name, made, interface)
        disconnect(joints(net.name))
    finally:
        _run("nft", "delete", "table", "bridge", table)
    found = {d["ifname"]: d for d in _json("ip", "-j", "-n", net.name, "addr")}
    joined = {i.name for i in joints(net.name)}
    for interface in net.interfaces:
        made = net.attachment_of(interface)
        if made is None:
            continue
        if interface.name not in joined:
            raise NetworkFailed(f"the CNI network {made.network} did not join {interface.name} to a bridge here")
        has = {f"{a['local']}/{a['prefixlen']}" for a in found[interface.name]["addr_info"] if a.get("scope") != "link"}
        wanted = {a.address for a in interface.addresses if not ipaddress.ip_interface(a.address).is_link_local}
        if has != wanted:
            words = f"the CNI network {made.network} gave {interface.name} {', '.join(sorted(has)) or 'no address'}"
            hint = "its IPAM plugin must give the addresses that it is asked for, as host-local and static do"
            raise NetworkFailed(f"{words} here, not {', '.join(sorted(wanted))}", hint=hint)
        _batch("-n", net.name, lines=[f"link set dev {interface.name} address {interface.mac} mtu {interface.mtu}"])


def _mute_table(name: str) -> str:
    return f"ferry{zlib.crc32(name.encode()):08x}"


def _make_pair(name: str, interface: Interface, peer: str) -> None:
    mtu, device = str(interface.mtu), interface.name
    pair = f"name {peer} mtu {mtu} type veth peer name {device} address {interface.mac} mtu {mtu} netns {name}"
    _run("ip", "link", "add", *pair.split())
    _run("ip", "link", "set", "dev", peer, "master", interface.bridge)
    # nodad: an address that is asked for is not ours before somebody hears the question, and nobody is to hear it.
    lines = [f"link set dev {device} up"]
    for a in interface.addresses:
        words = [] if a.own_prefix else ["noprefixroute"]
        words += ["nodad"] if ":" in a.address else []
        words += ["brd", a.broadcast] if a.broadcast else []
        lines.append(" ".join(["addr", "replace", a.address, "dev", device, *words]))
    _batch("-n", name, lines=lines)


def _free_name(wanted: str, taken: set[str]) -> str:
    return wanted if wanted not in taken else next(n for k in range(10000) if (n := f"ferry{k}") not in taken)


def _route(route: Route) -> str:
    words = ["route", "replace", route.destination]
    if route.gateway:
        words += ["via", route.gateway]
    words += ["dev", route.device]
    for key, value in (("src", route.source), ("proto", route.protocol), ("scope", route.scope), ("table", route.table)):
        words += [key, value] if value else []
    words += ["metric", str(route.metric)] if route.metric >= 0 else []
    return " ".join([*words, *(["onlink"] if route.onlink else [])])


def _batch(*options: str, lines: list[str]) -> None:
    if lines:
        _run("ip", *options, "-batch", "-", given="".join(f"{line}\n" for line in lines))


def joints(name: str) -> list[Interface]:
    """Return the interfaces of a namespace, without addresses, as they are joined to this host; in the order of their names.

    There are none where there is no such namespace. Raises: NetworkFailed.
    """
    if not exists(name):
        return []
    inside, outside = _json("ip", "-d", "-j", "-n", name, "link"), _json("ip", "-d", "-j", "link")
    interfaces, _ = network.read_links(inside, outside, {}, _id(name))
    return sorted(interfaces, key=lambda i: i.name)


def ports(bridge: str) -> list[str]:
    """Return the ports of a bridge. Raises: NetworkFailed."""
    return [str(d["ifname"]) for d in _json("ip", "-j", "link", "show", "master", bridge) if "ifname" in d]


def connect(joints: list[Interface]) -> None:
    """Put the host's ends up: there is a carrier, and the bridge forwards at once. Idempotent. Raises: NetworkFailed."""
    _batch(lines=[f"link set dev {i.peer} up" for i in joints])


def disconnect(joints: list[Interface]) -> None:
    """Take the carrier away. Idempotent. Raises: NetworkFailed."""
    _batch(lines=[f"link set dev {i.peer} down" for i in joints])


def remove(name: str) -> None:
    """Remove a namespace and its interfaces, and take it off CNI's networks. Idempotent.

    Raises: NetworkFailed, when the rest is done.
    """
    if not exists(name):
        return
    with contextlib.suppress(NetworkFailed):  # of one that was killed while it attached it
        _run("nft", "delete", "table", "bridge", _mute_table(name))
    try:
        cni.delete_all(name)
    finally:
        # With the namespace alone they would go, too, but some time later.
        with contextlib.suppress(NetworkFailed):
            for joint in joints(name):
                _run("ip", "link", "del", "dev", joint.peer)
        _run("ip", "netns", "del", name)


def forget(name: str) -> None:
    """Take a namespace that went with a reboot off CNI's networks: their leases are on disk. Idempotent."""
    if not exists(name):
        with contextlib.suppress(NetworkFailed):
            cni.delete_all(name)


class Announcer:
    """Tells the neighbours of a namespace where its addresses are now: started early, it waits for the word."""

    def __init__(self, name: str) -> None:
        argv = [*_inside(name), sys.executable, "-I", str(Path(__file__).with_name("announce.py"))]
        try:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
        except OSError:
            self._process = None  # without it they find out by themselves, with the container's first packet

    def announce(self, net: Network) -> None:
        """Say the word; it goes on for half a second by itself."""
        if self._process is None or self._process.stdin is None or self._process.stdin.closed:
            return
        what = [[i.name, i.mac, [a.address.partition("/")[0] for a in i.addresses]] for i in net.interfaces]
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.close()

    def close(self) -> None:
        """See it end, which it does at once where it was not told to announce. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None and not process.stdin.closed:
            process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
