"""Conversations in the shapes that published sets have.

The columns of a row tell its shape, which is a row of SHAPES. Each shape becomes the same turns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from gpt_jax.data.tasks.columns import get


class Turn(NamedTuple):
    """Who speaks, and what is said."""

    role: str
    content: str


SYSTEM = "system"
USER = "user"
ASSISTANT = "assistant"
# What data sets call the roles.
ROLES = {
    "system": SYSTEM,
    "user": USER,
    "human": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
}
# Roles of calls and their results. They have no form yet.
RESERVED = ("tool", "function", "observation", "function_call")


def find_role(name: str, where: str) -> str:
    """The role of a name. Raises ValueError for a reserved or unknown one."""
    if name in RESERVED:
        raise ValueError(
            f"{where} has the role {name!r}, which is reserved for tools and cannot be learned "
            "yet; leave such rows out"
        )
    if name not in ROLES:
        raise ValueError(f"{where} has the unknown role {name!r}; known are {', '.join(ROLES)}")
    return ROLES[name]


def _read_list(row: dict, column: str) -> list[Turn]:
    """Turns of a list of objects, in the keys of OpenAI or of ShareGPT."""
    turns = []
    for i, entry in enumerate(get(row, column, list, f"the field {column!r} of --task=chat")):
        where = f"{column}[{i}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is {type(entry).__name__}, expected an object")
        role, content = ("from", "value") if "from" in entry else ("role", "content")
        name = find_role(get(entry, role, str, f"{where}.{role}"), where)
        turns.append(Turn(name, get(entry, content, str, f"{where}.{content}")))
    has_system = bool(turns) and turns[0].role == SYSTEM
    return turns if has_system else [*_read_system(row), *turns]


def _read_system(row: dict) -> list[Turn]:
    """The system prompt that stands beside the turns, if there is one."""
    text = row.get("system") or ""
    if not isinstance(text, str):
        raise ValueError(f"system holds {type(text).__name__}, expected text")
    return [Turn(SYSTEM, text)] if text else []


def _read_messages(row: dict) -> list[Turn]:
    return _read_list(row, "messages")


def _read_conversations(row: dict) -> list[Turn]:
    return _read_list(row, "conversations")


def _read_instruction(row: dict) -> list[Turn]:
    """Alpaca: an instruction, perhaps with an input and with earlier turns."""
    instruction = get(row, "instruction", str, "instruction")
    addition = get({"input": ""} | row, "input", str, "input")
    turns = _read_system(row)
    for i, pair in enumerate(row.get("history") or ()):
        if not is_pair_of_texts(pair):
            raise ValueError(f"history[{i}]: expected a list of two texts")
        turns += [Turn(USER, pair[0]), Turn(ASSISTANT, pair[1])]
    asked = "\n".join(text for text in (instruction, addition) if text)
    return [*turns, Turn(USER, asked), Turn(ASSISTANT, get(row, "output", str, "output"))]


def is_pair_of_texts(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)


def _read_turns(row: dict) -> list[Turn]:
    """Texts alone, of two who speak in turns. The second one is the assistant."""
    turns = []
    for i, text in enumerate(get(row, "turns", list, "turns")):
        if not isinstance(text, str):
            raise ValueError(f"turns[{i}] is {type(text).__name__}, expected text")
        turns.append(Turn((USER, ASSISTANT)[i % 2], text))
    return turns


SHAPES: tuple[tuple[tuple[str, ...], Callable[[dict], list[Turn]]], ...] = (
    (("messages",), _read_messages),
    (("conversations",), _read_conversations),
    (("instruction", "output"), _read_instruction),
    (("turns",), _read_turns),
)


def read_turns(row: dict[str, Any]) -> list[Turn]:
    """The turns of a row: perhaps a system prompt, and then user and assistant alternate.

    Raises ValueError for another order, for an empty turn, and if the assistant says nothing.
    """
    read = next((read for names, read in SHAPES if all(name in row for name in names)), None)
    if read is None:
        known = " or ".join("+".join(names) for names, _ in SHAPES)
        raise ValueError(
            f"holds no conversation of --task=chat ({known}); fields there: "
            f"{', '.join(row) or 'none'}"
        )
    turns = read(row)
    spoken = turns[1:] if turns[:1] and turns[0].role == SYSTEM else turns
    first = len(turns) - len(spoken)
    for i, turn in enumerate(spoken):
        wanted = (USER, ASSISTANT)[i % 2]
        if turn.role != wanted:
            raise ValueError(
                f"turn {first + i + 1} is of {turn.role}, expected {wanted}: after a system prompt "
                "user and assistant alternate"
            )
    empty = [i for i, turn in enumerate(turns, 1) if not turn.content.strip()]
    if empty:
        raise ValueError(f"turn {empty[0]}, of {turns[empty[0] - 1].role}, is empty")
    if len(spoken) < 2:
        raise ValueError("has no turn of the assistant, so there is nothing to learn")
    return turns
