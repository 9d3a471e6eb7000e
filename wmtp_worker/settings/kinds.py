"""Kinds of values that settings have, and what is said of those that are none."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_run_name(value: object) -> object:
    if isinstance(value, str) and (not RUN_NAME.fullmatch(value) or ".." in value):
        raise ValueError(
            "is no name for a run; use letters and digits, then also '.', '_' and '-'; at most 100; no '..'"
        )
    return value


def check_resume(value: object) -> object:
    if value in ("auto", "never") or (type(value) is int and value >= 0):
        return value
    raise ValueError("is neither auto, never nor a step; use one of those, for example 400")


def check_every(value: object) -> object:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError("is neither auto nor a number of steps; use one of those, for example 200")


def check_number_or_auto(value: object) -> object:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError("is neither auto nor a number; use one of those, for example 2")


def check_workdir(value: object) -> object:
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        raise ValueError("is no path; name a folder that may be created and written")
    if any("\ud800" <= character <= "\udfff" for character in str(value)):  # as Python shows bytes that are no UTF-8
        raise ValueError("is not UTF-8 text; name a folder that checkpoints and logs can spell")
    path = Path(os.path.expanduser(value))  # Path.expanduser would raise for an unknown ~user
    try:
        return path.absolute()
    except OSError as error:
        raise ValueError("is relative to a current directory that is gone; name a folder from / on") from error


def check_prefix(value: object) -> object:
    if value in (None, "null"):
        return ""
    if isinstance(value, str):
        value = value.strip("/")
        if any(part in ("", ".", "..") for part in value.split("/")) and value:
            raise ValueError("has an empty, '.' or '..' part; use plain names, as team/project")
    return value


def check_difficulty_bin(value: object) -> object:
    if isinstance(value, list) and len(value) == 3 and all(type(number) in (int, float) for number in value):
        low, high, weight = value
        if 0 <= low <= high and low == int(low) and high == int(high) and weight > 0:
            return value
    what = "has a part that is not [low, high, weight] with whole numbers and a weight above 0"
    raise ValueError(f"{what}; write as [[7, 9, 1], [10, 12, 0.5]]")


Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
