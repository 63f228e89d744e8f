"""A bundle: a directory with config.json and the rootfs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from runtime.errors import SpecError
from runtime.spec import validate
from runtime.spec.config import Spec
from runtime.spec.parse import parse as parse_document
from runtime.spec.parse import refuse
from runtime.values import Value


class Bundle(Value):
    path: Path
    document: dict[str, Any]
    spec: Spec

    @property
    def rootfs(self) -> Path:
        """The rootfs as an absolute path without links."""
        return Path(os.path.realpath(self.path / self.spec.root_path))


def load(path: Path) -> Bundle:
    """Read and check a bundle.

    Raises: SpecError with all that is wrong.
    """
    path = Path(os.path.realpath(path))
    bundle = parse(path, path / "config.json")
    if not bundle.rootfs.is_dir():
        raise SpecError(f"/root/path: {bundle.rootfs} is no directory", hint="the bundle's rootfs must be there")
    return bundle


def parse(path: Path, config_json: Path) -> Bundle:
    """Read the config.json of a bundle from wherever a copy of it is. Raises: SpecError with all that is wrong."""
    try:
        document = json.loads(config_json.read_bytes())
    except FileNotFoundError:
        raise SpecError(f"JSON specification file {config_json} not found", hint="make one with: runtime spec") from None
    except OSError as e:
        raise SpecError(f"cannot read {config_json}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise SpecError(f"{config_json}: is not JSON: {e}") from e
    spec, problems = parse_document(document)
    refuse([*problems, *(validate.check(spec, document) if isinstance(document, dict) else ())], str(config_json))
    return Bundle(path, document, spec)
