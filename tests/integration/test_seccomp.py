"""seccomp filters, felt from inside."""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import json
import platform
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle import BundleMaker
from tests.helpers.oci import Oci


def filtering(*rules: dict[str, Any], default: str = "SCMP_ACT_ALLOW", nnp: bool = True, **members: Any) -> Any:
    def change(config: dict[str, Any]) -> None:
        config["process"]["noNewPrivileges"] = nnp
        config["linux"]["seccomp"] = {"defaultAction": default, "syscalls": list(rules), **members}

    return change


def rule(*names: str, action: str = "SCMP_ACT_ERRNO", **members: Any) -> dict[str, Any]:
    return {"names": list(names), "action": action, **members}


MKDIR = ("mkdir", "mkdirat")


@pytest.mark.parametrize("nnp", [True, False])
def test_errno(oci: Oci, bundles: BundleMaker, nnp: bool) -> None:
    script = "mkdir /x; echo $?; grep Seccomp: /proc/self/status; grep NoNewPrivs /proc/self/status"
    change = filtering(rule(*MKDIR, errnoRet=errno.ENOTSUP), nnp=nnp)
    done = oci.run("run", "--bundle", bundles("sh", "-c", script, change=change), "c")
    assert "Operation not supported" in done.stderr or "Not supported" in done.stderr, done
    assert done.stdout.split() == ["1", "Seccomp:", "2", "NoNewPrivs:", str(int(nnp))]


@pytest.mark.ferry
def test_a_filter_does_not_stop_the_user_from_being_changed(oci: Oci, bundles: BundleMaker) -> None:
    change = filtering(rule("setuid", "setgid"), nnp=False)

    def both(config: dict[str, Any]) -> None:
        change(config)
        config["process"]["user"] = {"uid": 1000, "gid": 1000}

    out = oci.inside(bundles("sh", "-c", "id -u; grep -E 'CapEff|CapPrm' /proc/self/status", change=both)).split()
    assert out == ["1000", "CapPrm:", "0000000000000000", "CapEff:", "0000000000000000"]


def test_exec_gets_the_filter_too(oci: Oci, bundles: BundleMaker) -> None:
    oci.detached(bundles("sleep", "60", change=filtering(rule(*MKDIR))), "c")
    assert oci.run("exec", "c", "mkdir", "/x").returncode == 1
    assert "Seccomp:\t2" in oci.ok("exec", "c", "cat", "/proc/self/status")


@pytest.mark.parametrize(
    ("action", "status"),
    [("SCMP_ACT_KILL", 159), ("SCMP_ACT_KILL_PROCESS", 159), ("SCMP_ACT_KILL_THREAD", 159), ("SCMP_ACT_TRAP", 159), ("SCMP_ACT_LOG", 0)],
)  # fmt: skip
def test_actions(oci: Oci, bundles: BundleMaker, action: str, status: int) -> None:
    bundle = bundles("mkdir", "/x", change=filtering(rule(*MKDIR, action=action)))
    assert oci.run("run", "--bundle", bundle, "c").returncode == status


def test_trace_without_a_tracer_is_enosys(oci: Oci, bundles: BundleMaker) -> None:
    done = oci.run("run", "--bundle", bundles("mkdir", "/x", change=filtering(rule(*MKDIR, action="SCMP_ACT_TRACE"))), "c")
    assert done.returncode == 1 and "not implemented" in done.stderr


def test_arguments(oci: Oci, bundles: BundleMaker) -> None:
    """kill(2) is refused for signals above 20, and for signal 10."""
    rules = (
        rule("kill", args=[{"index": 1, "value": 20, "op": "SCMP_CMP_GT"}]),
        rule("kill", args=[{"index": 1, "value": 0xFF, "valueTwo": 10, "op": "SCMP_CMP_MASKED_EQ"}]),
    )
    script = "trap : 23 10 18; for s in 23 10 18; do kill -$s $$ 2>/dev/null; echo $?; done"
    assert oci.inside(bundles("sh", "-c", script, change=filtering(*rules))).split() == ["1", "1", "0"]


