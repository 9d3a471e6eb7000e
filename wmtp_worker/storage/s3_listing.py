"""Listing an S3 bucket in the order of the keys, page by page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from http import HTTPStatus
from typing import Any
from xml.etree import ElementTree

from botocore.exceptions import ResponseStreamingError
from botocore.utils import parse_timestamp

from wmtp_worker.errors import StorageError

# lists file by file, folder by folder: `a/b` before `a.txt`, which is not S3's order, and begins anew from there
_BY_FOLDER = "SeaweedFS"


def entries(control: Any, bucket: str, prefix: str, after: str, where: str) -> Iterator[Mapping[str, Any]]:
    """S3's entries of keys (of the whole bucket) that begin with `prefix` and sort behind `after`, ascending.

    Raises what botocore raises, and `StorageError` where a server lists in another order: whoever compares two sorted
    lists would take what is there for missing.
    """
    begin = {"StartAfter": after} if after else {}
    last = ""
    for page in control.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, **begin):
        if page["ResponseMetadata"]["HTTPHeaders"].get("server", "").startswith(_BY_FOLDER):
            yield from _by_folder(control, bucket, prefix, after)
            return
        for entry in page.get("Contents", ()):
            if entry["Key"] <= last:
                fix = "use a bucket of another kind: this one (S3 Express?) cannot be compared with a folder"
                raise StorageError("the server lists keys in no order", where=where, fix=fix)
            last = entry["Key"]
            yield entry


def timestamp(value: Any) -> datetime:
    """As botocore reads it, but for a form that listings have by the thousand: that took most of their CPU."""
    if isinstance(value, str) and value.endswith("Z"):
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            pass
    return parse_timestamp(value)


def read_contents(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Take the objects out of a listing's body before botocore, which takes more than twice as long, reads the rest."""
    if response_dict["status_code"] != HTTPStatus.OK:
        return
    try:
        root = ElementTree.fromstring(response_dict["body"])
        tag = "{*}Contents" if root.tag.startswith("{") else "Contents"
        contents = root.findall(tag)
        entries = [_entry(one) for one in contents]
    except (ElementTree.ParseError, KeyError, TypeError, ValueError) as error:
        raise ResponseStreamingError(error=f"it is no listing: {error}") from error
    if entries:
        root[:] = [child for child in root if child.tag != contents[0].tag]
        response_dict["body"] = ElementTree.tostring(root)
        customized_response_dict["Contents"] = entries


def _entry(contents: ElementTree.Element) -> dict[str, Any]:
    found = {child.tag.rpartition("}")[2]: child.text or "" for child in contents}
    modified = timestamp(found["LastModified"])
    return {"Key": found["Key"], "Size": int(found["Size"]), "ETag": found["ETag"], "LastModified": modified}


def _by_folder(control: Any, bucket: str, prefix: str, after: str) -> Iterator[Mapping[str, Any]]:
    """One folder at a time, sorted here. Memory grows with the largest folder."""
    found: list[tuple[str, Mapping[str, Any] | None]] = []
    pages = control.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
    for page in pages:
        found += ((folder["Prefix"], None) for folder in page.get("CommonPrefixes", ()))
        # its empty folders, without an ETag, are no objects
        found += ((entry["Key"], entry) for entry in page.get("Contents", ()) if entry["ETag"].strip('"'))
    for key, entry in sorted(found, key=lambda one: one[0]):
        if entry is None:
            if key > after or after.startswith(key):
                yield from _by_folder(control, bucket, key, after)
        elif key > after:
            yield entry
