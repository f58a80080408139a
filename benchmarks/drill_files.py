"""Sound files that drills begin from, and random changes of them."""

import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

TEXTS = [f"text {i}, of some words" for i in range(30)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def write_table(path: Path, mark: str) -> None:
    rows = "".join(f'{i}{mark}"word"\n' for i in range(30))
    path.write_text(f"id{mark}text\n{rows}")


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)


def write_arrow(path: Path) -> None:
    import pyarrow

    table = pyarrow.table({"text": TEXTS})
    with pyarrow.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)


def write_npy(path: Path) -> None:
    import numpy as np

    np.save(path, np.arange(3000, dtype=np.uint16) % 250)


# format -> how a sound file of it is written
FORMATS: dict[str, Callable[[Path], object]] = {
    "txt": lambda path: path.write_text("\n".join(TEXTS)),
    "jsonl": lambda path: path.write_bytes(LINES),
    "json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS])),
    "csv": lambda path: write_table(path, ","),
    "tsv": lambda path: write_table(path, "\t"),
    "jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES)),
    "parquet": write_parquet,
    "arrow": write_arrow,
    "npy": write_npy,
}


def write_texts(folder: Path, name: str) -> Path:
    """A sound file of a format, which the fuzzing starts from."""
    path = folder / f"sound.{name}"
    FORMATS[name](path)
    return path


def write_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some words of some text"] * 20, trainer)
    tokenizer.save(str(folder / "sound.tokenizer.json"))
    return folder / "sound.tokenizer.json"


def mutate(raw: bytes, draw: random.Random) -> bytes:
    """A few random changes: flips, cuts, copies, and words that programs trip over."""
    out = bytearray(raw)
    words = (b"null", b"-1", b"1e999", b"\x00", b"\xff", b'"', b"[" * 50, b"{}", b"9" * 30)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(out) + 1)
        span = draw.randint(1, 8)
        way = draw.randrange(5)
        if way == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << draw.randrange(8)
        elif way == 1:
            del out[at : at + span]
        elif way == 2:
            out[at : at + span] = draw.choice(words)
        elif way == 3:
            out[at:at] = out[at : at + 40]
        elif draw.random() < 0.3:
            del out[at:]
    return bytes(out)
