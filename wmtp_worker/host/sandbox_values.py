"""Values on their way between a strange program and its judge: plain data as JSON, everything else as a number.

What the judge gets is built by the judge, of its own types: an object that claims to equal everything arrives as a
reference, which equals nothing.
"""

import array
import builtins
import datetime
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Set
from decimal import Decimal
from fractions import Fraction
from types import ModuleType
from typing import Any

_DICTS: dict[str, type[dict[Any, Any]]] = {"OrderedDict": OrderedDict, "Counter": Counter, "dict": dict}
_SEQUENCES: dict[str, type[Any]] = {"tuple": tuple, "frozenset": frozenset, "set": set, "deque": deque}
_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "Decimal": Decimal,
    "Fraction": Fraction,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "bytes": lambda text: text.encode("latin-1"),
    "bytearray": lambda text: bytearray(text, "latin-1"),
}
_TYPES = frozenset(value for value in vars(builtins).values() if isinstance(value, type))
_FROM_PARTS: dict[str, Callable[..., Any]] = {
    "complex": complex,
    "range": range,
    "timedelta": datetime.timedelta,
    "array": array.array,
}


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """`value` as JSON can hold it; `refer` numbers what is no plain data. Subclasses of plain types become those."""
    # the test's order: bool is an int
    if value is None or isinstance(value, bool):
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, list):
        return [encode(item, refer) for item in value]
    for name, kind in _DICTS.items():
        if isinstance(value, kind):
            return {"t": name, "v": [[encode(key, refer), encode(item, refer)] for key, item in value.items()]}
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return {"t": name, "v": [encode(item, refer) for item in value]}
    if isinstance(value, bytes | bytearray):
        return {"t": "bytes" if isinstance(value, bytes) else "bytearray", "v": value.decode("latin-1")}
    if isinstance(value, Decimal | Fraction):
        return {"t": "Decimal" if isinstance(value, Decimal) else "Fraction", "v": str(value)}
    if isinstance(value, datetime.date | datetime.time):
        name = "datetime" if isinstance(value, datetime.datetime) else type(value).__name__
        return {"t": name, "v": value.isoformat()}
    if (parts := _parts(value)) is not None:
        return {"t": parts[0], "v": [encode(item, refer) for item in parts[1:]]}
    if isinstance(value, type) and value in _TYPES:
        return {"t": "type", "v": value.__name__}
    if isinstance(value, ModuleType):
        return {"t": "module", "v": value.__name__}
    if isinstance(value, Set):  # the views of a dict
        return {"t": "set", "v": [encode(item, refer) for item in value]}
    return {"t": "reference", "v": refer(value)}


def _parts(value: Any) -> tuple[Any, ...] | None:
    match value:
        case complex():
            return "complex", value.real, value.imag
        case range():
            return "range", value.start, value.stop, value.step
        case datetime.timedelta():
            return "timedelta", value.days, value.seconds, value.microseconds
        case array.array():
            return "array", value.typecode, value.tolist()
    return None


def decode(document: Any, resolve: Callable[[str, Any], Any]) -> Any:
    """The value that `encode` made `document` of; `resolve(kind, v)` makes what is a "reference" or a "module".

    Raises `ValueError`, `TypeError` or `KeyError` for what no `encode` has made.
    """
    if isinstance(document, list):
        return [decode(item, resolve) for item in document]
    if not isinstance(document, dict):
        return document
    kind, value = document["t"], document["v"]
    if kind in ("reference", "module"):
        return resolve(kind, value)
    if kind == "type":
        return {one.__name__: one for one in _TYPES}[value]
    if kind in _FROM_TEXT:
        return _FROM_TEXT[kind](value)
    if kind in _DICTS:
        return _DICTS[kind]({decode(key, resolve): decode(item, resolve) for key, item in value})
    items = [decode(item, resolve) for item in value]
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](items)
    return _FROM_PARTS[kind](*items)
