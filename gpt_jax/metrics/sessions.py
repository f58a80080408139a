"""The sessions of a run: each start of the program, where it began and with what.

A session writes one row into metrics.jsonl before its first step. Its keys are `session/<fact>`.
Every row with `time/wall_seconds` holds the wall time of all sessions up to that row, and so does
the row of a session. Work that was lost before a resume counts, although its rows are dropped.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

WALL_SECONDS = "time/wall_seconds"
PREFIX = "session/"

Fact = str | float


class Session(NamedTuple):
    """One start of the program. `step` is the step that it started from."""

    step: int
    number: int  # from 1
    wall_before: float  # seconds of all sessions before it
    facts: dict[str, Any]  # such as began, command, host, code, learning_rate


class History(NamedTuple):
    """What a run has behind it when a session begins."""

    sessions: int = 0
    wall_seconds: float = 0.0


def read_history(rows: Sequence[Mapping]) -> History:
    """The history in the rows that earlier sessions have written, lost ones included."""
    if not rows:
        return History()
    numbers = [session.number for session in find_sessions(rows)]
    walls = [row[WALL_SECONDS] for row in rows if WALL_SECONDS in row]
    return History(max(numbers, default=1), max(walls, default=0.0))


def make_session_row(history: History, facts: Mapping[str, Fact]) -> dict[str, Fact]:
    """The first row of the session that follows `history`."""
    named = {f"{PREFIX}{name}": value for name, value in facts.items()}
    number = history.sessions + 1
    return {f"{PREFIX}number": number, WALL_SECONDS: history.wall_seconds} | named


def find_sessions(rows: Sequence[Mapping]) -> list[Session]:
    """The sessions in rows of metrics.jsonl, in their order."""
    sessions = []
    for row in rows:
        if f"{PREFIX}number" not in row:
            continue
        facts = {
            key.removeprefix(PREFIX): value for key, value in row.items() if key.startswith(PREFIX)
        }
        number = int(facts.pop("number"))
        sessions.append(Session(row["step"], number, row.get(WALL_SECONDS, 0.0), facts))
    return sessions


def session_seconds(rows: Sequence[Mapping]) -> list[float]:
    """The wall time of each session, as far as its rows tell."""
    moments = [session.wall_before for session in find_sessions(rows)]
    moments.append(read_history(rows).wall_seconds)
    return [end - begin for begin, end in pairwise(moments)]


def find_marks(rows: Sequence[Mapping]) -> list[tuple[int, str]]:
    """(step, label) of every resume, with a changed peak learning rate where it has one."""
    marks = []
    for before, session in pairwise(find_sessions(rows)):
        label = "resumed"
        rates = before.facts.get("learning_rate"), session.facts.get("learning_rate")
        if None not in rates and rates[0] != rates[1]:
            label = f"resumed, peak rate {rates[0]:g} → {rates[1]:g}"
        marks.append((session.step, label))
    return marks
