"""Two hosts on this machine, by scripts/bed: the same that the demo and the benchmarks use."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from runtime.criu.lazy import NAME as MEMORY
from tests.helpers.oci import SLOW_S

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = "/var/lib/ferry/bundles"
# Empty directories of Ferry's own and CRIU's note on the kernel are no remains of a move.
NO_REMAINS = {
    *(
        f"/run/{name}"
        for name in ("criu.kdat", "ferry", "ferry/migrate", "ferry/migrate/locks", "ferry/migrate/slots", "ferry/runtime")
    ),
    "/var/lib/ferry",
    BUNDLES,
}


def commits() -> int:
    """Return how many commits there are: what goes round in turns goes on with each. In a guest, $FERRY_COMMITS knows."""
    if known := os.environ.get("FERRY_COMMITS"):
        return int(known)
    done = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return int(done.stdout.strip() or 0)


class Bed:
    def __init__(self, name: str) -> None:
        self.name = name
        self.directory = Path(f"/var/tmp/ferry-{name}")

    def _bed(self, *args: str) -> list[str]:
        return [str(ROOT / "scripts/bed"), self.name, *args]

    def up(self, *options: str) -> None:
        try:
            subprocess.run(self._bed("up", *options), stdin=subprocess.DEVNULL, check=True, timeout=SLOW_S)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        subprocess.run(self._bed("down"), stdin=subprocess.DEVNULL, check=True, timeout=SLOW_S)

    def crash(self, host: str) -> None:
        """Pull the plug of a host, and boot it again."""
        subprocess.run(self._bed("crash", host), stdin=subprocess.DEVNULL, check=True, timeout=SLOW_S)

    def cut(self, host: str) -> None:
        """Drop every packet from and to a host."""
        subprocess.run(self._bed("cut", host), stdin=subprocess.DEVNULL, check=True, timeout=SLOW_S)

    def mend(self, host: str) -> None:
        """Carry the packets of a host again. Idempotent."""
        subprocess.run(self._bed("mend", host), stdin=subprocess.DEVNULL, check=True, timeout=SLOW_S)

    def shape(self, rate: str) -> None:
        """Have the cables of both hosts carry no more than this in each direction, e.g. 1gbit."""
        subprocess.run(self._bed("shape", rate), stdin=subprocess.DEVNULL, check=True, timeout=SLOW_S)

    def argv(self, host: str, *args: str) -> list[str]:
        return self._bed("exec", host, *args)

    def run(self, host: str, *args: str, timeout_s: float = SLOW_S, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on a host and return what came of it."""
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        options.update(kwargs)
        if "input" in options:
            del options["stdin"]
        return subprocess.run(self.argv(host, *args), text=True, timeout=timeout_s, check=False, **options)

    def ok(self, host: str, *args: str) -> str:
        """Run a command that must succeed; return its output."""
        done = self.run(host, *args)
        assert done.returncode == 0, f"{host}# {' '.join(args)}: status {done.returncode}: {done.stdout}{done.stderr}"
        return str(done.stdout)

    def path(self, host: str, path: str) -> Path:
        """Return where a path below a host's /var/lib is on this machine."""
        return self.directory / host / "varlib" / Path(path).relative_to("/var/lib")

    def pid_of(self, host: str) -> int:
        """Return the process that keeps a host's namespaces."""
        return int((self.directory / host / "pid").read_text().split()[0])

    def processes(self, host: str, kind: str) -> list[int]:
        """Return the processes of a host, by their pids on this machine.

        The kinds are agents, holders of the runtime, CRIU, and what gives a restored container its memory.
        """
        # CRIU and its holder are in mount namespaces below the host's: what tells hosts apart is the UTS namespace.
        uts = os.readlink(f"/proc/{self.pid_of(host)}/ns/uts")
        words = {"agent": (b"migrate.agent", b"agent"), "runtime": (b"--hold",), "memory": (b"--hold",), "criu": (b"swrk",)}[kind]
        title = b"criu: "  # which CRIU gives itself, with what it is doing
        found = []
        for entry in os.listdir("/proc"):
            try:
                if not entry.isdigit() or os.readlink(f"/proc/{entry}/ns/uts") != uts:
                    continue
                argv = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                gives_memory = Path(f"/proc/{entry}/comm").read_text().strip() == MEMORY
            except OSError:
                continue
            if gives_memory != (kind == "memory"):
                continue
            if (kind == "criu" and any(a.startswith(title) for a in argv)) or (
                any(w in argv for w in words) and (kind != "agent" or b"python" in argv[0])
            ):
                found.append(int(entry))
        return found

    def move(self, source: str, container: str, target: str, *options: str, timeout_s: float = SLOW_S) -> dict[str, Any]:
        """Move a container; return the report and fail unless it was completed."""
        done = self.run(source, "migrate", "move", "--json", *options, container, target, timeout_s=timeout_s)
        assert done.returncode == 0, f"status {done.returncode}: {done.stdout}{done.stderr}"
        report: dict[str, Any] = json.loads(done.stdout)
        assert report["outcome"] == "COMPLETED"
        return report

    def status(self, host: str, container: str) -> str | None:
        """Return a container's status on a host, None where it is not known."""
        done = self.run(host, "runtime", "state", container)
        return str(json.loads(done.stdout)["status"]) if done.returncode == 0 else None

    def start(self, host: str, bundle: str, container: str) -> None:
        null = subprocess.DEVNULL
        done = self.run(host, "runtime", "run", "--detach", "--bundle", bundle, container, stdout=null, stderr=null)
        assert done.returncode == 0, self.run(host, "runtime", "run", "--detach", "--bundle", bundle, container).stderr

    def clean(self) -> None:
        """Remove every container and bundle of both hosts."""
        for host in ("host1", "host2"):
            for container in self.ok(host, "runtime", "list", "--quiet").split():
                self.ok(host, "runtime", "delete", "--force", container)
            self.ok(host, "sh", "-c", f"rm -rf {BUNDLES} /run/ferry /var/lib/ferry/migrations")

    def inventory(self, host: str) -> dict[str, list[str]]:
        """Return what a host holds: mounts, cgroups, processes, firewall rules, files. The journals of moves are kept on purpose."""
        script = r"""
            echo MOUNTS; awk '{print $5}' /proc/self/mountinfo
            echo CGROUPS; find /sys/fs/cgroup -mindepth 2 -type d
            echo PROCESSES; ps -eo pid=,args= | grep -vE 'ps -eo|grep -vE|sh -c|sort|sleep 3600|awk|sshd: root|find '
            echo RULES; nft --stateless list ruleset; ip -o link show
            echo NETNS; ls /run/netns
            echo FILES; find /run /tmp /var/lib/ferry -not -path '/var/lib/ferry/migrations*' -not -path '/run/sshd*' 2>/dev/null
            true
        """
        found: dict[str, list[str]] = {}
        section = ""
        for line in self.ok(host, "sh", "-c", script).splitlines():
            if line.isupper() and line.isalpha():
                section = line
                found[section] = []
            else:
                found[section].append(line.strip())
        return {k: sorted(v) for k, v in found.items()}
