"""Tell the neighbours where addresses are now: gratuitous ARP and unsolicited neighbour advertisements, several times.

A program of its own, run inside of a network namespace; it needs nothing but the interpreter. It reads one line, a list of
[interface, MAC, [addresses]] as JSON, when it is time. Switches learn the port from the first frame; the others are for those
that are lost while a port comes up.

Source: RFC 5227 (ARP announcements), RFC 4861 section 7.2.6.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import struct
import sys
import time

# The steps are QEMU's: soon, and then further and further apart.
PAUSES_S = (0.0, 0.05, 0.1, 0.15, 0.2)
_ETHERTYPE_ARP, _ETHERTYPE_IPV6 = 0x0806, 0x86DD
_ADVERTISEMENT, _OVERRIDE = 136, 0x20000000
_ALL_NODES = bytes.fromhex("ff020000000000000000000000000001")


def arp(mac: bytes, address: bytes) -> bytes:
    """Return an announcement as an Ethernet frame: a request for one's own address, sent to everybody. Pure."""
    head = b"\xff" * 6 + mac + struct.pack("!H", _ETHERTYPE_ARP)
    return head + struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + mac + address + bytes(6) + address


def advertisement(mac: bytes, address: bytes) -> bytes:
    """Return an unsolicited neighbour advertisement as an Ethernet frame. Pure."""
    body = struct.pack("!BBHI", _ADVERTISEMENT, 0, 0, _OVERRIDE) + address + b"\x02\x01" + mac
    pseudo = address + _ALL_NODES + struct.pack("!II", len(body), socket.IPPROTO_ICMPV6)
    body = body[:2] + struct.pack("!H", _checksum(pseudo + body)) + body[4:]
    head = b"\x33\x33\x00\x00\x00\x01" + mac + struct.pack("!H", _ETHERTYPE_IPV6)
    return head + struct.pack("!IHBB", 6 << 28, len(body), socket.IPPROTO_ICMPV6, 255) + address + _ALL_NODES + body


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def frames(mac: str, addresses: list[str]) -> list[bytes]:
    """Return what announces addresses. Pure."""
    sender = bytes.fromhex(mac.replace(":", ""))
    parsed = [ipaddress.ip_address(a) for a in addresses]
    return [(arp if a.version == 4 else advertisement)(sender, a.packed) for a in parsed]


def main() -> None:
    line = sys.stdin.readline()
    if not line:
        return
    ready = []
    for name, mac, addresses in json.loads(line):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        sock.bind((name, 0))
        ready.append((sock, frames(mac, addresses)))
    for pause_s in PAUSES_S:
        time.sleep(pause_s)
        for sock, what in ready:
            for frame in what:
                try:
                    sock.send(frame)
                except OSError:
                    pass  # its carrier is not there yet, or not any more: the next one may get through


if __name__ == "__main__":
    main()
