"""Clients of a PostgreSQL that is moved: they tell what they saw of it as one JSON object, when their standard input ends.

postgres_client.py fill ADDRESS SCALE RATE      pgbench's tables; ends by itself
postgres_client.py load ADDRESS SCALE RATE      pgbench with four connections, so many transactions a second; 0: as many as can be
postgres_client.py probe ADDRESS SCALE RATE     one row after the other is inserted; each answer must be the next number
"""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
import threading
import time

import psycopg

_PGBENCH = ("-h", "{address}", "-U", "postgres", "postgres")


def pgbench(address: str, *options: str) -> list[str]:
    return ["pgbench", *options, *(w.format(address=address) for w in _PGBENCH)]


def ended() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def load(address: str, rate: int) -> dict[str, list[tuple[float, float]]]:
    """Return how many transactions were done, as (time of the day in s, count), about every second."""
    options = ["-n", "-c", "4", "-T", "86400", "-P", "1", *(["-R", str(rate)] if rate else [])]
    process = subprocess.Popen(pgbench(address, *options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen, said = [(time.time(), 0.0)], []

    def read() -> None:
        assert process.stdout
        done, before = 0.0, 0.0
        for line in process.stdout:
            said.append(line)
            if found := re.match(r"progress: ([\d.]+) s, ([\d.]+) tps", line):
                done += float(found[2]) * (float(found[1]) - before)
                before = float(found[1])
                seen.append((time.time(), done))

    thread = threading.Thread(target=read)
    thread.start()
    while not ended():
        if process.poll() is not None:
            break
        time.sleep(0.05)
    failed = process.poll() is not None
    process.terminate()
    process.wait()
    thread.join()
    if failed or any("abort" in line for line in said):
        sys.exit(f"pgbench: {''.join(said[-5:])}")
    return {"seen": seen}


def probe(address: str) -> dict[str, list[float]]:
    """Return when each answer came, as the time of the day in s."""
    seen: list[float] = []
    with psycopg.connect(host=address, user="postgres", dbname="postgres", autocommit=True) as connection:
        connection.execute("CREATE TABLE probe (number serial)")
        print("connected", flush=True)
        while not ended():
            row = connection.execute("INSERT INTO probe DEFAULT VALUES RETURNING number").fetchone()
            seen.append(time.time())
            if row != (len(seen),):
                sys.exit(f"answer {len(seen)} is {row}")
            time.sleep(0.001)
    return {"seen": seen}


def main() -> None:
    what, address, scale, rate = sys.argv[1:]
    if what == "fill":
        subprocess.run(pgbench(address, "-i", "-q", "-s", scale), check=True, capture_output=True)
    elif what == "load":
        print("connected", flush=True)
        print(json.dumps(load(address, int(rate))))
    else:
        print(json.dumps(probe(address)))


if __name__ == "__main__":
    main()
