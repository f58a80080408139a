"""What a document must be, and what is changed in it: a table of small pure functions.

A filter is typed `name:argument`, or `module:function` for one of the user's own. It takes a text,
and gives the text that it made of it, or None for a document that is left out. All behind the first
colon is one argument, so an argument may hold colons.
"""

import functools
import importlib
import inspect
import operator
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from gpt_jax.errors import UsageError, install_command
from gpt_jax.files import digest_file, digest_json

Apply = Callable[[str], str | None]

LANGUAGE_CHARACTERS = 2000  # of a document, by which its language is judged: py3langid reads 4 MB/s
# All control characters but tab, line feed and carriage return.
CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 127])
# What may stand around the two parts of `replace`, see `_make_replace`.
MARKS = "/|#,;!%@~&="


class Filter(NamedTuple):
    """A row of FILTERS."""

    usage: str
    # Makes the filter from the argument as typed. Raises ValueError or TypeError for one that means
    # nothing.
    make: Callable[..., Apply]


# ---- measures, and filters that bound them ----


def _count_bytes(text: str) -> int:
    return len(text.encode())


def _share_of_letters(text: str) -> float:
    return sum(map(str.isalpha, text)) / len(text)


def _share_repeated(text: str) -> float:
    """The part of the characters that stand in lines seen before.

    It is a measure of Gopher (Rae et al. 2021, appendix A).
    """
    lines = [line for line in text.split("\n") if line.strip()]
    return 1 - sum(map(len, set(lines))) / max(sum(map(len, lines)), 1)


def _read_count(text: str) -> int:
    count = int(text)
    if not 0 <= count <= 2**63:
        raise ValueError(f"{text} is not from 0 to {2**63}")
    return count


def _read_share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise ValueError(f"{text} is not from 0 to 1")
    return share


def _bound(
    measure: Callable[[str], float],
    holds: Callable[[float, float], bool],
    read_limit: Callable[[str], float],
) -> Callable[[str], Apply]:
    """The maker of a filter that keeps a text if `holds(measure(text), limit)`."""

    def make(typed: str) -> Apply:
        limit = read_limit(typed)
        return lambda text: text if holds(measure(text), limit) else None

    return make


# ---- language ----


