"""An image's config -> config.json. Pure. Source: OCI image specification 1.1, conversion.md."""

from __future__ import annotations

from typing import Any

from runtime.errors import SpecError
from runtime.values import Value


class Accounts(Value):
    """The texts of /etc/passwd and /etc/group of a rootfs."""

    passwd: str = ""
    group: str = ""


def _lines(text: str, fields: int) -> list[list[str]]:
    return [f for f in (line.split(":") for line in text.splitlines()) if len(f) >= fields]


def resolve_user(user: str, accounts: Accounts) -> dict[str, Any]:
    """Return the `user` member for `NAME|UID[:GROUP|GID]`. Raises: SpecError for a name that is not there."""
    name, _, group = user.partition(":")
    uid, gid, login = 0, 0, None
    if name:
        found = next((f for f in _lines(accounts.passwd, 4) if name in (f[0], f[2])), None)
        if found is not None and found[2].isdigit() and found[3].isdigit():
            uid, gid, login = int(found[2]), int(found[3]), found[0]
        elif name.isdigit():
            uid = int(name)
        else:
            raise SpecError(f"the image's user {name!r} is not in its /etc/passwd")
    groups = _lines(accounts.group, 4)
    if group:
        entry = next((f for f in groups if group in (f[0], f[2])), None)
        if entry is not None and entry[2].isdigit():
            gid = int(entry[2])
        elif group.isdigit():
            gid = int(group)
        else:
            raise SpecError(f"the image's group {group!r} is not in its /etc/group")
    more = [] if group else sorted(int(f[2]) for f in groups if login and login in f[3].split(",") and f[2].isdigit())
    return {"uid": uid, "gid": gid, **({"additionalGids": more} if more else {})}


def apply_image(document: dict[str, Any], image: dict[str, Any], accounts: Accounts) -> None:
    """Change a default config.json into one that runs an image. Raises: SpecError."""
    config = image.get("config") or {}
    if not isinstance(config, dict):
        raise SpecError("the image's /config is no object")
    process = document["process"]
    args = [*_texts(config, "Entrypoint"), *_texts(config, "Cmd")]
    if args:
        process["args"] = args
    environment = _texts(config, "Env")
    names = {e.partition("=")[0] for e in environment}
    process["env"] = [*(e for e in process["env"] if e.partition("=")[0] not in names), *environment]
    process["cwd"] = str(config.get("WorkingDir") or "/")
    process["user"] = resolve_user(str(config.get("User") or ""), accounts)
    annotations = {str(k): str(v) for k, v in (config.get("Labels") or {}).items()}
    for key, value in (
        ("org.opencontainers.image.os", image.get("os")),
        ("org.opencontainers.image.architecture", image.get("architecture")),
        ("org.opencontainers.image.author", image.get("author")),
        ("org.opencontainers.image.created", image.get("created")),
        ("org.opencontainers.image.stopSignal", config.get("StopSignal")),
        ("org.opencontainers.image.exposedPorts", ",".join(sorted(config.get("ExposedPorts") or {}))),
    ):
        if value:
            annotations.setdefault(key, str(value))
    if annotations:
        document["annotations"] = annotations
    document["root"]["readonly"] = False


def _texts(config: dict[str, Any], key: str) -> list[str]:
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise SpecError(f"the image's /config/{key} is no list of strings")
    return value
