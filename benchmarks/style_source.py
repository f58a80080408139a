"""Source files taken apart for `style_figures.py`: prose, sentences, lines, bodies, rooms.

Each function here answers one question about one file or one text, and counts nothing over files.

What the words mean: a code line is a line on which a token of code begins, docstrings aside. An
f-string is one token. A sentence ends with . ! or ? before a space, or with its paragraph or list
entry. Indented paragraphs are examples and have no sentences. A word holds a letter or a digit.
A break of a body is a blank line or a line with nothing but a comment. A room is a module or
folder directly under the package. An arrow is a pair of rooms of which one imports the other, at
its top or inside a function.
"""

import ast
import functools
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
LAYOUT_TOKENS = {
    tokenize.ENCODING,
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
# Python 3.12 and later cut an f-string into pieces; before, the numbers do not exist.
FSTRING_START = getattr(tokenize, "FSTRING_START", -1)
FSTRING_END = getattr(tokenize, "FSTRING_END", -1)
DIRECTIVES = re.compile(r"#\s*(!|noqa\b|type:|pyright:|ruff:|fmt:)")
DERIVABLE = re.compile(r"\((called by|floor)\b")
LIST_ENTRY = re.compile(r"\s*([-*]|\d+\.)\s")
SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bcf)(?<!\bvs)[.!?][\"')\]`*]*\s+")


# ---- reading ----


@dataclass(frozen=True, eq=False)
class Source:
    """One file: where it lies under its package, its lines, its tree and its tokens."""

    path: Path
    lines: list[str]
    tree: ast.Module
    tokens: list[tokenize.TokenInfo]


@dataclass(frozen=True)
class Prose:
    """A docstring or a comment, without its quotes or signs, and the line on which it begins."""

    source: Source
    line: int
    text: str


def read_source(path: Path, package: Path) -> Source:
    """The file at `path`, parsed; raises SyntaxError if it is no Python of this interpreter."""
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return Source(path.relative_to(package), text.splitlines(), ast.parse(text), list(tokens))


def read_package(package: Path) -> list[Source]:
    """All Python files under the folder `package`, in the order of their names."""
    return [read_source(path, package) for path in sorted(package.rglob("*.py"))]


def functions(source: Source) -> Iterator[Function]:
    """Every function and method, nested ones too."""
    for node in ast.walk(source.tree):
        if isinstance(node, Function):
            yield node


