"""Typed access to a JSON document that knows, for every error, the JSON pointer of the value it is about."""

from __future__ import annotations

from typing import Any, TypeVar

from runtime.errors import SpecError

T = TypeVar("T")


class Reader:
    """One JSON object and where it stands in its document."""

    def __init__(self, document: Any, pointer: str = "") -> None:
        if not isinstance(document, dict):
            raise SpecError(f"{pointer or '/'}: must be an object")
        self._document, self._pointer = document, pointer

    def at(self, key: str) -> str:
        """Return the JSON pointer of a member. Source: RFC 6901."""
        return f"{self._pointer}/{key.replace('~', '~0').replace('/', '~1')}"

    def has(self, key: str) -> bool:
        return self._document.get(key) is not None

    def _get(self, key: str, kind: type[T], words: str) -> T | None:
        value = self._document.get(key)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise SpecError(f"{self.at(key)}: must be {words}")
        return value

    def _require(self, key: str, value: T | None) -> T:
        if value is None:
            raise SpecError(f"{self.at(key)}: is required")
        return value

    def _list(self, key: str, kind: type[T], words: str) -> list[T]:
        values = self._get(key, list, "a list") or []
        for i, value in enumerate(values):
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise SpecError(f"{self.at(key)}/{i}: must be {words}")
        return values

    def text_or_none(self, key: str) -> str | None:
        value = self._get(key, str, "a string")
        if value is not None and "\0" in value:
            raise SpecError(f"{self.at(key)}: must not hold a NUL character")
        return value

    def text(self, key: str) -> str:
        return self._require(key, self.text_or_none(key))

    def texts(self, key: str) -> tuple[str, ...]:
        values = self._list(key, str, "a string")
        for i, value in enumerate(values):
            if "\0" in value:
                raise SpecError(f"{self.at(key)}/{i}: must not hold a NUL character")
        return tuple(values)

    def flag(self, key: str) -> bool:
        return bool(self._get(key, bool, "true or false"))

    def integer_or_none(self, key: str) -> int | None:
        return self._get(key, int, "an integer")

    def integer(self, key: str) -> int:
        return self._require(key, self.integer_or_none(key))

    def integers(self, key: str) -> tuple[int, ...]:
        return tuple(self._list(key, int, "an integer"))

    def object(self, key: str, required: bool = False) -> Reader:
        """Return a member that is an object; one that is missing reads as empty unless it is required."""
        value = self._get(key, dict, "an object")
        return Reader(self._require(key, value) if required else value or {}, self.at(key))

    def objects(self, key: str) -> list[Reader]:
        return [Reader(v, f"{self.at(key)}/{i}") for i, v in enumerate(self._list(key, dict, "an object"))]

    def text_map(self, key: str) -> dict[str, str]:
        value: dict[str, Any] = self._get(key, dict, "an object") or {}
        for name, text in value.items():
            if not isinstance(text, str):
                raise SpecError(f"{Reader(value, self.at(key)).at(name)}: must be a string")
        return value
