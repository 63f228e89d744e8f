"""Random documents, damaged states, and verbs at once: no traceback, no hang, nothing left behind."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.spec.defaults import default_config
from tests.helpers.bundle import BundleMaker
from tests.helpers.leaks import Snapshot
from tests.helpers.oci import Oci

pytestmark = pytest.mark.ferry

NULL = subprocess.DEVNULL
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(["/", "..", "/proc/self/root", "\0", "a" * 5000]),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2), st.just([{}]), st.just([None]),
)  # fmt: skip


def pointers(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in items:
        found += pointers(value, (*path, key))
    return found


def full_config() -> dict[str, Any]:
    """A config with every member that the specification has."""
    config = default_config()
    config["process"].update(
        terminal=False, args=["true"], consoleSize={"height": 1, "width": 1}, oomScoreAdj=1, ioPriority={"class": "IOPRIO_CLASS_BE", "priority": 4},
        scheduler={"policy": "SCHED_OTHER", "nice": 1}, execCPUAffinity={"initial": "0", "final": "0"},
    )  # fmt: skip
    config["process"]["user"].update(umask=18, additionalGids=[5])
    config["root"]["readonly"] = False
    config.update(
        domainname="d",
        annotations={"a": "b"},
        hooks={"poststop": [{"path": "/bin/true", "args": ["true"], "env": ["A=b"], "timeout": 5}]},
    )
    config["linux"].update(
        devices=[{"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 438, "uid": 0, "gid": 0}],
        rootfsPropagation="rprivate", sysctl={"net.ipv4.ip_forward": "1"}, personality={"domain": "LINUX"},
        seccomp={"defaultAction": "SCMP_ACT_ALLOW", "architectures": [], "flags": [], "syscalls": [
            {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]}]},
    )  # fmt: skip
    config["linux"]["resources"].update(memory={"limit": 1 << 26, "reservation": 1 << 25}, cpu={"shares": 10, "quota": 50000, "period": 100000},
                                        pids={"limit": 50}, blockIO={}, hugepageLimits=[], network={}, rdma={}, unified={})  # fmt: skip
    config["mounts"].append(
        {"destination": "/m", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "size=1k", "noexec"]}
    )
    return config


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(data=st.data())
def check_config(data: st.DataObject, oci: Oci, bundle: Path, before: Snapshot) -> None:
    config = full_config()
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(pointers(config)))
        place: Any = config
        for key in path[:-1]:
            place = place[key]
        if data.draw(st.booleans()) and isinstance(place, dict):
            del place[path[-1]]
        else:
            place[path[-1]] = data.draw(VALUES)
        config = copy.deepcopy(config)
    (bundle / "config.json").write_text(json.dumps(config))
    done = oci.run("create", "--bundle", bundle, "c", stdout=NULL)
    assert "Traceback" not in done.stderr and "Error in" not in done.stderr, (config, done.stderr)
    assert done.returncode in (0, 1, 126, 127), (config, done)
    if done.returncode == 0:
        oci.ok("delete", "--force", "c")
    else:
        assert "level=error" in done.stderr
    assert not (oci.root / "c").exists()
    assert Snapshot.take().more_than(before) == [], config


@pytest.mark.timeout(300)
def test_random_configs(oci: Oci, bundles: BundleMaker) -> None:
    # Standard error of a created container stays open: it goes to a file, not a pipe.
    bundle = bundles("true")
    run = oci.run

    def quiet(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        with (bundle / "stderr").open("w+") as err:
            done = run(*args, **{"stderr": err, **kwargs})
            err.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, done.stdout, err.read())

    oci.run = quiet  # type: ignore[method-assign]
    check_config(oci=oci, bundle=bundle, before=Snapshot.take())
    oci.run = run  # type: ignore[method-assign]


VERBS = (
    ("state", "c"),
    ("list",),
    ("kill", "c", "0"),
    ("ps", "c"),
    ("pause", "c"),
    ("update", "--pids-limit", "9", "c"),
    ("exec", "c", "true"),
)


@pytest.mark.parametrize("name", ["state.json", "config.json"])
@pytest.mark.timeout(200)
def test_damaged_files(oci: Oci, bundles: BundleMaker, name: str) -> None:
    """Cut short at any length, bits flipped, replaced by other JSON: an error that names the file, or no harm."""
    oci.detached(bundles("sleep", "60"), "c")
    path = oci.root / "c" / name
    whole = path.read_bytes()
    chance = random.Random(4)
    damaged = [whole[: len(whole) * k // 10] for k in range(10)]
    for _ in range(10):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(data))
    damaged += [b"null", b"[]", b"{}", b'"x"', b'{"version": 1}', b'{"version": 99}', b"\xff\xfe", b"[" * 20000]
    for number, data in enumerate(damaged):
        path.write_bytes(data)
        verb = VERBS[number % len(VERBS)]
        done = oci.run(*verb)
        assert "Traceback" not in done.stderr, (verb, data[:80], done.stderr)
        assert done.returncode in (0, 1), (verb, data[:80], done)
        path.write_bytes(whole)
        oci.run("resume", "c")
    assert oci.status("c") == "running"


@pytest.mark.timeout(200)
def test_verbs_at_once(oci: Oci, bundles: BundleMaker) -> None:
    """Six at a time do whatever to one container; each succeeds or says why not, and in the end it can be deleted."""
    bundle = bundles("sleep", "60")
    chance, errors = random.Random(7), []
    verbs = (*VERBS, ("create", "--bundle", str(bundle), "c"), ("start", "c"), ("resume", "c"), ("delete", "--force", "c"),
             ("delete", "c"), ("kill", "c", "KILL"), ("events", "--stats", "c"))  # fmt: skip
    plans = [[chance.choice(verbs) for _ in range(12)] for _ in range(6)]

    def work(number: int, plan: list[tuple[str, ...]]) -> None:
        for verb in plan:
            with (oci.root.parent / f"err{number}").open("w+") as err:
                done = oci.run(*verb, stdout=NULL, stderr=err)
                err.seek(0)
                text = err.read()
            if "Traceback" in text or done.returncode not in (0, 1, 255):
                errors.append((verb, done.returncode, text))

    threads = [threading.Thread(target=work, args=item) for item in enumerate(plans)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    oci.ok("delete", "--force", "c")
    assert not (oci.root / "c").exists()
