"""Questions of local files, in the forms that published sets have.

The columns of a file's first row tell its form, a row of FORMS. A form makes rows of a kind.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.errors import UsageError
from gpt_jax.evals.generated import GENERATED
from gpt_jax.evals.question_kinds import CHOICES, CONTEXTS, MATCH, Kind, Row
from gpt_jax.evals.text_files import read_text_file, strip_packing

LETTERS = "ABCD"


class Form(NamedTuple):
    """A shape of rows in a file.

    `convert(row)` makes a row of `kind`, or the words that say what is wrong.
    """

    columns: tuple[str, ...]
    kind: Kind
    convert: Callable[[Row], Row | str]


def _keep(row: Row) -> Row:
    # A separator is no column of a file.
    return {name: value for name, value in row.items() if name != "separator"}


def _convert_query(row: Row) -> Row | str:
    if not isinstance(row["query"], str):
        return "query: expected a text"
    kept = {name: row[name] for name in ("choices", "gold", "unconditional") if name in row}
    return {"context": row["query"], "separator": " "} | kept


def _convert_continuation(row: Row) -> Row | str:
    if not isinstance(row["continuation"], str):
        return "continuation: expected a text"
    return {"context": row["context"], "answer": row["continuation"], "separator": " "}


def _convert_contexts(row: Row) -> Row | str:
    return {name: row[name] for name in CONTEXTS.columns} | {"separator": " "}


def _convert_letters(row: Row) -> Row | str:
    """A question whose letters are scored, as lm-evaluation-harness puts those of CMMLU."""
    values = {name.strip().lower(): value for name, value in row.items() if name}
    texts = {name: values[name] for name in ("question", *LETTERS.lower(), "answer")}
    wrong = [name for name, value in texts.items() if not isinstance(value, str) or not value]
    if wrong:
        return f"{wrong[0]}: expected a text, not empty"
    answer = texts["answer"].strip().upper()
    if answer not in [*LETTERS]:
        return f"answer = {texts['answer']!r}: expected one of {', '.join(LETTERS)}"
    lines = [texts["question"].strip()]
    lines += [f"{letter}. {texts[letter.lower()].strip()}" for letter in LETTERS]
    context = "\n".join([*lines, "答案："])
    return {"context": context, "choices": [*LETTERS], "gold": LETTERS.index(answer)}


FORMS = (
    Form(("context", "choices", "gold"), CHOICES, _keep),
    Form(("context", "answer"), MATCH, _keep),
    Form(("context", "reference"), GENERATED, _keep),
    Form(("query", "choices", "gold"), CHOICES, _convert_query),
    Form(("context_options", "continuation", "gold"), CONTEXTS, _convert_contexts),
    Form(("context", "continuation"), MATCH, _convert_continuation),
    Form(("question", "a", "b", "c", "d", "answer"), CHOICES, _convert_letters),
)
KNOWN = " or ".join("{" + ", ".join(form.columns) + "}" for form in FORMS)


# ---- lines, by the ending of a file ----


def _read_json_lines(text: str, what: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of each line that is not empty. A line that is no JSON gives None."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError):  # the second for lists in lists without end
            yield f"line {number}", None


def _read_csv(text: str, what: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            more = row.pop(None, None)  # type: ignore[call-overload]
            if more:
                raise UsageError(
                    f"{what}, line {reader.line_num}: has more cells than the header; quote commas"
                )
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise UsageError(f"{what}, line {reader.line_num + 1}: {error}") from None


def _read_blocks(text: str, what: str) -> Iterator[tuple[str, Any]]:
    """HellaSwag as text: six lines a question, which are context, place, and four endings."""
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if len(lines) % 6:
        raise UsageError(
            f"{what}: has {len(lines)} lines; a text file has six a question: the context, the "
            "place of the right ending from 0, and four endings"
        )
    for start in range(0, len(lines), 6):
        context, gold, *endings = lines[start : start + 6]
        row = {"query": context, "gold": gold, "choices": endings}
        if gold.strip().isdecimal():
            row["gold"] = int(gold)
        yield f"line {start + 1}", row


READERS: dict[str, Callable[[str, str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".txt": _read_blocks,
}


# ---- files ----


def read_questions(path: str) -> tuple[Kind, list[Row]]:
    """The rows of a file, and the kind that the columns of its first row tell.

    The ending of the name says how it is read, see READERS; others hold JSON lines. Empty lines are
    left out. Raises UsageError, with the number of the line, for what cannot be read.
    """
    what = f"questions {path}"
    read = READERS.get(strip_packing(path).suffix.lower(), _read_json_lines)
    form = None
    rows = []
    for place, row in read(read_text_file(what, path), what):
        form = form or _find_form(row)
        made = _convert(row, form)
        wrong = made if isinstance(made, str) else form.kind.check(made) if form else ""
        if wrong:
            raise UsageError(f"{what}, {place}: {wrong}")
        rows.append(made)
    if not form:
        raise UsageError(f"{what}: has no rows; give a file of JSON lines")
    return form.kind, rows


def _lower(row: Row) -> set[str]:
    return {name.strip().lower() for name in row if isinstance(name, str)}


def _find_form(row: Any) -> Form | None:
    if not isinstance(row, dict):
        return None
    exact = [form for form in FORMS if row.keys() >= set(form.columns)]
    # The header of a table may begin with capitals.
    exact += [form for form in FORMS[-1:] if _lower(row) >= set(form.columns)]
    return exact[0] if exact else None


def _convert(row: Any, form: Form | None) -> Row | str:
    """A row of the form's kind, or what is wrong."""
    if not isinstance(row, dict):
        return f"is no JSON object; expected {KNOWN}"
    columns = ", ".join(name for name in row if isinstance(name, str))
    if form is None:
        return f"has the columns {columns}; expected {KNOWN}"
    have = row.keys() | (_lower(row) if form is FORMS[-1] else set())
    missing = [name for name in form.columns if name not in have]
    if missing:
        return (
            f"has no {missing[0]}; its columns are {columns}, and all rows of a file are of the "
            "form of its first"
        )
    return form.convert(row)