def test_several_values_of_one_argument_mean_any_of_them(oci: Oci, bundles: BundleMaker) -> None:
    arguments = [{"index": 1, "value": v, "op": "SCMP_CMP_EQ"} for v in (23, 10)]
    script = "trap : 23 10 18; for s in 23 10 18; do kill -$s $$ 2>/dev/null; echo $?; done"
    assert oci.inside(bundles("sh", "-c", script, change=filtering(rule("kill", args=arguments)))).split() == ["1", "1", "0"]


ALLOWED = [
    "read",
    "write",
    "open",
    "openat",
    "close",
    "stat",
    "fstat",
    "lstat",
    "newfstatat",
    "statx",
    "poll",
    "lseek",
    "mmap",
    "mprotect",
    "munmap",
    "brk",
    "rt_sigaction",
    "rt_sigprocmask",
    "ioctl",
    "access",
    "execve",
    "execveat",
    "exit",
    "exit_group",
    "arch_prctl",
    "set_tid_address",
    "set_robust_list",
    "prlimit64",
    "getrandom",
    "rseq",
    "getuid",
    "geteuid",
    "getgid",
    "getegid",
    "getpid",
    "getppid",
    "readlink",
    "uname",
    "fcntl",
    "writev",
    "wait4",
    "vfork",
    "clone",
    "dup2",
    "prctl",
    "readlinkat",
    "mremap",
    "getcwd",
    "umask",
    "setpgid",
    "capset",
    "futex",
    "sigaltstack",
    "rt_sigreturn",
    "accept",
    "accept4",
    "recvmsg",
    "sendmsg",
    "close_range",
    "memfd_create",
    "capget",
    "setresuid",
    "setresgid",
    "setgroups",
    "setuid",
    "setgid",
    "chdir",
    "getdents64",
    "epoll_ctl",
    "epoll_pwait",
    "tgkill",
    "gettid",
    "nanosleep",
    "sched_yield",
    "openat2",
    "statfs",
    "fstatfs",
    "madvise",
    "pipe2",
    "socket",
    "connect",
    "keyctl",
    "faccessat",
    "faccessat2",
    "pread64",
]


@pytest.mark.parametrize("nnp", [True, False])
def test_a_list_of_what_is_allowed(oci: Oci, bundles: BundleMaker, nnp: bool) -> None:
    change = filtering(rule(*ALLOWED, action="SCMP_ACT_ALLOW"), default="SCMP_ACT_ERRNO", nnp=nnp)
    script = "echo alive; mkdir /x || echo refused"
    out = oci.run("run", "--bundle", bundles("/bin/sh", "-c", script, change=change), "c")
    assert out.stdout.split() == ["alive", "refused"], out


@pytest.mark.ferry
def test_only_what_the_program_needs_has_to_be_allowed(oci: Oci, bundles: BundleMaker) -> None:
    """With no_new_privs nothing of the runtime's own runs under the filter but execve."""
    names = ("execve", "write", "exit", "exit_group", "brk", "arch_prctl", "prctl", "mmap", "mprotect", "set_tid_address", "uname",
             "set_robust_list", "prlimit64", "readlink", "getrandom", "rseq", "newfstatat", "fstat", "getuid", "setuid", "setgid", "getgid")  # fmt: skip
    change = filtering(rule(*names, action="SCMP_ACT_ALLOW"), default="SCMP_ACT_KILL_PROCESS")
    assert oci.inside(bundles("/bin/echo", "alive", change=change)) == "alive\n"


