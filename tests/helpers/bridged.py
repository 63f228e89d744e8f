"""A network namespace for a container, on a host of a bed, as an administrator would make it."""

from __future__ import annotations

from tests.helpers.bed import Bed

NET, MAC = "web", "02:fe:00:00:01:20"
ADDRESS, ADDRESS6 = "198.51.100.20", "fd00:feed::20"
CLIENT6 = "fd00:feed::100"
_SCRIPT = f"""
    ip netns add {NET}
    ip link add web0 mtu 1400 type veth peer name eth0 address {MAC} mtu 1400 netns {NET}
    ip link set web0 master {{bridge}} {{state}}
    ip -n {NET} link set lo up
    ip -n {NET} link set eth0 up
    ip -n {NET} addr add {ADDRESS}/24 brd + dev eth0
    ip -n {NET} addr add {ADDRESS6}/64 dev eth0 nodad
"""
_ROUTES = f"""
    ip -n {NET} route add default via 198.51.100.100
    ip -n {NET} route add 192.88.99.0/24 via 198.51.100.1 src {ADDRESS} metric 7
    ip -n {NET} -6 route add default via {CLIENT6}
"""


def attach(bed: Bed, host: str, bridge: str = "br0") -> None:
    """Make it, joined to the bridge, with routes of every kind."""
    bed.ok(host, "sh", "-ec", _SCRIPT.format(bridge=bridge, state="up") + _ROUTES)


def prepare(bed: Bed, host: str) -> None:
    """Make it with its host's end down, so that nothing is heard of it; without routes that ask for a carrier."""
    bed.ok(host, "sh", "-ec", _SCRIPT.format(bridge="br0", state="down"))


def detach(bed: Bed, host: str) -> None:
    """Remove it. Idempotent."""
    bed.run(host, "sh", "-c", f"ip netns del {NET}; ip link del web0")
