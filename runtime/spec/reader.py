"""Typed access to a JSON document that collects every violation with the JSON pointer of the value it is about.

A wrong value is noted and read as its neutral value, so that one reading finds all that is wrong.
"""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")

# The widest integers that the specification knows; Python's own have no end.
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1


class Reader:
    """One JSON object and where it stands in its document; all readers of a document share `problems`."""

    def __init__(self, document: Any, pointer: str = "", problems: list[str] | None = None) -> None:
        self.problems: list[str] = [] if problems is None else problems
        self._pointer = pointer
        if not isinstance(document, dict):
            self.problems.append(f"{pointer or '/'}: must be an object")
            document = {}
        self._document: dict[str, Any] = document

    def at(self, key: str | int) -> str:
        """Return the JSON pointer of a member. Source: RFC 6901."""
        return f"{self._pointer}/{str(key).replace('~', '~0').replace('/', '~1')}"

    def wrong(self, key: str | int, words: str) -> None:
        """Note a violation of a member."""
        self.problems.append(f"{self.at(key)}: {words}")

    def has(self, key: str) -> bool:
        return self._document.get(key) is not None

    def keys(self) -> list[str]:
        return list(self._document)

    def _get(self, key: str, kind: type[T], words: str) -> T | None:
        value = self._document.get(key)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.wrong(key, f"must be {words}")
            return None
        return value

    def _list(self, key: str, kind: type[T], words: str) -> list[T | None]:
        found: list[T | None] = []
        for i, value in enumerate(self._get(key, list, "a list") or []):
            fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
            if not fits:
                self.problems.append(f"{self.at(key)}/{i}: must be {words}")
            found.append(value if fits else None)
        return found

    def text_or_none(self, key: str) -> str | None:
        value = self._get(key, str, "a string")
        if value is not None and _unfit(value):
            self.wrong(key, _unfit(value))
            return None
        return value

    def text(self, key: str) -> str:
        if not self.has(key):
            self.wrong(key, "is required")
        return self.text_or_none(key) or ""

    def choice(self, key: str, choices: tuple[str, ...] | frozenset[str], default: str) -> str:
        """Read a word out of a fixed set; one that is missing is `default`."""
        value = self.text_or_none(key)
        if value is None:
            return default
        if value not in choices:
            self.wrong(key, f"{value!r} is none of {', '.join(sorted(choices))}")
            return default
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        values = []
        for i, value in enumerate(self._list(key, str, "a string")):
            if value is None:
                continue
            if _unfit(value):
                self.problems.append(f"{self.at(key)}/{i}: {_unfit(value)}")
                continue
            values.append(value)
        return tuple(values)

    def flag(self, key: str) -> bool:
        return bool(self._get(key, bool, "true or false"))

    def integer_or_none(self, key: str, low: int = _INT_MIN, high: int = _INT_MAX) -> int | None:
        value = self._get(key, int, "an integer")
        if value is not None and not low <= value <= high:
            self.wrong(key, f"{value} is not between {low} and {high}")
            return None
        return value

    def integer(self, key: str, low: int = _INT_MIN, high: int = _INT_MAX) -> int:
        if not self.has(key):
            self.wrong(key, "is required")
        return self.integer_or_none(key, low, high) or 0

    def integers(self, key: str, low: int = _INT_MIN, high: int = _INT_MAX) -> tuple[int, ...]:
        values = []
        for i, value in enumerate(self._list(key, int, "an integer")):
            if value is not None and not low <= value <= high:
                self.problems.append(f"{self.at(key)}/{i}: {value} is not between {low} and {high}")
            elif value is not None:
                values.append(value)
        return tuple(values)

    def object(self, key: str, required: bool = False) -> Reader:
        """Return a member that is an object; one that is missing reads as empty unless it is required."""
        if required and not self.has(key):
            self.wrong(key, "is required")
        return Reader(self._get(key, dict, "an object") or {}, self.at(key), self.problems)

    def objects(self, key: str) -> list[Reader]:
        values: list[Any] = self._get(key, list, "a list") or []
        return [Reader(v, f"{self.at(key)}/{i}", self.problems) for i, v in enumerate(values)]

    def text_map(self, key: str) -> dict[str, str]:
        value: dict[str, Any] = self._get(key, dict, "an object") or {}
        members = Reader(value, self.at(key), self.problems)
        found = {}
        for name in value:
            text = members.text_or_none(name)
            if _unfit(name):
                members.wrong(name, f"the name {_unfit(name)}")
            elif text is not None:
                found[name] = text
        return found


def _unfit(text: str) -> str:
    """Say why a string cannot be handed to the kernel; an empty answer means that it can."""
    if "\0" in text:
        return "must not hold a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "must be encodable as UTF-8"
    return ""
