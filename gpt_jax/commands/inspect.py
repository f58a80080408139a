"""`gpt-jax inspect`: which documents a step of a run learns from."""

import json
import sys
from pathlib import Path

import numpy as np

from gpt_jax import config as configs
from gpt_jax.commands.config_file import local_workdir
from gpt_jax.commands.flags import Flags
from gpt_jax.commands.output import emit
from gpt_jax.errors import UsageError, complain

LAST = 10**12  # step; numbers of examples are 64-bit


def main(arguments: list[str]) -> None:
    """Raises UsageError for a workdir, a step or a text that is not there; DataError for damaged
    shards."""
    flags = Flags(
        prog="gpt-jax inspect",
        description="Every row of a step of a run: source, documents, where in them "
        "the row begins, and its text, made again from the config and the seed alone.",
    )
    flags.add_argument("--workdir", required=True, help="of a run that has begun")
    flags.add_argument("--batch", type=int, required=True, metavar="N", help="the step, from 1")
    flags.add_argument("--rows", type=int, default=0, help="only the first of them; 0: all")
    flags.add_argument(
        "--chars", type=int, default=200, help="of each document's text that are shown; 0: all"
    )
    flags.add_argument(
        "--json",
        action="store_true",
        help="a JSON object a row, with the ids, instead of text for people",
    )
    args = flags.parse_args(arguments)
    if not 1 <= args.batch <= LAST or args.rows < 0 or args.chars < 0:
        raise UsageError(f"--batch: expected 1 to {LAST}; --rows and --chars: 0 or more")
    workdir = local_workdir(args.workdir)
    config = read_config(workdir)
    if args.batch > config.train.steps:
        complain(
            f"step {args.batch:,} is beyond the run's last, {config.train.steps:,}: what it would "
            "get if it went on"
        )
    import jax

    jax.config.update(
        "jax_platforms", "cpu"
    )  # nothing here needs an accelerator, and the run may be using it
    rows = step_rows(config, workdir, args.batch, args.rows)
    try:
        for row in rows:
            emit(
                json.dumps(row, ensure_ascii=False)
                if args.json
                else "\n".join(describe(row, args.chars))
            )
    except UnicodeEncodeError as error:
        raise UsageError(
            f"standard output cannot hold this text ({error.encoding}); set PYTHONIOENCODING=utf-8"
        ) from None


def read_config(workdir: Path) -> configs.Config:
    """The resolved config that a run has left in its workdir."""
    path = workdir / "config.json"
    try:
        return configs.from_dict(configs.translate(json.loads(path.read_text())))
    except OSError as error:
        raise UsageError(
            f"--workdir={workdir}: no run has begun there ({path.name}: {error.strerror})"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"{path}: is no config ({error}); start the run again, and it is written anew"
        ) from None


def step_rows(config: configs.Config, workdir: Path, step: int, limit: int):
    """Rows of step `step`, each a dict of plain values."""
    from gpt_jax.data import load_dataset, make_columns, make_examples

    data = load_dataset(config.data, lambda line: print(line, file=sys.stderr))
    check_text(workdir, data)
    examples = make_examples(data, config.data, config.train.seq_len, config.seed)
    size = config.train.batch_size
    for number in range((step - 1) * size, (step - 1) * size + min(limit or size, size)):
        source, spans = examples.spans(number)
        tokens = data.parts[source].train
        buffer = examples.fill(np.array([number]))
        batch = make_columns(buffer, data.tokenizer.token_bytes, config.data.document_mask)
        documents = [
            {
                "document": span.document,
                "name": tokens.document_name(span.document),
                "offset": span.offset,
                "tokens": span.size,
                "text": data.tokenizer.decode(tokens.ids(start, start + span.size)),
            }
            for span in spans
            for start in (int(tokens.offsets[span.document]) + span.offset,)
        ]
        yield {
            "row": number % size,
            "example": number,
            "source": data.parts[source].name,
            "documents": documents,
            "predicted": int(batch["weight"].sum()),
            "ids": buffer.ids[0][buffer.inside[0]].tolist(),
            "changed": bool(config.data.fim or config.data.shuffle_documents),
            "text": with_specials(data.tokenizer, buffer.ids[0][buffer.inside[0]]),
        }


def with_specials(tokenizer, ids) -> str:
    """The text of `ids` with the names of special tokens where they stand, which decoding leaves
    out."""
    names = {i: name.encode() for name, i in tokenizer.specials.items()}
    raw = b"".join(names.get(i) or tokenizer.decode_bytes([i]) for i in map(int, ids))
    return raw.removeprefix(tokenizer.prefix).decode("utf-8", "replace")


def check_text(workdir: Path, data) -> None:
    """UsageError when text or tokenizer are no longer those that the run's newest checkpoint
    knows."""
    from gpt_jax.train import CHECKPOINT_FOLDER, read_meta, resolve_checkpoint

    if not (workdir / CHECKPOINT_FOLDER).is_dir():
        return
    directory, step = resolve_checkpoint(str(workdir), 0, lambda line: None)
    meta = read_meta(directory, step)
    if (meta["data"]["content"], meta["tokenizer"]) != (data.content, data.tokenizer.to_json()):
        raise UsageError(
            f"--workdir={workdir}: the text or its tokenizer has changed since the run, so its "
            "batches "
            "cannot be made again; bring the old ones back"
        )


def shorten(text: str, chars: int) -> str:
    return text if not chars or len(text) <= chars else f"{text[:chars]}…"


def describe(row: dict, chars: int) -> list[str]:
    """Lines for people about one row."""
    lines = [
        f"row {row['row']}: example {row['example']:,}, source {row['source']}, "
        f"{len(row['ids']):,} tokens, "
        f"{row['predicted']:,} predicted"
    ]
    if row["changed"]:  # by fim or shuffle_documents: the documents below are those before it
        lines.append(f"  as trained on: {shorten(row['text'], chars)!r}")
    for document in row["documents"]:
        lines += [
            f"  document {document['document']:,} ({document['name']}) from token "
            f"{document['offset']:,}, "
            f"{document['tokens']:,} tokens",
            f"    {shorten(document['text'], chars)!r}",
        ]
    return lines
