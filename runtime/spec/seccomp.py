"""linux.seccomp as frozen values, and its reading. Source: OCI runtime specification 1.2, config-linux.md, Seccomp."""

from __future__ import annotations

from runtime.spec.reader import Reader
from runtime.values import Value

ACTIONS = (
    "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_TRAP", "SCMP_ACT_ERRNO", "SCMP_ACT_TRACE",
    "SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_NOTIFY",
)  # fmt: skip
ARCHITECTURES = tuple(
    f"SCMP_ARCH_{a}"
    for a in (
        "X86", "X86_64", "X32", "ARM", "AARCH64", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64", "MIPSEL64N32", "PPC",
        "PPC64", "PPC64LE", "S390", "S390X", "PARISC", "PARISC64", "RISCV64", "LOONGARCH64", "M68K", "SH", "SHEB",
    )
)  # fmt: skip
OPERATORS = tuple(f"SCMP_CMP_{o}" for o in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))
FLAGS = (
    "SECCOMP_FILTER_FLAG_TSYNC",
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
)


class Argument(Value):
    index: int
    value: int
    value_two: int
    operator: str


class Rule(Value):
    names: tuple[str, ...]
    action: str
    errno: int | None
    arguments: tuple[Argument, ...]


class Seccomp(Value):
    default_action: str
    default_errno: int | None = None
    architectures: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    listener_path: str | None = None
    listener_metadata: str = ""
    rules: tuple[Rule, ...] = ()


def read(r: Reader) -> Seccomp:
    """Read linux.seccomp; violations are noted in the reader."""
    if not r.has("defaultAction"):
        r.wrong("defaultAction", "is required")
    seccomp = Seccomp(
        default_action=r.choice("defaultAction", ACTIONS, "SCMP_ACT_ERRNO"),
        default_errno=r.integer_or_none("defaultErrnoRet", 0, 4095),
        architectures=_words(r, "architectures", ARCHITECTURES),
        flags=_words(r, "flags", FLAGS),
        listener_path=r.text_or_none("listenerPath") or None,
        listener_metadata=r.text_or_none("listenerMetadata") or "",
        rules=tuple(_rule(s) for s in r.objects("syscalls")),
    )
    notifies = [i for i, rule in enumerate(seccomp.rules) if rule.action == "SCMP_ACT_NOTIFY"]
    if seccomp.default_action == "SCMP_ACT_NOTIFY":
        r.wrong("defaultAction", "SCMP_ACT_NOTIFY would wait for itself")
    if notifies and not seccomp.listener_path:
        r.wrong("listenerPath", "is required by SCMP_ACT_NOTIFY")
    for i in notifies:
        if "write" in seccomp.rules[i].names:
            r.wrong("syscalls", f"{i}: SCMP_ACT_NOTIFY on write would wait for itself")
    return seccomp


def _words(r: Reader, key: str, known: tuple[str, ...]) -> tuple[str, ...]:
    words = r.texts(key)
    for word in words:
        if word not in known:
            r.wrong(key, f"{word!r} is none of {', '.join(known)}")
    return words


def _rule(r: Reader) -> Rule:
    names = r.texts("names")
    if not names:
        r.wrong("names", "must not be empty")
    if not r.has("action"):
        r.wrong("action", "is required")
    return Rule(
        names=names,
        action=r.choice("action", ACTIONS, "SCMP_ACT_ERRNO"),
        errno=r.integer_or_none("errnoRet", 0, 4095),
        arguments=tuple(
            Argument(
                a.integer("index", 0, 5),
                a.integer("value", 0),
                a.integer_or_none("valueTwo", 0) or 0,
                a.choice("op", OPERATORS, "SCMP_CMP_EQ"),
            )
            for a in r.objects("args")
        ),
    )
