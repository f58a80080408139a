"""`gpt-jax inspect`: what a step of a run learns from, and where the weights come from."""

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt_jax import config as configs
from gpt_jax.commands.config_file import find_workdir
from gpt_jax.commands.flags import Flags, check_number
from gpt_jax.commands.inspect_weights import add_weight_flags, inspect_weights
from gpt_jax.commands.output import emit, write_json
from gpt_jax.errors import UsageError, complain, escape
from gpt_jax.files import describe_error
from gpt_jax.schema import read_json

MOST_STEPS = 10**12  # Numbers of examples are 64-bit.


def main(arguments: list[str]) -> None:
    """Raises UsageError for a workdir, a step or a text that cannot be used.

    Raises DataError for damaged shards.
    """
    args = make_flags().parse_args(arguments)
    if bool(args.workdir) == bool(args.checkpoint):
        raise UsageError("--workdir=DIR or --checkpoint=DIR: say what to inspect")
    if args.checkpoint:
        inspect_weights(args)
        return
    for flag in ("diff", "verify", "step", "diff_step", "base"):
        if getattr(args, flag):
            raise UsageError(f"--{flag}: goes with --checkpoint, not with --workdir")
    if args.lineage:
        emit("\n".join(describe_lineage(find_workdir(args.workdir), args.mirror)))
        return
    if args.batch is None:
        raise UsageError("--batch=N or --lineage: say what to inspect")
    check_number("--batch", args.batch, 1, MOST_STEPS)
    check_number("--rows", args.rows, 0)
    check_number("--chars", args.chars, 0)
    workdir = find_workdir(args.workdir)
    config = read_config(workdir)
    if args.batch > config.train.steps:
        complain(
            f"step {args.batch:,} is beyond the run's last, {config.train.steps:,}: "
            "what it would get if it went on"
        )

    import jax

    # Nothing here needs an accelerator, and the run may be using it.
    jax.config.update("jax_platforms", "cpu")
    try:
        for row in step_rows(config, workdir, args.batch, args.rows, args.mirror):
            if args.json:
                emit(write_json(row))
            else:
                emit("\n".join(describe(row, args.chars)))
    except UnicodeEncodeError as error:
        raise UsageError(
            f"standard output cannot hold this text ({error.encoding}); set PYTHONIOENCODING=utf-8"
        ) from None


def make_flags() -> Flags:
    flags = Flags(
        prog="gpt-jax inspect",
        description="With --workdir: every row of a step of a run: its source, its documents, "
        "where in them the row begins, and its text. The rows are made again from the config and "
        "the seed alone. With --checkpoint: the weights.",
    )
    flags.add_argument("--workdir", help="the workdir of a run, or its URL")
    flags.add_argument("--batch", type=int, metavar="N", help="the step, from 1")
    flags.add_argument(
        "--lineage",
        action="store_true",
        help="show the runs whose weights this one started from, oldest first, and stop",
    )
    flags.add_argument("--rows", type=int, default=0, help="how many rows to show; 0 shows all")
    flags.add_argument(
        "--chars",
        type=int,
        default=200,
        help="how many characters of each document to show; 0 shows all",
    )
    flags.add_argument(
        "--json",
        action="store_true",
        help="a JSON object a row, with the ids, instead of text for people",
    )

    add_weight_flags(flags)
    return flags


def describe_lineage(workdir: Path | str, mirror: str) -> list[str]:
    """A line for each run that the weights went through, oldest first, and one for this run.

    It is read from the newest checkpoint. Raises UsageError if there is none.
    """
    from gpt_jax.run import count_tokens, describe_entry, peek_checkpoint

    meta, directory = peek_checkpoint(workdir, 0, mirror)
    config = configs.read_saved(meta["config"])
    tokens = count_tokens(meta, config, directory)
    own = {"from": str(workdir), "step": meta["step"], "tokens": tokens, "data": config.data.where}
    return [describe_entry(one) for one in [*meta.get("lineage", []), own]]


def read_config(workdir: Path | str) -> configs.Config:
    """The resolved config that a run has left in its workdir. Raises UsageError."""
    path = f"{workdir}/config.json"
    try:
        raw = read_file(workdir, "config.json")
    except OSError as error:
        raise UsageError(
            f"--workdir={workdir}: no run has begun there (config.json: {describe_error(error)})"
        ) from None
    try:
        return configs.read_saved(read_json(raw, "object"))
    except UsageError as error:
        first, *rest = error.args
        raise UsageError(
            f"{path}: {first}", *rest, f"{path}: start the run again, and it is written anew"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"{path}: is no config ({error}); start the run again, and it is written anew"
        ) from None


def read_file(workdir: Path | str, name: str) -> bytes:
    """A small file of a workdir. Raises OSError if it cannot be read, and UsageError of a store."""
    if isinstance(workdir, Path):
        return (workdir / name).read_bytes()
    from gpt_jax.run import read_remote_file

    raw = read_remote_file(workdir, name)
    if raw is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return raw