# ---- names ----


class Questions(NamedTuple):
    """What one argument names: a file, or the files of a folder by name."""

    name: str
    files: dict[str, str]  # {name: path}
    is_folder: bool


def find_questions(paths: Iterable[str]) -> list[Questions]:
    """The questions that each path names, files without folder and ending.

    A folder has those of its files, or of its folder `test`, whose endings READERS knows. Raises
    UsageError if a folder has none, or if two paths have one name, because their metrics would too.
    """
    groups: list[Questions] = []
    places: dict[str, str] = {}
    for path in paths:
        is_folder = Path(path).is_dir()
        name = Path(path).resolve().name if is_folder else strip_packing(path).stem
        if name in places:
            raise UsageError(
                f"questions {places[name]} and {path}: both would be named {name}; rename one"
            )
        places[name] = path
        files = _list_folder(path) if is_folder else {name: path}
        groups.append(Questions(name, files, is_folder))
    return groups


def check_set_names(sets: Iterable[tuple[str, str]], paths: Iterable[str]) -> None:
    """Raises UsageError if a set of config.eval.sets has the name of questions at `paths`.

    Readers of a curve could not tell them apart. Names of questions are those of files, of folders,
    and of the files in them.
    """
    groups = find_questions(paths)
    for i, (name, _) in enumerate(sets):
        for group in groups:
            if name == group.name or name in group.files:
                where = group.files.get(name, f"the folder {group.name}")
                raise UsageError(
                    f"config.eval.sets[{i}] = {name}: its name is that of {where} in "
                    "config.eval.questions; choose another"
                )


def _list_folder(path: str) -> dict[str, str]:
    """{subject: path} of a folder, in the order of their names."""
    for folder in (Path(path), Path(path, "test")):
        files: dict[str, str] = {}
        for file in sorted(folder.iterdir() if folder.is_dir() else ()):
            bare = strip_packing(file)
            if not file.is_file() or bare.suffix.lower() not in READERS:
                continue
            if bare.stem in files:
                raise UsageError(
                    f"questions {files[bare.stem]} and {file}: both would be named {bare.stem}; "
                    "rename one"
                )
            files[bare.stem] = str(file)
        if files:
            return files
    raise UsageError(
        f"questions {path}: has no file that ends in {', '.join(READERS)}, nor has its folder test"
    )
