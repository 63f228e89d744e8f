"""Clients of a web server that is moved: they tell what they saw of it as one JSON object, when their standard input ends.

http_client.py fill ADDRESS SIZE COUNT      nothing is to be done
http_client.py load ADDRESS SIZE COUNT      opens so many connections, asks over all of them, and again in the end
http_client.py probe ADDRESS SIZE COUNT     asks again and again over one connection
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time


def ended() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def connect(address: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(address, timeout=600)
    connection.connect()
    # It would open another connection by itself when this one is closed.
    connection.auto_open = 0
    return connection


def ask(connection: http.client.HTTPConnection) -> bytes:
    connection.request("GET", "/file")
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200 or content.strip(b"x"):
        sys.exit(f"the answer was {answer.status}, {len(content)} bytes")
    return content


def load(address: str, count: int) -> dict[str, list[tuple[float, int]]]:
    connections = [connect(address) for _ in range(count)]
    expected = [ask(c) for c in connections]
    print("connected", flush=True)
    sys.stdin.readline()
    if [ask(c) for c in connections] != expected:
        sys.exit("what was answered is not what was answered before")
    return {"seen": []}


def probe(address: str) -> dict[str, list[float]]:
    """Return when each answer came, as the time of the day in s."""
    connection, seen = connect(address), []
    expected = ask(connection)
    print("connected", flush=True)
    while not ended():
        if ask(connection) != expected:
            sys.exit("an answer is not what was answered before")
        seen.append(time.time())
        time.sleep(0.001)
    return {"seen": seen}


def main() -> None:
    what, address, _, count = sys.argv[1:]
    if what != "fill":
        print(json.dumps(load(address, int(count)) if what == "load" else probe(address)))


if __name__ == "__main__":
    main()