def step_rows(
    config: configs.Config, workdir: Path | str, step: int, limit: int, mirror: str
) -> Iterator[dict]:
    """The rows of a step, each a dict of plain values, and at most `limit` unless that is 0.

    Raises UsageError or DataError for a text that cannot be used.
    """
    from gpt_jax.data import load_dataset, make_examples

    def say(line: str) -> None:
        print(escape(line), file=sys.stderr)

    meta = read_newest_meta(workdir, mirror)
    data = load_dataset(config.data, say, find_start_tokenizer(config, workdir, meta))
    check_text(workdir, data, meta)
    examples = make_examples(data, config.data, config.train.seq_len, config.seed)

    sizes = find_sizes(config, workdir, meta)
    pieces = sizes.level(step - 1).pieces
    first = sizes.examples(step - 1) * pieces
    size = sizes.size(step - 1) * pieces
    for row in range(min(limit or size, size)):
        yield {"row": row, **describe_row(config, data, examples, first + row, pieces)}


def find_start_tokenizer(config: configs.Config, workdir: Path | str, meta: dict | None):
    """As `read_start_tokenizer`. `meta` is that of the newest checkpoint in the workdir."""
    from gpt_jax.data import tokenizer_from_json
    from gpt_jax.run import read_start_tokenizer

    if isinstance(workdir, Path):
        return read_start_tokenizer(config, workdir)
    if meta is None or config.data.tokenizer or not config.init.from_:
        return read_start_tokenizer(config)
    return tokenizer_from_json(meta["tokenizer"])


def find_sizes(
    config: configs.Config, workdir: Path | str, meta: dict | None
) -> configs.BatchSizes:
    """The batch sizes of a run: those behind its newest checkpoint, then those of its config."""
    from gpt_jax.run import read_past_sizes

    if meta is None:
        return configs.make_batch_sizes(config.train)
    past = read_past_sizes(meta, configs.read_saved(meta["config"]), Path(workdir))
    return configs.make_batch_sizes(config.train, past, meta["step"])


def describe_row(config: configs.Config, data, examples, number: int, pieces: int) -> dict:
    """The documents, the ids and the text of a row, of examples that are cut into `pieces`."""
    from gpt_jax.data import make_columns

    source, spans = examples.spans(number, pieces)
    buffer = examples.fill(np.array([number]), pieces)
    columns = make_columns(buffer, data.tokenizer.token_bytes, config.data.document_mask)
    ids = buffer.ids[0][buffer.inside[0]]
    tokens = data.parts[source].train
    return {
        "example": number // pieces,
        "piece": number % pieces,
        "pieces": pieces,
        "source": data.parts[source].name,
        "documents": [describe_span(span, tokens, data.tokenizer) for span in spans],
        "predicted": int(columns["weight"].sum()),
        "ids": ids.tolist(),
        "changed": bool(config.data.fim or config.data.shuffle_documents),
        "text": with_specials(data.tokenizer, ids),
    }


def describe_span(span, tokens, tokenizer) -> dict:
    """A part of a document that lies in a row."""
    start = int(tokens.offsets[span.document]) + span.offset
    return {
        "document": span.document,
        "name": tokens.document_name(span.document),
        "offset": span.offset,
        "tokens": span.size,
        "text": tokenizer.decode(tokens.ids(start, start + span.size)),
    }


def with_specials(tokenizer, ids) -> str:
    """The text of `ids`, with the names of special tokens, which plain decoding leaves out."""
    names = {i: name.encode() for name, i in tokenizer.specials.items()}
    raw = b"".join(names.get(i) or tokenizer.decode_bytes([i]) for i in map(int, ids))
    return raw.removeprefix(tokenizer.prefix).decode("utf-8", "replace")


def read_newest_meta(workdir: Path | str, mirror: str) -> dict | None:
    """The meta.json of the run's newest checkpoint, or None if it has no checkpoint yet."""
    from gpt_jax.run import META_SCHEMA, NothingThere, peek_checkpoint
    from gpt_jax.train import CHECKPOINT_FOLDER, read_meta, resolve_checkpoint

    if isinstance(workdir, str):
        try:
            return peek_checkpoint(workdir, 0, mirror)[0]
        except NothingThere:
            return None
    if not (workdir / CHECKPOINT_FOLDER).is_dir():
        return None
    directory, step = resolve_checkpoint(str(workdir), 0, lambda line: None, META_SCHEMA)
    return read_meta(directory, step, META_SCHEMA)


def check_text(workdir: Path | str, data, meta: dict | None) -> None:
    """Raises UsageError if text or tokenizer have changed since the checkpoint of `meta`."""
    if meta is None:
        return
    if (meta["data"]["content"], meta["tokenizer"]) != (data.content, data.tokenizer.to_json()):
        raise UsageError(
            f"--workdir={workdir}: the text or its tokenizer has changed since the run, so its "
            "batches cannot be made again; bring the old ones back"
        )


def shorten(text: str, chars: int) -> str:
    """The first `chars` of a text, or all of it if `chars` is 0."""
    return text if not chars or len(text) <= chars else f"{text[:chars]}…"


def describe(row: dict, chars: int) -> list[str]:
    """Lines for people about one row."""
    piece = f", piece {row['piece'] + 1:,} of {row['pieces']:,}" if row["pieces"] > 1 else ""
    lines = [
        f"row {row['row']}: example {row['example']:,}{piece}, source {row['source']}, "
        f"{len(row['ids']):,} tokens, {row['predicted']:,} predicted"
    ]
    # fim and shuffle_documents change a row. The documents below are those before that.
    if row["changed"]:
        lines.append(f"  as trained on: {shorten(row['text'], chars)!r}")

    for document in row["documents"]:
        lines.append(
            f"  document {document['document']:,} ({escape(document['name'])}) "
            f"from token {document['offset']:,}, {document['tokens']:,} tokens"
        )
        lines.append(f"    {shorten(document['text'], chars)!r}")
    return lines
