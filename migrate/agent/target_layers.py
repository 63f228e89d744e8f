"""A root that is an overlay, on the host that it comes to: its layers are kept by their digests, it is mounted there."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from migrate import layer_store, layers, mounts, overlay, places
from migrate.agent.made import Made
from migrate.agent.side import Side
from migrate.errors import MigrateError, ProtocolError, TransferFailed
from migrate.overlay import Overlay


class TargetLayers(Side):
    _overlay: Overlay | None = None  # as it is made here
    _beside = ""  # the directory that its own layer is in
    _coming: dict[str, Made]  # layers that this host has not, by their digests

    def _plan_overlay(self, document: Any, bundle: str, migration_id: str) -> tuple[str, ...]:
        """Look what is to be made; return the directories that are the container's own. Raises: ProtocolError."""
        self._overlay, self._coming = overlay_of(document, bundle), {}
        if self._overlay is None:
            return ()
        self._beside = overlay.beside(bundle)
        there = layer_store.have(self._overlay.digests)
        for number, digest in enumerate(d for d in dict.fromkeys(self._overlay.digests) if d not in there):
            self._coming[digest] = Made.planned(places.LAYERS / f".{migration_id}-{number}")
        return (self._beside,)

    def _make_layers(self) -> None:
        """Make the directories for what comes, when the container's own is there. Raises: OSError, TransferFailed."""
        if self._overlay is None:
            return
        with layer_store.locked():
            layer_store.use(self._beside, self._overlay.digests)
            self._require_layers(set(self._coming))
            for made in self._coming.values():
                made.make()

    def _fill(self) -> list[str]:
        """Return what the source may fill, made when all else was noted. Raises: OSError."""
        if self._overlay is None:
            return []
        os.mkdir(self._overlay.upper, 0o700)
        os.mkdir(self._overlay.work, 0o700)
        return [self._overlay.upper, *(made.path for made in self._coming.values())]

    def _require_layers(self, but: set[str]) -> None:
        assert self._overlay is not None
        if missing := set(self._overlay.digests) - set(layer_store.have(self._overlay.digests)) - but:
            raise TransferFailed(f"the layers {', '.join(sorted(missing))} are not there any more")

    def _keep_layers(self) -> None:
        """Put the layers that have come into the store. Raises: TransferFailed when one is not what it was said to be."""
        for digest, made in self._coming.items():
            try:
                layer_store.keep(Path(made.path), digest)
            except OSError as e:
                raise TransferFailed(f"cannot keep the layer {digest}: {e.strerror}") from e

    def _try_root(self) -> None:
        """See that the overlay can be mounted here, while the container runs on the source. Raises: MigrateError."""
        if self._overlay is not None:
            self._require_layers(set())
            try:
                layers.try_to_mount(self._overlay, Path(self._beside) / "try")
            except OSError as e:
                raise TransferFailed(f"cannot mount an overlay in {self._beside}: {e.strerror}") from e

    def _mount_root(self, bundle: str) -> None:
        """Mount the overlay, all of which is there. Idempotent. Raises: MigrateError."""
        if self._overlay is not None:
            try:
                layers.mount(self._overlay, bundle)
            except OSError as e:
                raise TransferFailed(f"cannot mount {self._overlay.root}: {e.strerror}") from e

    def _unmount_root(self) -> None:
        """Idempotent. Raises: MigrateError."""
        if self._overlay is not None:
            for point in [*reversed(mounts.below(Path(self._beside))), self._overlay.root]:
                if (found := layers.at(point)) is not None:
                    layers.unmount(found)

    def _remove_layers(self) -> None:
        """Remove the layers that came with this move and that nobody else has. Idempotent. Raises: MigrateError."""
        if self._overlay is None:
            return
        try:
            with layer_store.locked():
                used = layer_store.in_use()
                for digest, made in self._coming.items():
                    made.remove()
                    with contextlib.suppress(FileNotFoundError):
                        if digest not in used and (places.LAYERS / digest).lstat().st_ino == made.inode:
                            layer_store.remove(digest)
                layer_store.sweep()
        except OSError as e:
            raise TransferFailed(f"cannot remove layers: {e.strerror}") from e

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
        self._beside = overlay.beside(note["bundle"])


def overlay_of(document: Any, bundle: str) -> Overlay | None:
    """Read the overlay that is to be made here. Raises: ProtocolError."""
    try:
        return Overlay.from_json(document).elsewhere(bundle, str(places.LAYERS)) if document else None
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ProtocolError(f"the overlay that is to be made here is none: {e}") from e
