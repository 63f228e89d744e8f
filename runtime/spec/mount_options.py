"""Mount options of config.json in the terms of mount(2) and mount_setattr(2). Pure."""

from __future__ import annotations

from runtime.linux import const as c
from runtime.values import Value

# name -> (clear, flag)
FLAGS: dict[str, tuple[bool, int]] = {
    "async": (True, c.MS_SYNCHRONOUS),
    "atime": (True, c.MS_NOATIME),
    "bind": (False, c.MS_BIND),
    "defaults": (False, 0),
    "dev": (True, c.MS_NODEV),
    "diratime": (True, c.MS_NODIRATIME),
    "dirsync": (False, c.MS_DIRSYNC),
    "exec": (True, c.MS_NOEXEC),
    "iversion": (False, c.MS_I_VERSION),
    "lazytime": (False, c.MS_LAZYTIME),
    "loud": (True, c.MS_SILENT),
    "mand": (False, c.MS_MANDLOCK),
    "noatime": (False, c.MS_NOATIME),
    "nodev": (False, c.MS_NODEV),
    "nodiratime": (False, c.MS_NODIRATIME),
    "noexec": (False, c.MS_NOEXEC),
    "noiversion": (True, c.MS_I_VERSION),
    "nolazytime": (True, c.MS_LAZYTIME),
    "nomand": (True, c.MS_MANDLOCK),
    "norelatime": (True, c.MS_RELATIME),
    "nostrictatime": (True, c.MS_STRICTATIME),
    "nosuid": (False, c.MS_NOSUID),
    "nosymfollow": (False, c.MS_NOSYMFOLLOW),
    "rbind": (False, c.MS_BIND | c.MS_REC),
    "relatime": (False, c.MS_RELATIME),
    "remount": (False, c.MS_REMOUNT),
    "ro": (False, c.MS_RDONLY),
    "rw": (True, c.MS_RDONLY),
    "silent": (False, c.MS_SILENT),
    "strictatime": (False, c.MS_STRICTATIME),
    "suid": (True, c.MS_NOSUID),
    "symfollow": (True, c.MS_NOSYMFOLLOW),
    "sync": (False, c.MS_SYNCHRONOUS),
}

PROPAGATION: dict[str, int] = {
    "private": c.MS_PRIVATE,
    "shared": c.MS_SHARED,
    "slave": c.MS_SLAVE,
    "unbindable": c.MS_UNBINDABLE,
    "rprivate": c.MS_PRIVATE | c.MS_REC,
    "rshared": c.MS_SHARED | c.MS_REC,
    "rslave": c.MS_SLAVE | c.MS_REC,
    "runbindable": c.MS_UNBINDABLE | c.MS_REC,
}

# name -> (clear, attribute), for a mount and all below it
RECURSIVE: dict[str, tuple[bool, int]] = {
    "rro": (False, c.MOUNT_ATTR_RDONLY),
    "rrw": (True, c.MOUNT_ATTR_RDONLY),
    "rnosuid": (False, c.MOUNT_ATTR_NOSUID),
    "rsuid": (True, c.MOUNT_ATTR_NOSUID),
    "rnodev": (False, c.MOUNT_ATTR_NODEV),
    "rdev": (True, c.MOUNT_ATTR_NODEV),
    "rnoexec": (False, c.MOUNT_ATTR_NOEXEC),
    "rexec": (True, c.MOUNT_ATTR_NOEXEC),
    "rnodiratime": (False, c.MOUNT_ATTR_NODIRATIME),
    "rdiratime": (True, c.MOUNT_ATTR_NODIRATIME),
    "rrelatime": (False, c.MOUNT_ATTR_RELATIME),
    "rnorelatime": (True, c.MOUNT_ATTR_RELATIME),
    "rnoatime": (False, c.MOUNT_ATTR_NOATIME),
    "ratime": (True, c.MOUNT_ATTR_NOATIME),
    "rstrictatime": (False, c.MOUNT_ATTR_STRICTATIME),
    "rnostrictatime": (True, c.MOUNT_ATTR_STRICTATIME),
    "rnosymfollow": (False, c.MOUNT_ATTR_NOSYMFOLLOW),
    "rsymfollow": (True, c.MOUNT_ATTR_NOSYMFOLLOW),
}
_ATIME_MODES = {c.MOUNT_ATTR_RELATIME, c.MOUNT_ATTR_NOATIME, c.MOUNT_ATTR_STRICTATIME}

IDMAP = {"idmap": False, "ridmap": True}
ALL = (*FLAGS, *PROPAGATION, *RECURSIVE, *IDMAP, "tmpcopyup")


class MountOptions(Value):
    flags: int
    cleared: int  # flags that were asked to be off
    propagation: tuple[int, ...]
    recursive_set: int
    recursive_clear: int
    idmap: str | None  # idmap, ridmap
    copy_up: bool
    data: str

    @property
    def bind(self) -> bool:
        return bool(self.flags & c.MS_BIND)


def parse(options: tuple[str, ...]) -> MountOptions:
    """Sort options into flags, propagation, recursive attributes, and what the file system itself reads."""
    flags = cleared = recursive_set = recursive_clear = 0
    propagation, data = [], []
    idmap, copy_up = None, False
    for option in options:
        if option in FLAGS:
            clear, flag = FLAGS[option]
            flags = flags & ~flag if clear else flags | flag
            cleared = cleared | flag if clear else cleared & ~flag
        elif option in PROPAGATION:
            propagation.append(PROPAGATION[option])
        elif option in RECURSIVE:
            clear, attribute = RECURSIVE[option]
            if attribute in _ATIME_MODES:
                # A mode is one value of a field: the kernel wants the whole field cleared before one is set.
                recursive_clear |= c.MOUNT_ATTR__ATIME
                recursive_set = recursive_set & ~c.MOUNT_ATTR__ATIME | (0 if clear else attribute)
            elif clear:
                recursive_set, recursive_clear = recursive_set & ~attribute, recursive_clear | attribute
            else:
                recursive_set, recursive_clear = recursive_set | attribute, recursive_clear & ~attribute
        elif option in IDMAP:
            idmap = option
        elif option == "tmpcopyup":
            copy_up = True
        else:
            data.append(option)
    return MountOptions(flags, cleared, tuple(propagation), recursive_set, recursive_clear, idmap, copy_up, ",".join(data))
