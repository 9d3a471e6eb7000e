"""Plausible wrong programs: one small change in a right one, as people and models make them.

The text of the program stays as it is but for the change; a program printed anew from its syntax tree would be known
by its looks. Whether a change makes it wrong, only its tests can tell (`label`).
"""

import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import accumulate, zip_longest

import numpy as np

_WORDS: dict[str, tuple[str, ...]] = {
    **{"+": ("-",), "-": ("+",), "*": ("+", "//"), "/": ("//", "*"), "//": ("/", "%"), "%": ("//",), "**": ("*",)},
    **{"<<": (">>",), ">>": ("<<",), "&": ("|",), "|": ("&",), "^": ("|",)},
    **{"+=": ("-=",), "-=": ("+=",), "*=": ("+=",), "|=": ("&=",), "&=": ("|=",)},
    **{"<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="), "==": ("!=", ">="), "!=": ("==",)},
    **{"and": ("or",), "or": ("and",), "True": ("False",), "False": ("True",)},
    **{"min": ("max",), "max": ("min",), "any": ("all",), "all": ("any",), "floor": ("ceil",), "ceil": ("floor",)},
    **{"upper": ("lower",), "lower": ("upper",), "lstrip": ("rstrip",), "rstrip": ("lstrip",), "find": ("rfind",)},
    **{"append": ("extend",), "sorted": ("list",), "set": ("list",), "sum": ("len", "max")},
}
_DROPPABLE = (ast.Expr, ast.Assign, ast.AugAssign, ast.If, ast.For, ast.While, ast.Return, ast.Continue, ast.Break)


@dataclass(frozen=True)
class _Edit:
    """Bytes `start` to `end` of the program become `text`."""

    kind: str
    start: int
    end: int
    text: str


def mutants(code: str, seed: int) -> Iterator[str]:
    """Different programs that each differ from `code` in one place, in an order drawn from `seed`, kind by kind.

    Each parses, and none is the same program as `code`. Code that is no Python 3 has none.
    """
    try:
        tree = ast.parse(code)
        edits = sorted(set(_edits(code, tree)), key=astuple)
    except (SyntaxError, ValueError, RecursionError, tokenize.TokenError):
        return
    source = code.encode()
    seen = {ast.dump(tree)}
    for edit in _in_turn(edits, seed):
        changed = (source[: edit.start] + edit.text.encode() + source[edit.end :]).decode()
        if not code.endswith("\n"):
            changed = changed.rstrip("\n")
        try:
            known = ast.dump(ast.parse(changed))
        except SyntaxError:
            continue
        if known not in seen:
            seen.add(known)
            yield changed


def _in_turn(edits: list[_Edit], seed: int) -> Iterator[_Edit]:
    """By chance, but one of each kind after the other: there are far more names to exchange than operators."""
    random = np.random.default_rng(seed)
    kinds: dict[str, list[_Edit]] = defaultdict(list)
    for number in random.permutation(len(edits)).tolist():
        kinds[edits[number].kind].append(edits[number])
    for one_of_each in zip_longest(*kinds.values()):
        yield from (edit for edit in one_of_each if edit is not None)


def _edits(code: str, tree: ast.Module) -> Iterator[_Edit]:
    lines = _Lines(code)
    # before Python 3.12, what stands inside an f-string has no place of its own
    misplaced = {part for text in ast.walk(tree) if isinstance(text, ast.JoinedStr) for part in ast.walk(text)}
    nodes = [node for node in ast.walk(tree) if node not in misplaced]
    yield from _word_edits(code, lines, _own_names(nodes))
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            yield from _swapped_names(node, misplaced, lines)
        elif isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Constant):
            yield _Edit("condition", *lines.span(node.test), f"not ({lines.text(node.test)})")
        elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
            yield _Edit("return", *lines.span(node.value), "None")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range" and node.args:
            last = node.args[min(1, len(node.args) - 1)]
            yield from (_Edit("bound", *lines.span(last), f"{lines.text(last)} {change}") for change in ("+ 1", "- 1"))
        elif isinstance(node, ast.Slice):
            bounds = [bound for bound in (node.lower, node.upper) if bound is not None]
            yield from (_Edit("bound", *lines.span(bound), f"{lines.text(bound)} + 1") for bound in bounds)
        yield from _dropped(node, lines)


def _own_names(nodes: list[ast.AST]) -> set[str]:
    """What the program itself gives a meaning, even if Python has one for it."""
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return functions | stored | {node.arg for node in nodes if isinstance(node, ast.arg)}


def _word_edits(code: str, lines: "_Lines", own: set[str]) -> Iterator[_Edit]:
    """Operators, numbers and well-known names, by the tokens of the program."""
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        kind, words = "", tuple[str, ...]()
        if token.type == tokenize.NUMBER and token.string.isdecimal():
            kind, number = "number", int(token.string)
            words = (str(number + 1), str(number - 1))[: 2 if number else 1]
        elif token.type in (tokenize.OP, tokenize.NAME) and token.string not in own:
            kind, words = "word", _WORDS.get(token.string, ())
        start, end = lines.of_text(*token.start), lines.of_text(*token.end)
        yield from (_Edit(kind, start, end, word) for word in words)


def _swapped_names(function: ast.FunctionDef, misplaced: set[ast.AST], lines: "_Lines") -> Iterator[_Edit]:
    """One parameter or local variable in the place of another."""
    inside = [node for node in ast.walk(function) if isinstance(node, ast.Name) and node not in misplaced]
    stored = {node.id for node in inside if isinstance(node.ctx, ast.Store)}
    names = sorted({argument.arg for argument in function.args.args} | stored)
    for node in inside:
        if isinstance(node.ctx, ast.Load) and node.id in names:
            yield from (_Edit("name", *lines.span(node), name) for name in names if name != node.id)


def _dropped(node: ast.AST, lines: "_Lines") -> Iterator[_Edit]:
    """One statement of several less; a `pass` instead would be seen."""
    if isinstance(node, ast.Module):
        return
    for statements in (getattr(node, "body", None), getattr(node, "orelse", None)):
        if isinstance(statements, list) and len(statements) > 1:
            for statement in statements:
                if isinstance(statement, _DROPPABLE) and not _is_text(statement) and (span := lines.whole(statement)):
                    yield _Edit("dropped", *span, "")


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


class _Lines:
    """From the places of syntax tree and tokens to bytes of the program."""

    def __init__(self, code: str) -> None:
        self._code = code.encode()
        self._lines = list(io.StringIO(code))
        self._starts = [0, *accumulate(len(line.encode()) for line in self._lines)]

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """Where a node begins and ends."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._starts[node.lineno - 1] + node.col_offset
        return start, self._starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr | ast.stmt) -> str:
        start, end = self.span(node)
        return self._code[start:end].decode()

    def of_text(self, line: int, column: int) -> int:
        """Tokens count characters where the tree counts bytes."""
        if line > len(self._lines):
            return len(self._code)
        return self._starts[line - 1] + len(self._lines[line - 1][:column].encode())

    def whole(self, statement: ast.stmt) -> tuple[int, int] | None:
        """The lines of a statement that has them for itself, but for a comment behind it."""
        assert statement.end_lineno is not None
        first, last = self._starts[statement.lineno - 1], self._starts[statement.end_lineno]
        start, end = self.span(statement)
        behind = self._code[end:last].strip()
        alone = not self._code[first:start].strip() and (not behind or behind.startswith(b"#"))
        return (first, last) if alone else None
