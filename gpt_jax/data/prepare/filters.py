"""What a document must be, and what is made of it: a table of small pure functions (called by
prepare).

A filter is typed `name:argument`, or `module:function` for one of the user's own. It takes a text
and gives the text it made of it, or None for a document that is left out. Duplicates need a
decision over all documents: their pure parts come last.
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

from gpt_jax.errors import UsageError
from gpt_jax.files import digest_file, digest_json

Apply = Callable[[str], str | None]
LANGUAGE_CHARACTERS = 2000  # of a document, by which its language is judged: py3langid reads 4 MB/s
CONTROLS = dict.fromkeys(
    [*range(9), 11, 12, *range(14, 32), 127]
)  # all but tab, line feed and carriage return


class Filter(NamedTuple):
    usage: str
    make: Callable[
        ..., Apply
    ]  # of the arguments as typed; ValueError or TypeError for those of no use


# ---- measures, and filters that bound them ----


def _utf8_bytes(text: str) -> int:
    return len(text.encode())


def _letters(text: str) -> float:
    return sum(map(str.isalpha, text)) / len(text)


def _repeated(text: str) -> float:
    """Part of the characters that stand in lines seen before (Rae et al. 2021, Gopher, appendix
    A)."""
    lines = [line for line in text.split("\n") if line.strip()]
    return 1 - sum(map(len, set(lines))) / max(sum(map(len, lines)), 1)


def _limit(text: str, kind=int, most: float = 2**63):
    if not 0 <= kind(text) <= most:
        raise ValueError(f"{text} is not from 0 to {most}")
    return kind(text)


_part = functools.partial(_limit, kind=float, most=1)


def _bound(
    measure: Callable[[str], float],
    holds: Callable[[float, float], bool],
    number: Callable[[str], float],
):
    """The maker of a filter that keeps a text whose `measure` holds against the limit typed."""

    def make(limit: str) -> Apply:
        limit = number(limit)
        return lambda text: text if holds(measure(text), limit) else None

    return make


# ---- language ----


@functools.lru_cache
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UsageError(
            "--filters=language: needs the package py3langid; pip install 'gpt_jax[filters]'"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _language(names: str, probability: str = "0") -> Apply:
    """py3langid's best guess is one of `names` (joined by , or +), and its probability at least
    so much."""
    wanted, least, identifier = set(re.split("[,+]", names)), _part(probability), _identifier()
    if unknown := wanted - set(identifier.labels):
        raise ValueError(
            f"{' '.join(sorted(unknown))} unknown; known are {' '.join(sorted(identifier.labels))}"
        )

    def apply(text: str) -> str | None:
        guess, likely = identifier.classify(text[:LANGUAGE_CHARACTERS])
        return text if guess in wanted and likely >= least else None

    return apply


# ---- transforms ----


def _normalize(form: str) -> Apply:
    unicodedata.normalize(
        form, "\u00e9"
    )  # ValueError for a form that does not exist, though not on an empty text
    return functools.partial(unicodedata.normalize, form)


def _replace(pattern: str, new: str = "") -> Apply:
    try:
        compiled = re.compile(pattern)
        compiled.sub(new, "")
    except (re.error, IndexError) as error:
        raise ValueError(f"not a regular expression and its replacement: {error}") from None
    return lambda text: compiled.sub(new, text)


def _plain(function: Apply) -> Callable[[], Apply]:
    return lambda: function


FILTERS = {
    "min_chars": Filter("min_chars:N", _bound(len, operator.ge, _limit)),
    "max_chars": Filter("max_chars:N", _bound(len, operator.le, _limit)),
    "min_bytes": Filter("min_bytes:N", _bound(_utf8_bytes, operator.ge, _limit)),
    "max_bytes": Filter("max_bytes:N", _bound(_utf8_bytes, operator.le, _limit)),
    "min_letters": Filter("min_letters:PART", _bound(_letters, operator.ge, _part)),
    "max_repeated": Filter("max_repeated:PART", _bound(_repeated, operator.le, _part)),
    "language": Filter("language:zh,en[:PROBABILITY]", _language),
    "normalize": Filter("normalize:NFC|NFKC|NFD|NFKD", _normalize),
    "strip": Filter("strip", _plain(str.strip)),
    "newlines": Filter(
        "newlines", _plain(lambda text: text.replace("\r\n", "\n").replace("\r", "\n"))
    ),
    "controls": Filter("controls", _plain(lambda text: text.translate(CONTROLS))),
    "blank_lines": Filter("blank_lines", _plain(lambda text: re.sub(r"\n{3,}", "\n\n", text))),
    "replace": Filter("replace:REGEX[:NEW]", _replace),
}
KNOWN = f"{' '.join(row.usage for row in FILTERS.values())}, or your own module:function"


# ---- chains ----


def _import(spec: str) -> Callable:
    """The function of `module:function`."""
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


def code(specs: Iterable[str]) -> dict[str, str]:
    """{spec: digest} of the user's own filters, as their source files are now: of the module
    named, and of the one that the function was written in. What these import in turn is not
    looked at."""
    found = {}
    for spec in specs:
        if spec.partition(":")[0] not in FILTERS:
            function = inspect.unwrap(_import(spec))
            written = getattr(function, "__code__", None)
            files = {
                getattr(sys.modules[spec.partition(":")[0]], "__file__", None),
                written and written.co_filename,
            }
            found[spec] = digest_json([_sha256(file) for file in sorted(filter(None, files))])
    return found


def _sha256(file: str) -> str:
    try:
        return digest_file(Path(file)).sha256
    except OSError:  # a module in a zip archive or in memory
        return ""


def _own(spec: str) -> Apply:
    """The user's `module:function`, its mistakes turned into one line."""
    function = _import(spec)

    def apply(text: str) -> str | None:
        try:
            made = function(text)
        except Exception as error:
            raise UsageError(
                f"--filters={spec!r}: raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(made, str | None):
            raise UsageError(
                f"--filters={spec!r}: gave {type(made).__name__}, expected text or None"
            )
        return made

    return apply


def _make(spec: str) -> Apply:
    name, *arguments = spec.split(":", 2)
    if name not in FILTERS:
        return _own(spec)
    try:
        return FILTERS[name].make(*arguments)
    except (ValueError, TypeError) as error:
        reason = "" if isinstance(error, TypeError) else f" ({error})"
        raise UsageError(f"--filters={spec!r}: expected {FILTERS[name].usage}{reason}") from None


class Chain:
    """Filters one after the other; pickled as what was typed, and made again in the process that
    gets it."""

    def __init__(self, specs: tuple[str, ...]):
        self.specs = tuple(specs)
        self.steps = [(spec, _make(spec)) for spec in self.specs]

    def __call__(self, text: str) -> tuple[str | None, str]:
        """(text, "") or (None, the filter that left it out as typed). A text that became empty
        is left out."""
        for spec, apply in self.steps:
            text = apply(text)
            if not text:
                return None, spec
        return text, ""

    def __reduce__(self):
        return Chain, (self.specs,)


def parse(specs: tuple[str, ...]) -> Chain:
    """The chain of filters typed. UsageError for an unknown one (listing the table) and for
    arguments of no use."""
    return Chain(specs)
