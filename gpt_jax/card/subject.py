"""Who is checked: a row, its tiny config on a text made here, and where both lie."""

import json
import random
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gpt_jax import config as configs, plan, run, sharding, train
from gpt_jax.card.finding import CannotCheckError
from gpt_jax.card.shrink import LENGTH, keep_model, shrink
from gpt_jax.data import Dataset, Tokenizer, load_dataset, make_stream, resolve_tokenizer
from gpt_jax.errors import UsageError
from gpt_jax.model import abstract_params, count_params

DOCUMENTS = 64
WORDS = (8, 40)  # Of a document, at least and at most.
LEXICON = 60
MOST_PARAMETERS = 4_000_000  # A checkpoint of more is checked on its shrunk shape.


class Subject(NamedTuple):
    """A row that is checked.

    `row` is resolved as far as it says itself, and `parts.config` is what the checks run, on one
    device. Runs lie in `folder`, and the first of them in `workdir`.
    """

    name: str
    row: configs.Config
    parts: Any  # run.Parts
    folder: Path
    has_weights: bool  # Whether the checks start from the weights of a checkpoint.
    say: Callable[[str], None]

    @property
    def config(self) -> configs.Config:
        return self.parts.config

    @property
    def workdir(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.workdir / train.CHECKPOINT_FOLDER


def open_subject(
    name: str,
    row: configs.Config,
    folder: Path,
    say: Callable[[str], None],
    source: str = "",
) -> Subject:
    """The subject of a config, or of the checkpoint at `source` whose config it is.

    A checkpoint of at most MOST_PARAMETERS keeps its shape and its weights. Raises UsageError for a
    config that cannot be run at all.
    """
    row = resolve_row(row)
    has_weights = bool(source) and count_params(row.model)["total"] <= MOST_PARAMETERS
    small = keep_model(row, source) if has_weights else shrink(row)
    tokenizer = run.read_start_tokenizer(small)
    small = replace(small, data=write_texts(small.data, folder, tokenizer))
    data: Dataset = load_dataset(small.data, say, tokenizer)

    config = configs.resolve(small, data.tokenizer.vocab)
    configs.check(config, 1, data.tokenizer.vocab)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    return Subject(name, row, run.build_on(small, mesh, data, say), folder, has_weights, say)


def resolve_row(row: configs.Config) -> configs.Config:
    """The resolved row. Its vocabulary is 0 if only its text can tell the size."""
    try:
        return plan.resolve_vocab(row)
    except UsageError:
        return configs.resolve(row)


def write_texts(
    data: configs.Data, folder: Path, tokenizer: Tokenizer | None = None
) -> configs.Data:
    """Writes a text, or one for each source, and returns the section that names them."""
    letters = find_letters(tokenizer or resolve_tokenizer("bytes"))
    data = replace(data, cache=str(folder / "cache"))
    if not data.sources:
        return replace(data, path=(write_text(folder / "text.jsonl", letters, 0),))

    sources = tuple(
        (name, write_text(folder / f"text{number}.jsonl", letters, number), weight)
        for number, (name, _, weight) in enumerate(data.sources)
    )
    return replace(data, sources=sources)


def find_letters(tokenizer: Any) -> str:
    """The letters that the tokenizer can encode. Raises UsageError if it can encode none."""

    def can_encode(letter: str) -> bool:
        try:
            return len(tokenizer.encode(letter)) > 0
        except UsageError:
            return False

    letters = "".join(filter(can_encode, string.ascii_letters))
    if not letters:
        raise UsageError(
            f"the tokenizer {tokenizer.name} encodes no letter of English, so a card has no text "
            "for it; give the config with --config"
        )
    return letters


def write_text(path: Path, letters: str, seed: int) -> str:
    """Writes documents of words from a small lexicon, so that a tiny model learns something."""
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices(letters, k=draw.randint(2, 7))) for _ in range(LEXICON)]
    documents = [draw.choices(lexicon, k=draw.randint(*WORDS)) for _ in range(DOCUMENTS)]
    lines = [json.dumps({"text": " ".join(words)}) + "\n" for words in documents]
    path.write_text("".join(lines))
    return str(path)


def take_batch(subject: Subject) -> dict[str, Any]:
    """The columns [B, T] of the first update, in numpy."""
    size = subject.config.train.batch_size
    stream = make_stream(subject.parts.examples, size, slice(0, size))
    columns = next(stream)
    stream.close()
    return columns


def find_step(subject: Subject) -> int:
    """The last step of the subject's run. Raises CannotCheckError if it has none."""
    steps = train.steps_in(subject.checkpoints)
    if not steps:
        raise CannotCheckError("it has no trained weights, because it does not train")
    return max(steps)


def load_weights(subject: Subject) -> Any:
    """The parameters that the subject's run ended with, on one device."""
    step = find_step(subject)
    mesh = subject.parts.mesh
    with jax.set_mesh(mesh):
        like = sharding.make_concrete(abstract_params(subject.config.model), mesh)
        return train.restore_checkpoint(subject.checkpoints, step, {"params": like})["params"]


def take_ids(subject: Subject, count: int) -> Any:
    """Ids [count, T] of the first rows of the text."""
    return take_batch(subject)["tokens"][:count, :LENGTH]
