"""Questions whose answer the model writes, compared with a reference after normalisation."""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from gpt_jax.evals.question_kinds import Kind, Pair, Row
from gpt_jax.evals.results import Shown
from gpt_jax.evals.subject import Subject
from gpt_jax.evals.until import generate_until
from gpt_jax.infer import encode_text

NEW_TOKENS = 32  # of a row that does not say
STOP = ("\n",)
TOGETHER = 64  # questions between two ticks

# A number keeps its sign and its point, so that 3.5 is not 35. Other signs are left out.
WORDS = re.compile(r"(?<!\w)-?\d+(?:\.\d+)?|\w+")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
ARTICLES = {"a", "an", "the"}


def normalize(text: str) -> str:
    """The words and numbers of a text in small letters, without English articles.

    A text that has none of them stays, without the white space around it.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = WORDS.findall(THOUSANDS.sub("", plain))
    return " ".join(word for word in words if word not in ARTICLES) or plain.strip()


def list_references(row: Row) -> list[str]:
    reference = row["reference"]
    return [reference] if isinstance(reference, str) else reference


def make_settings(row: Row) -> dict[str, Any]:
    """How an answer is written, in the words of `read_sampling`."""
    return {
        "until": list(row.get("stop", STOP)),
        "max_gen_toks": row.get("max_new_tokens", NEW_TOKENS),
        "do_sample": False,
    }


def _is_list_of_texts(value: Any) -> bool:
    is_list = isinstance(value, list) and value
    return bool(is_list and all(isinstance(text, str) and text for text in value))


def _check(row: Row) -> str:
    if not isinstance(row["context"], str):
        return "context: expected a text"
    references = row["reference"]
    if not isinstance(references, str):
        if not _is_list_of_texts(references):
            return "reference: expected a text, or a list of texts, none of them empty"
    elif not references.strip():
        return "reference: expected a text, not empty"
    if "stop" in row and not _is_list_of_texts(row["stop"]):
        return "stop: expected a list of texts, none of them empty"
    limit = row.get("max_new_tokens", NEW_TOKENS)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        return f"max_new_tokens = {limit!r}: expected a whole number from 1"
    return ""


def _ask(row: Row) -> list[Pair]:
    """The texts of the question. They are encoded to see that they can be, and not scored."""
    return [(row["context"], reference) for reference in list_references(row)]


def _judge(row: Row, texts: Sequence[str]) -> list[bool]:
    return [normalize(texts[0]) in map(normalize, list_references(row))]


def _show(row: Row, texts: Sequence[str]) -> Shown:
    options = [texts[0], *list_references(row)]
    unknown = [math.nan] * len(options)
    return Shown(row["context"], options, 1, unknown, unknown, 0)


GENERATED = Kind(
    ("context", "reference"), _check, _ask, ("match",), _judge, _show, settings=make_settings
)


def write_answers(
    subject: Subject,
    rows: Sequence[Row],
    report: Callable[[str], None],
    tick: Callable[[], None],
) -> tuple[list[str], int]:
    """(the answer to each row, how many contexts lost their first tokens).

    The most likely token is taken each time, up to the first stop string. `tick` is called now and
    then. All processes of a job must call this together.
    """
    asked = [(row["context"], make_settings(row)) for row in rows]
    texts = []
    for start in range(0, len(asked), TOGETHER):
        tick()
        texts += generate_until(subject, asked[start : start + TOGETHER], report)

    cut = 0
    for context, settings in asked:
        room = subject.model.max_seq - settings["max_gen_toks"]
        cut += len(encode_text(subject.tokenizer, context)) > room
    return texts, cut
