"""What this machine knows about files and objects: digests, and uploads that were not finished.

A sqlite file in a private folder, which several processes may share. It only saves work: where it is lost, damaged or
full, digests are computed again and large uploads are looked for in the bucket, so none of that is an error.
"""

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LOG = logging.getLogger(__name__)
NAME = "journal.sqlite"
_VERSION = 2
_BATCH = 512
_KEEP_SECONDS = 60 * 86400
# a file changed twice within one tick of its file system's clock looks unchanged
_TICK_NS = 50_000_000
_COARSE_TICK_NS = 2_500_000_000
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, size INT, mtime INT, ctime INT, inode INT, sha256 TEXT, written INT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS objects (
    url BLOB, key BLOB, version TEXT, sha256 TEXT, written INT, PRIMARY KEY (url, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uploads (
    url BLOB, key BLOB, sha256 TEXT, token TEXT, written INT, PRIMARY KEY (url, key)) WITHOUT ROWID;
PRAGMA user_version = {_VERSION};
"""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells a changed file from an unchanged one without reading it. The time of the last change of anything
    (ctime) is there because it cannot be put back."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @staticmethod
    def of(status: os.stat_result) -> "Stamp":
        return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    @property
    def settled(self) -> bool:
        """Whether a later change would show: the last one is longer ago than a tick of the clock."""
        last = max(self.mtime_ns, self.ctime_ns)
        coarse = last % 1_000_000_000 == 0
        return time.time_ns() - last > (_COARSE_TICK_NS if coarse else _TICK_NS)


_Row = tuple[object, ...]
_Rows = Sequence[_Row]


class Journal:
    """Look-ups and notes; all may be called from any thread. Notes are written in batches, and by `flush`.

    Before `open` nothing is known, and nothing is kept.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self._url = _bytes(url)
        self._lock = threading.Lock()
        self._files: dict[str, tuple[Stamp, str]] = {}
        self._objects: dict[str, tuple[str, str]] = {}
        self._path = folder / NAME
        self._database: sqlite3.Connection | None = None
        self._opened = False

    def open(self, *, make: bool = True) -> None:
        """Use the file; where there is none it is made with its folder, unless `make` is false. Done once."""
        with self._lock:
            if not self._opened and (make or self._path.exists()):
                self._opened = True
                self._database = self._open()

    def file_digest(self, path: Path | str, stamp: Stamp) -> str | None:
        """The SHA-256 of the file as it was when it had this stamp."""
        name = str(path)
        with self._lock:
            if noted := self._files.get(name):
                return noted[1] if noted[0] == stamp else None
            row = self._one("SELECT size, mtime, ctime, inode, sha256 FROM files WHERE path = ?", _bytes(name))
        return str(row[4]) if row and row[:4] == _columns(stamp) else None

    def note_file(self, path: Path | str, stamp: Stamp, sha256: str, *, ours: bool = False) -> None:
        """Remember a digest, unless the file may yet change unnoticed; `ours`: nobody else writes it."""
        if ours or stamp.settled:
            with self._lock:
                self._files[str(path)] = (stamp, sha256)
                self._flush_some()

    def object_digest(self, key: str, version: str) -> str | None:
        """The SHA-256 of this version of an object."""
        with self._lock:
            if noted := self._objects.get(key):
                return noted[1] if noted[0] == version else None
            row = self._one("SELECT version, sha256 FROM objects WHERE url = ? AND key = ?", self._url, _bytes(key))
        return str(row[1]) if row and row[0] == version else None

    def note_object(self, key: str, version: str, sha256: str) -> None:
        """Remember the digest of an object's version."""
        with self._lock:
            self._objects[key] = (version, sha256)
            self._flush_some()

    def upload(self, key: str, sha256: str) -> Mapping[str, str] | None:
        """The token of an unfinished upload of this content to this key."""
        with self._lock:
            row = self._one("SELECT sha256, token FROM uploads WHERE url = ? AND key = ?", self._url, _bytes(key))
        if not row or row[0] != sha256:
            return None
        try:
            return dict(json.loads(str(row[1])))
        except (ValueError, TypeError):
            return None

    def uploads(self, sha256: str) -> list[str]:
        """The keys of unfinished uploads of this content, the newest first."""
        query = "SELECT key FROM uploads WHERE url = ? AND sha256 = ? ORDER BY written DESC"
        with self._lock:
            rows = self._all(query, self._url, sha256)
        return [bytes(row[0]).decode("utf-8", "surrogatepass") for row in rows]  # type: ignore[call-overload]

    def note_upload(self, key: str, sha256: str, token: Mapping[str, str]) -> None:
        """Remember how to go on with an upload; on disk at once, since the process may be killed."""
        row = (self._url, _bytes(key), sha256, json.dumps(dict(token)), int(time.time()))
        self._write([("INSERT OR REPLACE INTO uploads VALUES (?, ?, ?, ?, ?)", [row])])

    def forget_upload(self, key: str) -> None:
        """The upload is finished, or thrown away."""
        self._write([("DELETE FROM uploads WHERE url = ? AND key = ?", [(self._url, _bytes(key))])])

    def flush(self) -> None:
        """Write what was noted."""
        with self._lock:
            self._flush()

    def close(self) -> None:
        """Write what was noted and close the file."""
        with self._lock:
            self._flush()
            if self._database:
                self._database.close()
                self._database = None

    def _flush_some(self) -> None:
        if len(self._files) + len(self._objects) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._files and not self._objects:
            return
        now = int(time.time())
        files = [(_bytes(path), *_columns(stamp), sha256, now) for path, (stamp, sha256) in self._files.items()]
        objects = [(self._url, _bytes(key), version, sha256, now) for key, (version, sha256) in self._objects.items()]
        self._files, self._objects = {}, {}
        self._locked_write(
            [
                ("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", files),
                ("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?)", objects),
            ]
        )

    def _write(self, statements: Sequence[tuple[str, _Rows]]) -> None:
        with self._lock:
            self._locked_write(statements)

    def _locked_write(self, statements: Sequence[tuple[str, _Rows]]) -> None:
        if not self._database:
            return
        try:
            with self._database:
                for statement, rows in statements:
                    self._database.executemany(statement, rows)
        except sqlite3.Error as error:
            self._give_up(error)

    def _one(self, query: str, *values: object) -> _Row | None:
        return next(iter(self._all(query, *values)), None)

    def _all(self, query: str, *values: object) -> _Rows:
        if not self._database:
            return ()
        try:
            return self._database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            self._give_up(error)
            return ()

    def _give_up(self, error: sqlite3.Error) -> None:
        LOG.warning("going on without the journal %s: %s", self._path, error)
        if self._database:
            self._database.close()
            self._database = None

    def _open(self) -> sqlite3.Connection | None:
        for attempt in range(2):
            try:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                # sqlite would create it readable for all; tokens may be capabilities
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
                return self._connect()
            except (OSError, sqlite3.Error) as error:
                damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
                if attempt or not damaged:
                    LOG.warning("going on without the journal %s: %s", self._path, error)
                    break
                LOG.warning("starting the damaged journal %s anew: %s", self._path, error)
                for suffix in ("", "-wal", "-shm"):
                    Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        return None

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=10, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            found = database.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, _VERSION):
                raise sqlite3.DatabaseError(f"its format is {found}, not {_VERSION}")
            if not found:
                database.executescript(_SCHEMA)
            oldest = int(time.time()) - _KEEP_SECONDS
            with database:
                for table in ("files", "objects", "uploads"):
                    database.execute(f"DELETE FROM {table} WHERE written < ?", (oldest,))
        except BaseException:
            database.close()
            raise
        return database


def _columns(stamp: Stamp) -> tuple[int, int, int, int]:
    return stamp.size, stamp.mtime_ns, stamp.ctime_ns, stamp.inode


def _bytes(name: str) -> bytes:
    # file names may be no Unicode text, which is all that sqlite takes
    return name.encode("utf-8", "surrogatepass")
