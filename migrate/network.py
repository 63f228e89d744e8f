"""A container's network namespace as a value: what is in it, and how it hangs on its host. Pure.

It stands below /run/netns by a name, as `ip netns` and CNI make them, and each interface in it is one end of a veth pair whose
other end is a port of a bridge of the host. So it can be made anew on another host, with nobody noticing: with the host's end
down there is no carrier, and nothing goes out of it or comes in, though addresses, routes and restored sockets are all there.
"""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Self

DIRECTORY = "/run/netns"
_NAME = re.compile(r"(?!-|\.\.?$)[A-Za-z0-9_.:-]{1,200}")
_DEVICE = re.compile(r"(?!-|\.\.?$)[A-Za-z0-9_.@-]{1,15}")
_IP = re.compile(r"[0-9a-fA-F.:/]{2,60}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_SYSCTL = re.compile(r"net(\.[A-Za-z0-9_-]+)+")
_WORD = re.compile(r"[a-z0-9_]{1,20}")
_CNI, _ARGUMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"), re.compile(r"[ -:<-~]{0,1000}")
_CAPABILITIES_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Address:
    """`address` with its prefix length; `own_prefix` is False where no route came with it."""

    address: str
    broadcast: str = ""
    own_prefix: bool = True


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface, and the bridge that the host's end `peer` is a port of."""

    name: str
    mac: str
    mtu: int
    peer: str
    bridge: str
    addresses: tuple[Address, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """What somebody has added to a routing table; `metric` is -1 where none was said."""

    destination: str
    device: str
    gateway: str = ""
    source: str = ""
    scope: str = ""
    protocol: str = ""
    table: str = ""
    metric: int = -1
    onlink: bool = False
    is_ipv6: bool = False


@dataclass(frozen=True, slots=True)
class Attachment:
    """An interface that a network of CNI has made. `capabilities` are what plugins were asked for, such as published ports."""

    network: str
    interface: str
    container_id: str
    arguments: tuple[tuple[str, str], ...] = ()
    capabilities: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_cache(cls, document: dict[str, Any]) -> Self:
        """Read what libcni remembers of it. Raises: ValueError, TypeError, KeyError."""
        return cls.from_json(
            {
                "network": document["networkName"],
                "interface": document["ifName"],
                "container_id": document["containerId"],
                "arguments": document.get("cniArgs") or (),
                "capabilities": document.get("capabilityArgs") or {},
            }
        )

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """Read what another host sent. Raises: ValueError, TypeError, KeyError."""
        capabilities = document["capabilities"]
        if not isinstance(capabilities, dict) or len(json.dumps(capabilities)) > _CAPABILITIES_BYTES:
            raise ValueError("that is not what a CNI plugin can be asked for")
        return cls(
            network=_matching(_CNI, document["network"]),
            interface=_matching(_DEVICE, document["interface"]),
            container_id=_matching(_CNI, document["container_id"]),
            arguments=tuple((_matching(_CNI, k), _matching(_ARGUMENT, v)) for k, v in document["arguments"]),
            capabilities=capabilities,
        )


@dataclass(frozen=True, slots=True)
class Network:
    """A network namespace. `unsupported` are the things in it that cannot be made anew, `has_rules` tells of a firewall in it."""

    name: str
    interfaces: tuple[Interface, ...] = ()
    routes: tuple[Route, ...] = ()
    sysctl: dict[str, str] = field(default_factory=dict)
    unsupported: tuple[str, ...] = ()
    has_rules: bool = False
    sharers: tuple[str, ...] = ()  # processes in it that are not the container's: "pid (name)"
    attachments: tuple[Attachment, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def addresses(self) -> list[str]:
        """Return all addresses, without prefix lengths; those of the link alone are not among them."""
        found = [a.address.partition("/")[0] for i in self.interfaces for a in i.addresses]
        return [a for a in found if not ipaddress.ip_address(a).is_link_local]

    def attachment_of(self, interface: Interface) -> Attachment | None:
        """Return by which network of CNI an interface was made; None for one that a person has made."""
        return next((a for a in self.attachments if a.interface == interface.name), None)

    def words(self) -> str:
        """Describe it to a person."""
        parts = []
        for i in self.interfaces:
            addresses = ", ".join(a.address for a in i.addresses if not ipaddress.ip_interface(a.address).is_link_local)
            made = self.attachment_of(i)
            where = f"the CNI network {made.network}" if made else i.bridge
            parts.append(f"{i.name} {i.mac} on {where} with {addresses or 'no address'}")
        return "; ".join(parts) or "loopback only"

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """Read what another host sent: all of it becomes arguments of commands. Raises: ValueError, TypeError, KeyError."""
        return cls(
            name=_matching(_NAME, document["name"]),
            interfaces=tuple(_interface(d) for d in document["interfaces"]),
            routes=tuple(_route(d) for d in document["routes"]),
            sysctl={_matching(_SYSCTL, k): _line(v) for k, v in document["sysctl"].items()},
            unsupported=tuple(map(str, document["unsupported"])),
            has_rules=bool(document["has_rules"]),
            sharers=tuple(map(str, document["sharers"])),
            attachments=tuple(Attachment.from_json(d) for d in document["attachments"]),
        )


def name_of(path: str) -> str | None:
    """Return the name of a namespace by its path; None where it is not one that `ip netns` would find."""
    directory, _, name = path.rpartition("/")
    return name if directory in (DIRECTORY, f"/var{DIRECTORY}") and _NAME.fullmatch(name) else None


def _matching(pattern: re.Pattern[str], text: Any) -> str:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise ValueError(f"{text!r} cannot be part of a network")
    return text


def _line(text: Any) -> str:
    return _matching(re.compile(r"[ -~\t]{0,1000}"), text)


def _ip(text: Any) -> str:
    return str(ipaddress.ip_address(_matching(_IP, text)))


def _interface_address(text: Any) -> str:
    return str(ipaddress.ip_interface(_matching(_IP, text)))


def _interface(d: dict[str, Any]) -> Interface:
    mtu = d["mtu"]
    if type(mtu) is not int or not 68 <= mtu <= 65535:
        raise ValueError(f"{mtu!r} is no MTU")
    return Interface(
        name=_matching(_DEVICE, d["name"]),
        mac=_matching(_MAC, d["mac"]),
        mtu=mtu,
        peer=_matching(_DEVICE, d["peer"]),
        bridge=_matching(_DEVICE, d["bridge"]),
        addresses=tuple(
            Address(_interface_address(a["address"]), _ip(a["broadcast"]) if a["broadcast"] else "", bool(a["own_prefix"]))
            for a in d["addresses"]
        ),
    )


def _route(d: dict[str, Any]) -> Route:
    metric = d["metric"]
    if type(metric) is not int or not -1 <= metric < 1 << 32:
        raise ValueError(f"{metric!r} is no metric")
    destination = d["destination"]
    if destination != "default":
        destination = str(ipaddress.ip_network(_matching(_IP, destination)))
    return Route(
        destination=destination,
        device=_matching(_DEVICE, d["device"]),
        gateway=_ip(d["gateway"]) if d["gateway"] else "",
        source=_ip(d["source"]) if d["source"] else "",
        scope=_matching(_WORD, d["scope"]) if d["scope"] else "",
        protocol=_matching(_WORD, d["protocol"]) if d["protocol"] else "",
        table=_matching(_WORD, d["table"]) if d["table"] else "",
        metric=metric,
        onlink=bool(d["onlink"]),
        is_ipv6=bool(d["is_ipv6"]),
    )


# What the kernel adds by itself, or takes away with the address or the interface.
_OWN_PROTOCOLS = {"kernel", "ra", "redirect"}
_UNICAST = {"", "unicast"}
_DEFAULT_RULES = {"local", "main", "default"}


def read_addresses(links: list[dict[str, Any]]) -> tuple[dict[str, tuple[Address, ...]], tuple[str, ...]]:
    """Read `ip -j addr`: the addresses of each interface, and those that cannot be made anew."""
    found, unsupported = {}, []
    for link in links:
        addresses = [a for a in link.get("addr_info", ()) if not a.get("temporary")]
        found[link["ifname"]] = tuple(
            Address(f"{a['local']}/{a['prefixlen']}", a.get("broadcast", ""), not a.get("noprefixroute")) for a in addresses
        )
        for a in addresses:
            if "address" in a or (link["ifname"] == "lo" and a["local"] not in ("127.0.0.1", "::1")):
                unsupported.append(f"the address {a['local']} of {link['ifname']}")
    return found, tuple(unsupported)


def is_parameter(key: str) -> bool:
    """Say whether this is the name of a kernel parameter of a network namespace, written with dots."""
    return _SYSCTL.fullmatch(key) is not None


def read_routes(documents: list[dict[str, Any]]) -> tuple[tuple[Route, ...], tuple[str, ...]]:
    """Read `ip -j route show table all`: the routes that somebody added, and those of them that cannot be made anew."""
    routes, unsupported = [], []
    for d in documents:
        if d.get("protocol") in _OWN_PROTOCOLS or d.get("dev") == "lo" or d.get("type") in ("local", "broadcast", "multicast"):
            continue
        gateway = d.get("gateway", "")
        if d.get("type", "") not in _UNICAST or "dev" not in d or {"nexthops", "nhid", "encap", "via"} & d.keys():
            unsupported.append(f"the route to {d.get('dst', '?')}")
            continue
        is_ipv6 = ":" in (d["dst"] if d["dst"] != "default" else gateway) or "pref" in d
        routes.append(
            Route(
                destination=d["dst"],
                device=d["dev"],
                gateway=gateway,
                source=d.get("prefsrc", ""),
                scope="" if is_ipv6 else d.get("scope", ""),
                protocol=d.get("protocol", ""),
                table=str(d.get("table", "")),
                metric=d.get("metric", -1),
                onlink="onlink" in d.get("flags", ()),
                is_ipv6=is_ipv6,
            )
        )
    # One by a gateway needs the way to it: the direct ones first.
    return tuple(sorted(routes, key=lambda r: bool(r.gateway))), tuple(unsupported)


def has_own_rules(documents: list[dict[str, Any]]) -> bool:
    """Read `ip -j rule`: whether there is one that is not in every namespace."""
    return any(
        d.get("table") not in _DEFAULT_RULES or d.get("src") != "all" or d.keys() - {"priority", "src", "table", "protocol"}
        for d in documents
    )


def read_links(
    inside: list[dict[str, Any]],
    outside: list[dict[str, Any]],
    addresses: dict[str, tuple[Address, ...]],
    namespace_id: int | None,
) -> tuple[tuple[Interface, ...], tuple[str, ...]]:
    """Read `ip -d -j link` in a namespace and on its host: the interfaces, and what of them cannot be made anew.

    Numbers of interfaces are the same in many namespaces: by `namespace_id` the host tells whose one is.
    """
    interfaces, unsupported = [], []
    peers = {(d["ifindex"], d.get("link_index")): d for d in outside if _kind(d) == "veth" and _is_joined(d, namespace_id)}
    for d in inside:
        name = d["ifname"]
        # The kernel puts a tunnel that is down into every namespace, for each module of its kind that is loaded.
        if name == "lo" or (_kind(d) not in ("veth", "") and "UP" not in d.get("flags", ()) and not addresses.get(name)):
            continue
        peer = peers.get((d.get("link_index"), d["ifindex"]))
        if _kind(d) != "veth" or peer is None:
            unsupported.append(
                f"{name}, which is {_kind(d) or 'a device of the host'}, not a veth pair with its other end on the host"
            )
            continue
        if peer.get("linkinfo", {}).get("info_slave_kind") != "bridge":
            unsupported.append(f"{name}, whose other end {peer['ifname']} is not a port of a bridge")
            continue
        interfaces.append(Interface(name, d["address"], d["mtu"], peer["ifname"], peer["master"], addresses.get(name, ())))
    return tuple(interfaces), tuple(unsupported)


def _is_joined(link: dict[str, Any], namespace_id: int | None) -> bool:
    return namespace_id is not None and link.get("link_netnsid") == namespace_id


def plain_bridges(links: list[dict[str, Any]]) -> tuple[str, ...]:
    """Read `ip -d -j link`: the bridges that do not filter VLANs."""
    return tuple(d["ifname"] for d in links if _kind(d) == "bridge" and not d["linkinfo"]["info_data"].get("vlan_filtering"))


def _kind(link: dict[str, Any]) -> str:
    return str(link.get("linkinfo", {}).get("info_kind", ""))