@functools.lru_cache
def _load_identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UsageError(
            f"--filters=language: needs the package py3langid; {install_command('py3langid')}"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _make_language(typed: str) -> Apply:
    """Keeps a text if py3langid's best guess is one of the names typed.

    Names are joined by , or +. The least probability of the guess may follow after a colon.
    """
    names, colon, probability = typed.partition(":")
    wanted = set(re.split("[,+]", names))
    least = _read_share(probability) if colon else 0.0
    identifier = _load_identifier()
    if unknown := wanted - set(identifier.labels):
        known = " ".join(sorted(identifier.labels))
        raise ValueError(f"{' '.join(sorted(unknown))} unknown; known are {known}")

    def apply(text: str) -> str | None:
        guess, likely = identifier.classify(text[:LANGUAGE_CHARACTERS])
        return text if guess in wanted and likely >= least else None

    return apply


# ---- transforms ----


def _make_normalize(form: str) -> Apply:
    if form not in ("NFC", "NFKC", "NFD", "NFKD"):
        raise ValueError("invalid normalization form")
    return functools.partial(unicodedata.normalize, form)


def _make_replace(typed: str) -> Apply:
    """Replaces what a regular expression matches, typed as /REGEX/NEW/ with any of MARKS for /.

    A colon between the two would be ambiguous, because both may hold one. The mark is chosen so
    that neither does.
    """
    mark = typed[:1]
    if not mark or mark not in MARKS or typed.count(mark) != 3 or typed[-1] != mark:
        raise ValueError(
            f"one mark of {MARKS} stands in front of REGEX, behind it and behind NEW, and nowhere "
            "in them; NEW may be empty, as in replace:|https?://[^ ]+||"
        )
    _, pattern, new, _ = typed.split(mark)
    try:
        compiled = re.compile(pattern)
        compiled.sub(new, "")
    except (re.error, IndexError) as error:
        raise ValueError(f"not a regular expression and its replacement: {error}") from None
    return lambda text: compiled.sub(new, text)


def _unify_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _remove_controls(text: str) -> str:
    return text.translate(CONTROLS)


def _join_blank_lines(text: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", text)


def _take_none(function: Apply) -> Callable[[], Apply]:
    """The maker of a filter that takes no argument."""
    return lambda: function


FILTERS = {
    "min_chars": Filter("min_chars:N", _bound(len, operator.ge, _read_count)),
    "max_chars": Filter("max_chars:N", _bound(len, operator.le, _read_count)),
    "min_bytes": Filter("min_bytes:N", _bound(_count_bytes, operator.ge, _read_count)),
    "max_bytes": Filter("max_bytes:N", _bound(_count_bytes, operator.le, _read_count)),
    "min_letters": Filter("min_letters:PART", _bound(_share_of_letters, operator.ge, _read_share)),
    "max_repeated": Filter("max_repeated:PART", _bound(_share_repeated, operator.le, _read_share)),
    "language": Filter("language:zh,en[:PROBABILITY]", _make_language),
    "normalize": Filter("normalize:NFC|NFKC|NFD|NFKD", _make_normalize),
    "strip": Filter("strip", _take_none(str.strip)),
    "newlines": Filter("newlines", _take_none(_unify_newlines)),
    "controls": Filter("controls", _take_none(_remove_controls)),
    "blank_lines": Filter("blank_lines", _take_none(_join_blank_lines)),
    "replace": Filter("replace:/REGEX/NEW/", _make_replace),
}
KNOWN = f"{' '.join(row.usage for row in FILTERS.values())}, or your own module:function"


# ---- the user's own ----


def _import(spec: str) -> Callable:
    """The function of `module:function`. Raises UsageError if there is none."""
    module, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise UsageError(f"--filters={spec!r}: no such filter; there are {KNOWN}")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a module does when it is imported
        raise UsageError(
            f"--filters={spec!r}: {type(error).__name__}: {error}; a module must be importable "
            f"(PYTHONPATH); filters are {KNOWN}"
        ) from None


def _is_own(spec: str) -> bool:
    return spec.partition(":")[0] not in FILTERS


def digest_code(specs: Iterable[str]) -> dict[str, str]:
    """{spec: digest} of the user's own filters, as their source files are now.

    The files are that of the module named, and that which the function was written in. What these
    import in turn is not looked at.
    """
    digests = {}
    for spec in specs:
        if not _is_own(spec):
            continue
        function = inspect.unwrap(_import(spec))
        module = sys.modules[spec.partition(":")[0]]
        written = getattr(function, "__code__", None)
        files = {getattr(module, "__file__", None), written and written.co_filename}
        digests[spec] = digest_json([_digest(file) for file in sorted(filter(None, files))])
    return digests


def _digest(file: str) -> str:
    try:
        return digest_file(Path(file)).sha256
    except OSError:  # a module in a zip archive or in memory
        return ""


def _make_own(spec: str) -> Apply:
    """The user's `module:function`, with its mistakes turned into one line."""
    function = _import(spec)

    def apply(text: str) -> str | None:
        try:
            result = function(text)
        except Exception as error:
            raise UsageError(
                f"--filters={spec!r}: raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(result, str | None):
            raise UsageError(
                f"--filters={spec!r}: gave {type(result).__name__}, expected text or None"
            )
        return result

    return apply


# ---- chains ----


def _make(spec: str) -> Apply:
    if _is_own(spec):
        return _make_own(spec)
    name, colon, argument = spec.partition(":")
    row = FILTERS[name]
    try:
        return row.make(argument) if colon else row.make()
    except TypeError:  # an argument too many or too few
        raise UsageError(f"--filters={spec!r}: expected {row.usage}") from None
    except ValueError as error:
        raise UsageError(f"--filters={spec!r}: expected {row.usage} ({error})") from None


class Chain:
    """Filters one after the other.

    A chain is pickled as it was typed, and made again in the process that gets it.
    """

    def __init__(self, specs: tuple[str, ...]):
        self.specs = tuple(specs)
        self.steps = [(spec, _make(spec)) for spec in self.specs]

    def __call__(self, text: str) -> tuple[str | None, str]:
        """(text, "") or (None, the filter that left it out, as typed).

        A text that became empty is left out.
        """
        for spec, apply in self.steps:
            changed = apply(text)
            if not changed:
                return None, spec
            text = changed
        return text, ""

    def __reduce__(self):
        return Chain, (self.specs,)


def parse_filters(specs: tuple[str, ...]) -> Chain:
    """The chain of filters typed.

    Raises UsageError for an unknown filter, listing the table, and for arguments that mean nothing.
    """
    return Chain(specs)
