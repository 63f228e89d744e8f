"""A network namespace as a value: what is read of `ip`, what another host may send, and what is announced."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

from migrate import announce, network
from migrate.network import Address, Interface, Network, Route

OUTSIDE: list[dict[str, Any]] = [
    {"ifindex": 2, "ifname": "br0", "linkinfo": {"info_kind": "bridge", "info_data": {"vlan_filtering": 0}}},
    {"ifindex": 3, "ifname": "br1", "linkinfo": {"info_kind": "bridge", "info_data": {"vlan_filtering": 1}}},
    {
        "ifindex": 7,
        "link_index": 4,
        "link_netnsid": 0,
        "ifname": "web0",
        "master": "br0",
        "linkinfo": {"info_kind": "veth", "info_slave_kind": "bridge"},
    },
    {"ifindex": 8, "link_index": 5, "link_netnsid": 0, "ifname": "web1", "linkinfo": {"info_kind": "veth"}},
    # A pair that is wholly on the host, with the same numbers.
    {
        "ifindex": 9,
        "link_index": 6,
        "ifname": "a",
        "master": "br0",
        "linkinfo": {"info_kind": "veth", "info_slave_kind": "bridge"},
    },
]


def inside(**changes: Any) -> dict[str, Any]:
    fields = {"ifindex": 4, "link_index": 7, "ifname": "eth0", "address": "02:00:00:00:00:01", "mtu": 1400}
    return {**fields, "linkinfo": {"info_kind": "veth"}, **changes}


def test_links() -> None:
    addresses, unsure = network.read_addresses(
        [
            {
                "ifname": "eth0",
                "addr_info": [
                    {"local": "10.0.0.2", "prefixlen": 24, "broadcast": "10.0.0.255"},
                    {"local": "fd00::2", "prefixlen": 64, "noprefixroute": True},
                    {"local": "fd00::99", "prefixlen": 64, "temporary": True},
                ],
            }
        ]
    )
    assert unsure == ()
    found, unsupported = network.read_links([{"ifindex": 1, "ifname": "lo"}, inside()], OUTSIDE, addresses, 0)
    expected = (Address("10.0.0.2/24", "10.0.0.255"), Address("fd00::2/64", "", False))
    assert found == (Interface("eth0", "02:00:00:00:00:01", 1400, "web0", "br0", expected),)
    assert unsupported == ()
    assert network.plain_bridges(OUTSIDE) == ("br0",)


@pytest.mark.parametrize(
    "link",
    [
        inside(ifindex=5, link_index=8),  # on no bridge
        inside(ifindex=6, link_index=9),  # not across namespaces
        inside(ifindex=9),  # the other end is another one's
        inside(linkinfo={"info_kind": "macvlan"}, flags=["UP"]),
        {"ifindex": 4, "ifname": "enp0s3"},  # a device of the host's that was moved in
    ],
)
def test_what_cannot_be_made_anew_is_said(link: dict[str, Any]) -> None:
    found, unsupported = network.read_links([link], OUTSIDE, {}, 0)
    assert found == () and unsupported[0].startswith(link["ifname"])


def test_numbers_of_another_namespace_are_not_taken_for_ours() -> None:
    for namespace_id in (1, None):
        found, unsupported = network.read_links([inside()], OUTSIDE, {}, namespace_id)
        assert found == () and len(unsupported) == 1


def test_addresses_that_cannot_be_made_anew() -> None:
    loopback = {"ifname": "lo", "addr_info": [{"local": "127.0.0.1", "prefixlen": 8}, {"local": "10.7.7.7", "prefixlen": 32}]}
    to_one = {"ifname": "eth0", "addr_info": [{"local": "10.1.0.1", "address": "10.1.0.2", "prefixlen": 32}]}
    _, unsupported = network.read_addresses([loopback, to_one])
    assert unsupported == ("the address 10.7.7.7 of lo", "the address 10.1.0.1 of eth0")


def test_routes_are_those_that_somebody_added() -> None:
    found, unsupported = network.read_routes(
        [
            {"dst": "default", "gateway": "10.0.0.1", "dev": "eth0", "flags": ["onlink"]},
            {"dst": "10.0.0.0/24", "dev": "eth0", "protocol": "kernel", "scope": "link", "prefsrc": "10.0.0.2"},
            {"dst": "10.9.0.0/16", "dev": "eth0", "scope": "link", "metric": 7, "protocol": "static", "flags": []},
            {"type": "local", "dst": "10.0.0.2", "dev": "eth0", "table": "local"},
            {"dst": "default", "gateway": "fe80::1", "dev": "eth0", "metric": 1024, "pref": "medium"},
            {"dst": "default", "gateway": "fe80::2", "dev": "eth0", "protocol": "ra", "pref": "medium"},
            {"dst": "10.7.0.0/16", "nexthops": [{}]},
            {"type": "blackhole", "dst": "10.8.0.0/16"},
        ]
    )
    assert found == (
        Route("10.9.0.0/16", "eth0", scope="link", protocol="static", metric=7),
        Route("default", "eth0", "10.0.0.1", onlink=True),
        Route("default", "eth0", "fe80::1", metric=1024, is_ipv6=True),
    )
    assert unsupported == ("the route to 10.7.0.0/16", "the route to 10.8.0.0/16")


def test_rules() -> None:
    usual = [{"priority": 0, "src": "all", "table": "local"}, {"priority": 32766, "src": "all", "table": "main"}]
    assert not network.has_own_rules(usual)
    assert network.has_own_rules([*usual, {"priority": 5, "src": "10.0.0.0", "srclen": 8, "table": "5"}])
    assert network.has_own_rules([*usual, {"priority": 5, "src": "all", "fwmark": "0x1", "table": "main"}])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/run/netns/web", "web"),
        ("/var/run/netns/cni-1", "cni-1"),
        ("/proc/7/ns/net", None),
        ("/run/netns/../x", None),
        ("/run/netns/..", None),
        ("/run/netns/", None),
        ("/run/netns/a/b", None),
    ],
)
def test_names(path: str, name: str | None) -> None:
    assert network.name_of(path) == name


WEB = Network(
    "web",
    (Interface("eth0", "02:00:00:00:00:01", 1400, "web0", "br0", (Address("10.0.0.2/24", "10.0.0.255"), Address("fe80::2/64"))),),
    (Route("default", "eth0", "10.0.0.1"), Route("fd01::/64", "eth0", is_ipv6=True)),
    {"net.core.somaxconn": "100"},
)


def test_it_crosses_the_wire() -> None:
    assert Network.from_json(WEB.as_dict()) == WEB
    assert WEB.addresses == ["10.0.0.2"]
    assert WEB.words() == "eth0 02:00:00:00:00:01 on br0 with 10.0.0.2/24"


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("name",), "../web"),
        (("name",), "a\nb"),
        (("interfaces", 0, "name"), "-all"),
        (("interfaces", 0, "name"), "eth0 up"),
        (("interfaces", 0, "bridge"), ""),
        (("interfaces", 0, "peer"), "x\nlink del br0"),
        (("interfaces", 0, "mac"), "02:00:00:00:00:01 up"),
        (("interfaces", 0, "mtu"), "1400"),
        (("interfaces", 0, "addresses", 0, "address"), "10.0.0.2/24 dev lo"),
        (("routes", 0, "gateway"), "10.0.0.1\nlink del br0"),
        (("routes", 0, "gateway"), "fe80::1%x dev lo"),
        (("routes", 0, "destination"), "0/0 dev lo"),
        (("routes", 0, "table"), "main\n"),
        (("routes", 0, "metric"), -2),
        (("sysctl",), {"net.../../kernel.core_pattern": "|x"}),
        (("sysctl",), {"kernel.core_pattern": "|x"}),
    ],
)
def test_what_would_be_more_than_an_argument_is_refused(where: tuple[Any, ...], value: Any) -> None:
    document: Any = WEB.as_dict()
    for level in ("interfaces", "routes"):
        document[level] = list(document[level])
    document["interfaces"][0]["addresses"] = list(document["interfaces"][0]["addresses"])
    at = document
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    with pytest.raises((ValueError, TypeError)):
        Network.from_json(document)


def test_announcements() -> None:
    request, advertisement = announce.frames("02:00:00:00:00:01", ["10.0.0.2", "fd00::2"])
    mac = bytes.fromhex("020000000001")
    assert request[:12] == b"\xff" * 6 + mac and request[12:14] == b"\x08\x06" and len(request) == 42
    assert request[22:32] == mac + socket.inet_aton("10.0.0.2"), "the sender"
    assert request[38:] == socket.inet_aton("10.0.0.2"), "the one that is asked for"
    source, destination, body = advertisement[22:38], advertisement[38:54], advertisement[54:]
    assert source == socket.inet_pton(socket.AF_INET6, "fd00::2") and destination == socket.inet_pton(socket.AF_INET6, "ff02::1")
    assert body[0] == 136 and body[8:24] == source and body[24:] == b"\x02\x01" + mac
    # With a right checksum, the sum over all of it is all ones.
    total = sum(struct.unpack("!36H", source + destination + struct.pack("!II", len(body), 58) + body))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert total == 0xFFFF
