"""Frozen values with named fields, as dataclasses are, but made without compiling code for each class.

A frozen dataclass costs a third of a millisecond when its module is imported; this runtime has seventy, and a verb's whole work
takes tens of milliseconds.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar, dataclass_transform

T = TypeVar("T", bound="Value")


@dataclass_transform(frozen_default=True)
class Value:
    """Base of frozen values: the class's annotations are its fields, in order, its attributes their defaults."""

    _fields: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        # Annotations are text here, since every module defers them.
        names = [n for n, kind in cls.__annotations__.items() if not str(kind).startswith("ClassVar")]
        cls._fields = (*cls._fields, *(n for n in names if n not in cls._fields))
        cls._defaults = {**cls._defaults, **{n: cls.__dict__[n] for n in names if n in cls.__dict__}}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        fields = self._fields
        if len(args) > len(fields):
            raise TypeError(f"{type(self).__name__} takes {len(fields)} values, not {len(args)}")
        values = {**self._defaults, **dict(zip(fields, args, strict=False))}
        for name in kwargs:
            if name not in fields or fields.index(name) < len(args):
                raise TypeError(f"{type(self).__name__} has no further field {name!r}")
        values.update(kwargs)
        missing = [n for n in fields if n not in values]
        if missing:
            raise TypeError(f"{type(self).__name__} needs {', '.join(missing)}")
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *(getattr(self, n) for n in self._fields)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in self._fields)})"


def replace(value: T, **changes: Any) -> T:
    """Return a copy with some fields changed. Raises: TypeError for a field that is not there."""
    return type(value)(**{**value.__dict__, **changes})


def as_dict(value: Value) -> dict[str, Any]:
    """Return the fields and their values."""
    return {n: getattr(value, n) for n in value._fields}
