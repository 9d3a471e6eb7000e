"""The two sides of a test by assertions: the strange program answers calls, its judge makes them and compares.

They are processes of their own. All the program can do about its verdict is to answer with values (`sandbox_values`).
"""

import ast
import builtins
import json
import operator
import os
import struct
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from wmtp_worker.host.sandbox_values import decode, encode

_HEADER = struct.Struct(">I")
_LARGEST = 64 << 20
_DETAIL = 300
OTHER_OUTPUT = "another output than expected"
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda value, *args, **kwargs: value(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "contains": operator.contains,
    "iter": list,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "next": next,
}


def send(descriptor: int, document: Any) -> None:
    data = json.dumps(document).encode()
    view = memoryview(_HEADER.pack(len(data)) + data)
    while view:
        view = view[os.write(descriptor, view) :]


def receive(descriptor: int, largest: int = _LARGEST) -> Any:
    """The next document. Raises `EOFError` at the end, `ValueError` for what is too large or is none."""
    (size,) = _HEADER.unpack(_exactly(descriptor, _HEADER.size))
    if size > largest:
        raise ValueError(f"a message of {size} bytes")
    return json.loads(_exactly(descriptor, size))


def _exactly(descriptor: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = os.read(descriptor, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")[:_DETAIL]


def prevented(error: BaseException) -> str | None:
    """Why an error says nothing of the program: the sandbox has not what it needs."""
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").split(".")[0]
        return None if name in sys.stdlib_module_names else f"needs the module {name}"
    return f"the sandbox does not allow it: {describe(error)}" if isinstance(error, PermissionError) else None


def prepare() -> None:
    """What a program may expect of its interpreter, and the isolated one has not."""
    sys.set_int_max_str_digits(0)
    for name in ("exit", "quit"):
        setattr(builtins, name, sys.exit)


# --- the program's side


def serve(code: str, requests: int, answers: int) -> None:
    """Load the program, then answer what the judge asks, until it asks no more."""
    prepare()
    objects: list[Any] = []

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def resolve(kind: str, value: Any) -> Any:
        return objects[value] if kind == "reference" else import_module(value)

    def attempt(body: Callable[[Any], dict[str, Any]], question: Any) -> dict[str, Any]:
        try:
            return body(question)
        except BaseException as error:
            if reason := prevented(error):
                return {"prevented": reason}
            return {"raised": type(error).__name__, "message": str(error)[:_DETAIL]}

    def named(question: dict[str, Any]) -> dict[str, Any]:
        return {"values": {name: encode(namespace[name], refer) for name in question["names"] if name in namespace}}

    def perform(question: dict[str, Any]) -> dict[str, Any]:
        args = [decode(item, resolve) for item in question["args"]]
        kwargs = {name: decode(item, resolve) for name, item in question["kwargs"].items()}
        value = _OPERATIONS[question["operation"]](objects[question["of"]], *args, **kwargs)
        # lists, sets and dicts that were changed in place
        after = {number: encode(item, refer) for number, item in enumerate(args) if isinstance(item, list | set | dict)}
        changed = {number: item for number, item in after.items() if item != question["args"][number]}
        return {"value": encode(value, refer), "changed": changed}

    namespace: dict[str, Any] = {"__name__": "solution"}

    def load(question: None) -> dict[str, Any]:
        exec(compile(code, "<solution>", "exec"), namespace)
        return {}

    loaded = attempt(load, None)
    while True:
        try:
            question = receive(requests)
        except EOFError:
            return
        if "names" in question:
            send(answers, loaded or attempt(named, question))
        else:
            send(answers, attempt(perform, question))


# --- the judge's side; no error of these is swallowed by a test's own `except Exception`


class _Undecided(BaseException):
    """The tests cannot say whether the program is right."""


class _Gone(BaseException):
    """The program has ended, or closed its end."""


class _Raised(Exception):
    """What a call into the program raised, where it is no exception of Python's own."""


class _Peer:
    """Asks the program."""

    def __init__(self, questions: int, answers: int) -> None:
        self._questions = questions
        self._answers = answers
        self._end: BaseException | None = None

    def check(self) -> None:
        """Raise again what a test's bare `except:` may have swallowed."""
        if self._end is not None:
            raise self._end

    def names(self, wanted: list[str]) -> dict[str, Any]:
        """The values of those of these names that the program defines."""
        values = self._ask({"names": wanted})["values"]
        return {name: self._decode(values[name]) for name in wanted if name in values}

    def operate(self, operation: str, of: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        question = {
            "operation": operation,
            "of": of,
            "args": [encode(item, _number) for item in args],
            "kwargs": {name: encode(item, _number) for name, item in kwargs.items()},
        }
        answer = self._ask(question)
        for number, document in answer["changed"].items():
            _become(args[int(number)], self._decode(document))
        return self._decode(answer["value"])

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            send(self._questions, question)
            answer: dict[str, Any] = receive(self._answers)
        except (EOFError, OSError):
            self._end = _Gone()
        else:
            if "prevented" in answer:
                self._end = _Undecided(answer["prevented"])
        self.check()
        if "raised" in answer:
            raise _exception(answer["raised"], answer["message"])
        return answer

    def _decode(self, document: Any) -> Any:
        return decode(document, self._resolve)

    def _resolve(self, kind: str, value: Any) -> Any:
        if kind == "reference":
            return _Remote(self, int(value))
        if value.split(".")[0] not in sys.stdlib_module_names:
            raise ValueError(f"a module {value}")
        return import_module(value)


class _Remote:
    """An object that lives in the program: a function, a class, an instance, an iterator."""

    def __init__(self, peer: _Peer, number: int) -> None:
        self.__dict__.update(_peer=peer, _number=number)

    def _operate(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        peer: _Peer = self.__dict__["_peer"]
        return peer.operate(operation, self.__dict__["_number"], args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._operate("call", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__name__":
            raise AttributeError(name)
        return self._operate("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._operate("setattr", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._operate("getitem", key)

    def __contains__(self, item: Any) -> bool:
        return bool(self._operate("contains", item))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._operate("iter"))

    def __next__(self) -> Any:
        return self._operate("next")

    def __len__(self) -> int:
        return int(self._operate("len"))

    def __bool__(self) -> bool:
        return bool(self._operate("bool"))

    def __str__(self) -> str:
        return str(self._operate("str"))

    def __repr__(self) -> str:
        return str(self._operate("repr"))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _Remote) and other is not self:
            raise _Undecided("compares objects that only the program can compare")
        return other is self

    def __hash__(self) -> int:
        return hash(self.__dict__["_number"])

    def __deepcopy__(self, memo: object = None) -> Any:
        raise _Undecided("copies an object of the program")

    __copy__ = __reduce__ = __deepcopy__


def _number(value: Any) -> int:
    if isinstance(value, _Remote):
        number: int = value.__dict__["_number"]
        return number
    raise _Undecided(f"hands a {type(value).__name__} to the program")


def _become(value: Any, new: Any) -> None:
    if isinstance(value, list):
        value[:] = new
    else:
        value.clear()
        value.update(new)


def _exception(name: str, message: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(message)
        except TypeError:  # UnicodeDecodeError and its like want more
            pass
    return _Raised(f"{name}: {message}")


def judge(setup: str, tests: list[str], questions: int, answers: int) -> dict[str, str]:
    """The verdict: status passed, failed, error or gone, and a word about it. Passed: every test ran to its end."""
    prepare()
    if not tests:
        return {"status": "error", "detail": "there are no tests"}
    sources = [setup, *tests]
    try:
        trees = [ast.parse(source) for source in sources]
    except SyntaxError as error:
        return {"status": "error", "detail": f"the tests do not parse: {error}"[:_DETAIL]}
    peer = _Peer(questions, answers)
    namespace: dict[str, Any] = {"__name__": "tests"}
    current = ""
    try:
        namespace |= _defined(peer, trees)
        for source, tree in zip(sources, trees, strict=True):
            current = source.strip()
            exec(compile(tree, "<tests>", "exec"), namespace)
            peer.check()
    except _Undecided as error:
        return {"status": "error", "detail": str(error)[:_DETAIL]}
    except _Gone:
        return {"status": "gone", "detail": "the program ended before its tests did"}
    except BaseException as error:
        return {"status": "failed", "detail": f"{describe(error)} in: {current}"[:_DETAIL]}
    return {"status": "passed", "detail": ""}


def _defined(peer: _Peer, trees: list[ast.Module]) -> dict[str, Any]:
    """What the tests use of the program. It cannot put its own `abs` or `sorted` into a test of something else."""
    used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    values = peer.names(sorted(used))
    if any(not hasattr(builtins, name) for name in values):
        return {name: value for name, value in values.items() if not hasattr(builtins, name)}
    return values
