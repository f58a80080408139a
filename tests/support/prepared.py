"""Input and calls of `gpt-jax prepare` for its tests."""

import json
import random
from pathlib import Path

import runs

from gpt_jax.data.tokens import corpus

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "the",
    "mat",
    "and",
    "我是猫",
    "looked",
    "at",
    "👍",
    "it",
    "all",
    "day",
    "long",
]


def texts(count: int, seed: int = 0) -> list[str]:
    """Different documents of 1 to 60 words."""
    draw = random.Random(seed)
    return [
        f"{seed}.{i} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for i in range(count)
    ]


def write_jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path


def prepare(output: Path, *given, workers: int = 1) -> Path:
    """Runs the command in this process."""
    runs.call("prepare", f"--output={output}", f"--workers={workers}", *given)
    return output


def refused(code: int, words: tuple[str, ...], *given) -> str:
    """Runs a command that must end with `code` and one line that holds all `words`."""
    ending, line = runs.refusal("prepare", "--workers=1", *given)
    assert ending == code, line
    assert line and "\n" not in line
    assert [word for word in words if word not in line] == [], line
    return line


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def flip(path: Path, place: int = 7) -> None:
    """Flips a bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[place] ^= 4
    path.write_bytes(raw)


def documents(folder: Path) -> dict[str, dict[str, list[str]]]:
    """{source: {side: texts}}, decoded from the tokens."""
    opened = corpus.open_corpus(folder)

    def decoded(tokens) -> list[str]:
        if tokens is None:
            return []
        return [
            opened.tokenizer.decode(tokens.ids(int(a), int(b)))
            for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)
        ]

    return {
        name: {side: decoded(tokens) for side, tokens in sides.items()}
        for name, sides in opened.sources.items()
    }