@pytest.mark.ferry
def test_calls_newer_than_the_profile_are_enosys(oci: Oci, bundles: BundleMaker) -> None:
    python = Path("/usr/bin/python3")
    change = filtering(rule(*ALLOWED, action="SCMP_ACT_ALLOW"), default="SCMP_ACT_ERRNO")

    def with_host(config: dict[str, Any]) -> None:
        change(config)
        for directory in ("/usr", "/lib", "/lib64"):
            if Path(directory).exists():
                config["mounts"].append(
                    {"destination": directory, "type": "bind", "source": directory, "options": ["rbind", "ro"]}
                )

    code = "import ctypes; l = ctypes.CDLL(None, use_errno=True); print([l.syscall(n) and ctypes.get_errno() for n in (444, 83)])"
    out = oci.inside(bundles(str(python), "-Sc", code, change=with_host))
    mkdir_errno = errno.EPERM if platform.machine() == "x86_64" else errno.ENOSYS
    assert json.loads(out) == [errno.ENOSYS, mkdir_errno]


@pytest.mark.ferry
def test_architectures_and_flags(oci: Oci, bundles: BundleMaker) -> None:
    native = {"x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"], "aarch64": ["SCMP_ARCH_AARCH64"]}[
        platform.machine()
    ]
    change = filtering(rule(*MKDIR), architectures=native, flags=["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"])
    assert oci.inside(bundles("sh", "-c", "mkdir /x 2>/dev/null; echo $?", change=change)) == "1\n"


def test_unknown_calls_are_skipped(oci: Oci, bundles: BundleMaker) -> None:
    assert oci.inside(bundles("echo", "x", change=filtering(rule("no_such_call", *MKDIR)))) == "x\n"


class Agent:
    """Answers one notification with an errno of its own."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.document: dict[str, Any] = {}
        self.calls: list[int] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            data, rights, _, _ = connection.recvmsg(65536, socket.CMSG_LEN(4))
            self.document = json.loads(data)
            threading.Thread(target=self._answer, args=(array.array("i", rights[0][2])[0],), daemon=True).start()

    def _answer(self, fd: int) -> None:
        receive, send = 0xC0502100, 0xC0182101
        while True:
            request = ctypes.create_string_buffer(80)
            try:
                fcntl.ioctl(fd, receive, request)
            except OSError:
                return
            identity, _pid, _flags, number = struct.unpack_from("QIIi", request)
            self.calls.append(number)
            response = ctypes.create_string_buffer(struct.pack("qqiI", 0, 0, -errno.EXFULL, 0), 24)
            struct.pack_into("Q", response, 0, identity)
            fcntl.ioctl(fd, send, response)


@pytest.mark.parametrize("nnp", [True, False])
def test_notify(oci: Oci, bundles: BundleMaker, tmp_path: Path, nnp: bool) -> None:
    agent = Agent(tmp_path / "agent.sock")
    change = filtering(
        rule(*MKDIR, action="SCMP_ACT_NOTIFY"), nnp=nnp, listenerPath=str(tmp_path / "agent.sock"), listenerMetadata="meta"
    )
    done = oci.run("run", "--bundle", bundles("mkdir", "/x", change=change), "c")
    assert done.returncode == 1 and "xchange full" in done.stderr, done
    assert agent.calls and agent.document["metadata"] == "meta" and agent.document["fds"] == ["seccompFd"]
    assert agent.document["state"]["id"] == "c" and agent.document["pid"] == agent.document["state"]["pid"]


@pytest.mark.ferry
def test_notify_reaches_exec(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    agent = Agent(tmp_path / "agent.sock")
    change = filtering(rule(*MKDIR, action="SCMP_ACT_NOTIFY"), listenerPath=str(tmp_path / "agent.sock"))
    oci.detached(bundles("sleep", "60", change=change), "c")
    done = oci.run("exec", "c", "mkdir", "/x")
    assert "xchange full" in done.stderr and agent.document["state"]["status"] == "running"


@pytest.mark.ferry
def test_notify_without_an_agent(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    change = filtering(rule(*MKDIR, action="SCMP_ACT_NOTIFY"), listenerPath=str(tmp_path / "nobody.sock"))
    done = oci.run("run", "--bundle", bundles("true", change=change), "c")
    assert done.returncode == 1 and "/linux/seccomp/listenerPath" in done.stderr
