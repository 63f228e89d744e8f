"""The files of a container's rootfs as a tar: all of them, or what an overlay has changed of its base image."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from runtime.errors import ContainerError

_OPAQUE = "trusted.overlay.opaque"


def capture(bundle: Path, rootfs: Path, target: Path, *, only_changes: bool) -> list[str]:
    """Write a tar of the rootfs; return the paths that the base image has and the rootfs has no more.

    Changes are known of an overlay of ours only. Extended attributes, device nodes and holes are kept.

    Raises: ContainerError, OSError.
    """
    if only_changes and (bundle / "overlay.json").is_file():
        names, deleted = _changes(bundle)
        _tar(bundle / "upper", target, names)
        return deleted
    _tar(rootfs, target, None)
    return []


def _tar(directory: Path, target: Path, names: list[str] | None) -> None:
    argv = ["tar", "-C", str(directory), "--format=posix", "--sparse", "--numeric-owner", "--one-file-system"]
    argv += ["--xattrs", "--xattrs-include=*", "--xattrs-exclude=trusted.overlay.*", "-c", "-f", "-"]
    argv += ["."] if names is None else ["--no-recursion", "--null", "--verbatim-files-from", "--files-from=/dev/fd/3"]
    with tempfile.TemporaryFile() as listed, tempfile.TemporaryFile() as said, target.open("wb") as out:
        listed.write(b"\0".join(os.fsencode(n) for n in names or ()))
        listed.seek(0)
        # By a pipe: tar itself does not say why it cannot write.
        with subprocess.Popen(
            ["sh", "-c", 'exec 3<&0 </dev/null; exec "$@"', "sh", *argv], stdin=listed, stdout=subprocess.PIPE, stderr=said
        ) as tar:
            assert tar.stdout is not None
            try:
                shutil.copyfileobj(tar.stdout, out, 1 << 20)
            except BaseException:
                tar.kill()
                raise
        if tar.returncode:
            said.seek(0)
            words = said.read().decode(errors="replace").strip().splitlines() or [f"tar ended with status {tar.returncode}"]
            raise ContainerError(f"cannot archive {directory}: {words[0]}")


def _changes(bundle: Path) -> tuple[list[str], list[str]]:
    """Return what lies in an overlay's upper layer, and what that hides of the layers below. Raises: ContainerError."""
    upper = bundle / "upper"
    try:
        document = json.loads((bundle / "overlay.json").read_bytes())
        layers = [Path(document["store"]) / str(n) for n in document["layers"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ContainerError(f"{bundle}/overlay.json is damaged: {e}") from e
    names, deleted = ["."], []
    for base, directories, files in os.walk(upper):
        relative = os.path.relpath(base, upper)
        prefix = "" if relative == "." else f"{relative}/"
        for name in (*directories, *files):
            found = os.lstat(os.path.join(base, name))
            if stat.S_ISCHR(found.st_mode) and found.st_rdev == 0:
                deleted.append(prefix + name)
            else:
                names.append(prefix + name)
        if prefix and _is_opaque(base):
            there = {*directories, *files}
            for layer in layers:
                below = layer / relative
                # Behind a link there is something else, perhaps of the host's.
                if below.is_dir() and os.path.realpath(below) == os.path.join(os.path.realpath(layer), relative):
                    deleted += [prefix + n for n in os.listdir(below) if n not in there]
    return names, sorted(set(deleted))


def _is_opaque(directory: str) -> bool:
    try:
        return os.getxattr(directory, _OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        return False
