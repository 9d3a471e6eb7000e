"""Values as people write them, in YAML, in a variable or behind `--set`, and where each one stands."""

import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from wmtp_worker.errors import sentence
from wmtp_worker.settings.schema import CHOSEN, FIELDS, SECTIONS, SETTABLE


@dataclass(frozen=True)
class Given:
    """A value and its origin; `explicit` if a person gave it for this run, not a file of `configs/`."""

    value: Any
    source: str
    explicit: bool = False


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the settings; all of them are reported together."""

    what: str
    where: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        return sentence(self.what, self.where, self.fix)


class Yaml(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number and a date is text."""


# YAML 1.1 wants a dot in every float and makes a run called 2026-01-01 a date
Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?|\d*\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@contextmanager
def opened(text: str) -> Iterator[Yaml]:
    """A loader of `text`. Raises YAMLError at once if it holds characters that YAML forbids."""
    loader = Yaml(text)
    try:
        yield loader
    finally:
        loader.dispose()


def construct(loader: Yaml, node: yaml.Node, key: str) -> Any:
    """The value of a YAML node for a setting: a plain scalar stays the text it is where text is expected."""
    null = node.tag == "tag:yaml.org,2002:null"
    if isinstance(node, yaml.ScalarNode) and not null and str in _kinds(key) and int not in _kinds(key):
        return node.value
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, IndexError) as error:  # a tag that the text does not fit, as !!int x
        raise yaml.MarkedYAMLError(problem=f"{node.value!r} is no {node.tag}", problem_mark=node.start_mark) from error


def parse(text: str, key: str) -> Any:
    """The value of `text` for a setting, read as YAML; a list may also be written a,b. Raises ValueError."""
    kinds = _kinds(key)
    if not text.strip():
        return [] if list in kinds else None
    if str in kinds and int not in kinds:
        # text is text, whatever it would mean as YAML; only null has to be told apart
        return None if text in ("null", "~") and nullable(key) else text
    try:
        with opened(text) as loader:
            node = loader.get_single_node()
            value = None if node is None else construct(loader, node, key)
    except yaml.YAMLError as error:
        raise ValueError("is not valid YAML") from error
    if list in kinds and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def plain(text: str) -> str:
    """`text`, if it may become a variable of the environment. Raises ValueError for a null byte: none may hold one."""
    if "\0" in text:
        raise ValueError("a null byte")
    return text


def unknown(key: str, where: str) -> Problem | None:
    """Why `key` cannot be set, or None if it can."""
    if key in SETTABLE:
        return None
    if key in CHOSEN:
        return Problem(
            f"{key} cannot be set by another setting", where, f"choose it with --{key} or WMTP_{key.upper()}"
        )
    if key in SECTIONS:
        members = [name for name in SETTABLE if name.startswith(f"{key}.")]
        return Problem(f"{key} is a group of settings, not a setting", where, f"set one of {', '.join(members)}")
    return Problem(f"unknown setting {key!r}", where, _nearest_setting(key))


def nearest(word: str, known: tuple[str, ...] | list[str], cutoff: float = 0.6) -> str | None:
    """The known word most like `word`, if any is."""
    return next(iter(get_close_matches(word, known, n=1, cutoff=cutoff)), None)


def allowed(key: str) -> tuple[str, ...]:
    """The words a setting may be, if it is a choice between words."""
    return tuple(
        str(word) for part in _parts(FIELDS[key].annotation) if get_origin(part) is Literal for word in get_args(part)
    )


def nullable(key: str) -> bool:
    """Whether null is a value of this setting (the loader itself fills run.name)."""
    return key == "run.name" or type(None) in _kinds(key)


def _nearest_setting(key: str) -> str:
    found = nearest(key, SETTABLE)
    if not found:
        # the right name in the wrong group, or in none
        leaf = key.rsplit(".", 1)[-1]
        near = nearest(leaf, [name.rsplit(".", 1)[-1] for name in SETTABLE], cutoff=0.75)
        found = next((name for name in SETTABLE if name.rsplit(".", 1)[-1] == near), None)
    return f"did you mean {found}?" if found else "`wmtp settings show` lists them all"


def _kinds(key: str) -> set[Any]:
    """The plain types of a setting: some of str, int, float, bool, list, NoneType; a Path counts as str."""
    kinds: set[Any] = set()
    for part in _parts(FIELDS[key].annotation):
        if get_origin(part) is Literal:
            kinds |= {type(word) for word in get_args(part)}
        else:
            kinds.add(get_origin(part) or (part if part in (str, int, float, bool, type(None)) else str))
    return kinds


def _parts(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return _parts(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [inner for part in get_args(kind) for inner in _parts(part)]
    return [kind]
