"""A root that is an overlay, on the host that it comes to: its layers are kept by their digests, it is mounted there."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from migrate import layers, overlay, places
from migrate.agent.made import Made
from migrate.agent.side import Side
from migrate.errors import MigrateError, ProtocolError, TransferFailed
from migrate.overlay import Overlay


class TargetLayers(Side):
    _overlay: Overlay | None = None  # as it is made here
    _coming: dict[str, Made]  # layers that this host has not, by their digests

    def _plan_overlay(self, document: Any, bundle: str, migration_id: str) -> None:
        """Raises: ProtocolError."""
        self._overlay, self._coming = overlay_of(document, bundle), {}
        digests = self._overlay.digests if self._overlay else ()
        there = layers.have(digests)
        for number, digest in enumerate(d for d in dict.fromkeys(digests) if d not in there):
            self._coming[digest] = Made.planned(places.LAYERS / f".{migration_id}-{number}")

    def _own_directories(self, bundle: str) -> tuple[str, ...]:
        return (overlay.beside(bundle),) if self._overlay else ()

    def _make_layers(self) -> list[str]:
        """Make the directories that are filled by the source, and return them. Raises: OSError."""
        for made in self._coming.values():
            made.make()
        if self._overlay is None:
            return []
        os.mkdir(self._overlay.upper, 0o700)
        os.mkdir(self._overlay.work, 0o700)
        return [self._overlay.upper, *(made.path for made in self._coming.values())]

    def keep_layers(self) -> None:
        """Put the layers that have come into the store. Raises: TransferFailed when one is not what it was said to be."""
        for digest, made in self._coming.items():
            try:
                layers.keep(Path(made.path), digest)
            except OSError as e:
                raise TransferFailed(f"cannot keep the layer {digest}: {e.strerror}") from e

    def _mount_root(self, bundle: str) -> None:
        """Mount the overlay, all of which is there. Idempotent. Raises: MigrateError."""
        if self._overlay is None:
            return
        if missing := set(self._overlay.digests) - set(layers.have(self._overlay.digests)):
            raise TransferFailed(f"the layers {', '.join(sorted(missing))} are not there any more")
        try:
            layers.mount(self._overlay, bundle)
        except OSError as e:
            raise TransferFailed(f"cannot mount {self._overlay.root}: {e.strerror}") from e

    def _remove_layers(self) -> None:
        """Unmount the overlay, and remove the layers that came with it and are not used. Idempotent. Raises: MigrateError."""
        if self._overlay is None:
            return
        layers.unmount(self._overlay)
        used = layers.in_use() if self._coming else set()
        for digest, made in self._coming.items():
            made.remove()
            kept = places.LAYERS / digest
            with contextlib.suppress(FileNotFoundError):
                if digest not in used and made.inode is not None and kept.lstat().st_ino == made.inode:
                    layers.remove(digest)
                    made.remove()  # its parents, which are empty now

    def _overlay_note(self) -> dict[str, Any]:
        """Return what a host must know of it after a crash."""
        if self._overlay is None:
            return {}
        return {"overlay": self._overlay.as_dict(), "coming": {d: m.as_dict() for d, m in self._coming.items()}}

    def _adopt_overlay(self, note: dict[str, Any]) -> None:
        """Read what was noted. Raises: MigrateError."""
        try:
            self._overlay = Overlay.from_json(note["overlay"]) if note.get("overlay") else None
            self._coming = {str(d): Made.from_json(m) for d, m in (note.get("coming") or {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise MigrateError(f"the note of the overlay that was made here is damaged: {e}") from e


def overlay_of(document: Any, bundle: str) -> Overlay | None:
    """Read the overlay that is to be made here. Raises: ProtocolError."""
    try:
        return Overlay.from_json(document).elsewhere(bundle, str(places.LAYERS)) if document else None
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ProtocolError(f"the overlay that is to be made here is none: {e}") from e