def statements(source: Source) -> Iterator[ast.stmt]:
    """Every statement, at every depth."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.stmt):
            yield node


def count_lines(function: Function) -> int:
    """Lines of a function from its `def` to its end, docstring included."""
    return (function.end_lineno or 0) - function.lineno + 1


def docstring_node(node: ast.AST) -> ast.Constant | None:
    """The docstring of a module, class or function, as it stands in the tree."""
    if not isinstance(node, ast.Module | ast.ClassDef | Function) or not node.body:
        return None

    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return first.value if isinstance(first.value.value, str) else None
    return None


def take_off(text: str, columns: int) -> str:
    """A text without the first `columns` spaces of each line, so far as it has them.

    `inspect.cleandoc` would take off the indentation of an example that ends a short docstring."""
    return re.sub(rf"^ {{1,{columns}}}", "", text, flags=re.MULTILINE) if columns else text


def docstrings(source: Source) -> list[Prose]:
    """The docstrings of a file, with their indentation taken off."""
    nodes = [docstring_node(node) for node in ast.walk(source.tree)]
    return [
        Prose(source, node.lineno, take_off(str(node.value), node.col_offset).strip())
        for node in nodes
        if node is not None
    ]


def is_alone(token: tokenize.TokenInfo) -> bool:
    """Whether a comment has its line for itself."""
    return token.line.lstrip().startswith("#")


def comments(source: Source) -> list[Prose]:
    """The comments of a file, without those written for tools, such as noqa.

    A comment alone on its line continues the comment of the line above."""
    blocks: list[list[tokenize.TokenInfo]] = []
    for token in source.tokens:
        if token.type != tokenize.COMMENT or DIRECTIVES.match(token.string):
            continue

        if is_alone(token) and blocks and blocks[-1][-1].start[0] == token.start[0] - 1:
            blocks[-1].append(token)
        else:
            blocks.append([token])

    return [
        Prose(source, block[0].start[0], "\n".join(token.string.lstrip("# ") for token in block))
        for block in blocks
    ]


def is_derivable(text: str) -> bool:
    """Whether a text says what a tool can derive: who calls a thing, or on which floor it is."""
    return bool(DERIVABLE.search(text))


# ---- words ----


def paragraphs(text: str) -> list[str]:
    """Paragraphs and list entries, each on one line.

    Paragraphs that are indented throughout are examples, and left out."""
    units = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        if all(line.startswith((" ", ">>>")) for line in lines):
            continue

        entry = [lines[0]]
        for line in lines[1:]:
            if LIST_ENTRY.match(line):
                units.append(" ".join(entry))
                entry = []
            entry.append(line.strip())
        units.append(" ".join(entry))
    return units


def sentences(text: str) -> list[str]:
    """The sentences of a text that hold at least one word."""
    parts = [part for unit in paragraphs(text) for part in SENTENCE_END.split(unit)]
    return [part for part in parts if count_words(part)]


def count_words(sentence: str) -> int:
    """How many of the parts between spaces hold a letter or a digit."""
    return sum(any(sign.isalnum() for sign in part) for part in sentence.split())


def sentence_lengths(prose: list[Prose]) -> list[int]:
    """Words of every sentence."""
    return [count_words(sentence) for each in prose for sentence in sentences(each.text)]


# ---- lines ----


def docstring_lines(source: Source) -> set[int]:
    """The numbers of the lines that docstrings cover."""
    nodes = [docstring_node(node) for node in ast.walk(source.tree)]
    return {
        line for node in nodes if node for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }


@functools.cache
def code_tokens(source: Source) -> Counter[int]:
    """{line: tokens of code that begin on it}, for the lines that have any."""
    prose = docstring_lines(source)
    found: Counter[int] = Counter()
    depth = 0
    for token in source.tokens:
        depth -= token.type == FSTRING_END
        inside = depth > 0 or token.type == FSTRING_END
        depth += token.type == FSTRING_START
        line = token.start[0]
        if token.type not in LAYOUT_TOKENS and not inside and line not in prose:
            found[line] += 1
    return found


def body_lines(source: Source, function: Function) -> list[str]:
    """The lines from the first statement after the docstring to the last."""
    body = function.body[1:] if docstring_node(function) else function.body
    if not body:
        return []
    return source.lines[body[0].lineno - 1 : function.end_lineno]


@functools.cache
def comment_lines(source: Source) -> set[int]:
    """The numbers of the lines that hold nothing but a comment."""
    return {
        token.start[0]
        for token in source.tokens
        if token.type == tokenize.COMMENT and is_alone(token)
    }


def has_break(source: Source, function: Function) -> bool:
    """Whether a body has a blank line or a line of comment."""
    lines = body_lines(source, function)
    last = function.end_lineno or 0
    numbers = range(last - len(lines) + 1, last + 1)
    return not all(line.strip() for line in lines) or bool(comment_lines(source) & set(numbers))


def names_in(node: ast.AST) -> set[str]:
    """The names that a piece of code speaks of."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def is_tuple_assignment(node: ast.stmt) -> bool:
    """Whether several values get several names at once, as in `a, b = 1, f(x)`."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    )


def is_packed_assignment(node: ast.stmt) -> bool:
    """Whether a tuple assignment could be several lines.

    `a, b = b, a` could not, because one value needs what another name held before."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False

    pairs = [
        (target, value)
        for targets in node.targets
        if isinstance(targets, ast.Tuple)
        for target, value in zip(targets.elts, node.value.elts, strict=False)
    ]
    return bool(pairs) and not any(
        names_in(target) & names_in(value)
        for target, _ in pairs
        for other, value in pairs
        if other is not target
    )


def is_named_lambda(node: ast.stmt) -> bool:
    """Whether a lambda is given a name, alone or among others."""
    if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
        return False
    values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
    return any(isinstance(value, ast.Lambda) for value in values)


# ---- rooms ----


def package_name(folder: Path) -> str:
    """The name under which Python imports a folder: `a.b` for the folder b of a package a."""
    if (folder.parent / "__init__.py").exists():
        return f"{package_name(folder.parent)}.{folder.name}"
    return folder.name


def imported_modules(source: Source, package: str) -> set[str]:
    """Full names of all that a file imports; `from a import b` gives a.b."""
    folder = [*package.split("."), *source.path.parent.parts]
    names = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def room_of(source: Source) -> str:
    """The room in which a file lies: its first folder, or its own name."""
    return source.path.parts[0].removesuffix(".py")


def find_rooms(sources: list[Source]) -> set[str]:
    """All rooms of a package; the package's own __init__ and __main__ are none."""
    return {room_of(source) for source in sources} - {"__init__", "__main__"}


def find_arrows(sources: list[Source], package: str) -> set[tuple[str, str]]:
    """All pairs (room, imported room)."""
    rooms = find_rooms(sources)
    found = set()
    for source in sources:
        for name in imported_modules(source, package):
            if name.startswith(f"{package}."):
                there = name.removeprefix(f"{package}.").split(".")[0]
                found.add((room_of(source), there))
    return {(here, there) for here, there in found if here != there and {here, there} <= rooms}
