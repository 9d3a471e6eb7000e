"""The YAML layers: `configs/` of this package, and files of the user's own."""

import importlib.resources
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from wmtp_worker.settings.kinds import RUN_NAME
from wmtp_worker.settings.schema import SECTIONS
from wmtp_worker.settings.values import Given, Problem, Yaml, construct, nearest, opened, unknown


@dataclass(frozen=True)
class Layer:
    """A recipe or a preset: its short name and the file that holds it."""

    name: str
    path: Path


def configs() -> Path:
    """The folder with defaults, recipes and presets: inside an installed package, beside it in a checkout."""
    package = Path(str(importlib.resources.files("wmtp_worker")))
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find(kind: str, chosen: str, where: str, problems: list[Problem]) -> Layer | None:
    """The file of a recipe or preset: by name from `configs/`, or any .yaml file by its path."""
    if chosen.endswith((".yaml", ".yml")) or "/" in chosen:
        path = Path(os.path.expanduser(chosen))
        if not os.path.isfile(path):
            problems.append(Problem(f"{kind} file {chosen!r} does not exist", where, f"check the path; {_known(kind)}"))
            return None
        name = path.stem.removeprefix(f"{kind}.")
        if not RUN_NAME.fullmatch(name):
            fix = "rename the file: letters, digits, '.', '_' and '-' only"
            problems.append(Problem(f"{kind} file {chosen!r} gives no usable name", where, fix))
        return Layer(name, path)
    path = configs() / f"{kind}.{chosen}.yaml"
    if not os.path.isfile(path):
        near = nearest(chosen, names(kind))
        hint = f"did you mean {near}? " if near else ""
        problems.append(Problem(f"unknown {kind} {chosen!r}", where, hint + _known(kind)))
        return None
    return Layer(chosen, path)


def names(kind: str) -> list[str]:
    """The recipes or presets that come with the package."""
    return sorted(path.name.split(".", 1)[1].removesuffix(".yaml") for path in configs().glob(f"{kind}.*.yaml"))


def _known(kind: str) -> str:
    return f"there are {', '.join(names(kind))}, or give the path of a .yaml file"


def read(path: Path, problems: list[Problem]) -> dict[str, Given]:
    """Dotted key to value and line of one YAML file; whatever is wrong with it is added to `problems`."""
    shown = display(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        problems.append(Problem(f"{shown} cannot be read: {reason}", None, "it must be a readable YAML file"))
        return {}
    try:
        with opened(text) as loader:
            node = loader.get_single_node()
            if isinstance(node, yaml.MappingNode):
                return dict(_walk(loader, node, "", shown, problems))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{shown}:{mark.line + 1}" if mark else shown
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        problems.append(Problem(f"malformed YAML: {what}", where, "correct that line or the one before it"))
        return {}
    if node is not None:
        fix = "write it as `group:`, then `  key: value`"
        problems.append(Problem(f"{shown} is not a mapping of settings", None, fix))
    return {}


def _walk(
    loader: Yaml, node: yaml.MappingNode, prefix: str, shown: str, problems: list[Problem]
) -> Iterator[tuple[str, Given]]:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = f"{prefix}{key_node.value}"
        where = f"{shown}:{line}"
        if key in seen:
            problems.append(Problem(f"{key} stands twice, first in line {seen[key]}", where, "keep one of the two"))
            continue
        seen[key] = line
        if key in SECTIONS and isinstance(value_node, yaml.MappingNode):
            yield from _walk(loader, value_node, f"{key}.", shown, problems)
        elif key in SECTIONS and value_node.tag == "tag:yaml.org,2002:null":
            continue  # a group whose settings are all commented out
        elif problem := unknown(key, where):
            problems.append(problem)
        else:
            yield key, Given(construct(loader, value_node, key), where)


def display(path: Path) -> str:
    """The path as a person would type it here."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except (ValueError, OSError):  # elsewhere, or the current directory is gone
        return str(path)
