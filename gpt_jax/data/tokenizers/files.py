"""Tokenizers in the files of others, by the form of the path (called by tokenizer).

Byte-level BPE becomes the text of a tokenizer.json, whatever it comes in, so that one encoder
serves all and gives the ids that the original gives. SentencePiece keeps its own library: its
normaliser and its lattice of float32 scores have no exact equal elsewhere.
"""

import base64
import binascii
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from gpt_jax.data.read.sources import PACKINGS
from gpt_jax.data.tokenizers.bpe import PATTERNS, bpe_json, byte_alphabet, json_tokenizer
from gpt_jax.data.tokenizers.vocabulary import EOT, EOT_NAMES, FIM_TOKENS, Tokenizer
from gpt_jax.errors import UsageError

LETTERS = {
    byte: letter for letter, byte in byte_alphabet().items()
}  # byte -> the character that spells it
# Special tokens that are not in OpenAI's files of ranks, by how many ranks there are: cl100k_base
# (tiktoken_ext/openai_public.py). Other files get <|endoftext|> at the first id that is free, as
# r50k and p50k have it.
OPENAI_SPECIALS = {
    100_256: {
        EOT: 100_257,
        **{name: 100_258 + i for i, name in enumerate(FIM_TOKENS)},
        "<|endofprompt|>": 100_276,
    }
}
O200K = 199_998  # ranks of o200k_base


def _spelled(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def _parse_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank of a .tiktoken file: a line is the base64 of the token's bytes and its rank,
    which is its id."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            if line.strip():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UsageError(
                f"tokenizer {path.name}: line {number}, {line[:40]!r}, is not the base64 of a token and "
                "its rank; give a file of tiktoken ranks"
            ) from None
    if len(set(ranks.values())) < len(ranks) or min(ranks.values(), default=0) < 0:
        raise UsageError(
            f"tokenizer {path.name}: two tokens have the same rank, or one is negative; give a whole file"
        )
    return ranks


def _halves(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """What BPE makes of `token` with lower ranks only: two parts for one that can be reached by
    merging."""
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        found = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        if (lowest := min(found)) >= limit:
            break
        at = found.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pairs that BPE over ranks merges, in order. A token that no lower ranks lead to may
    still come about out of order, by any two tokens that spell it; as a whole word it is found
    without merging (`ignore_merges`)."""
    for token in sorted((t for t in ranks if len(t) > 1), key=ranks.__getitem__):
        parts = _halves(token, ranks)
        if len(parts) == 2:
            yield parts[0], parts[1]
        else:
            pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
            yield from ((a, b) for a, b in pairs if a in ranks and b in ranks)


def read_tiktoken(path: Path, pattern: str = "cl100k") -> Tokenizer:
    """tiktoken's ranks, which say nothing of how text falls into words: `pattern` is a row of
    PATTERNS. Ids are ranks.

    UsageError for a file that is none, lacks a byte, or an unknown pattern."""
    if pattern not in PATTERNS:
        raise UsageError(
            f"tokenizer {path.name}:{pattern}: unknown pattern; choose one of {', '.join(PATTERNS)}"
        )
    ranks = _parse_ranks(path)
    if len(ranks) == O200K:
        raise UsageError(
            f"tokenizer {path.name}: these are the ranks of o200k_base, whose way to split text into "
            f"words is not among the patterns ({', '.join(PATTERNS)}), so its ids would be wrong; give it "
            "as a tokenizer.json"
        )
    used = set(ranks.values())
    specials = OPENAI_SPECIALS.get(len(ranks)) or {
        EOT: next(i for i in range(len(ranks) + 1) if i not in used)
    }
    taken = [name for name, i in specials.items() if i in used or name.encode() in ranks]
    if taken:
        raise UsageError(
            f"tokenizer {path.name}: its ranks hold {taken[0]} or its id; give a file of ordinary tokens"
        )
    vocab = {_spelled(token): rank for token, rank in ranks.items()} | specials
    merges = [(_spelled(a), _spelled(b)) for a, b in _merges(ranks)]
    return json_tokenizer(
        bpe_json(vocab, merges, pattern, specials, ignore_merges=True), f"{path.name}:{pattern}"
    )


def read_merges(vocab_path: Path, merges_path: Path) -> Tokenizer:
    """GPT-2's two files: ids by token (encoder.json, vocab.json) and merges, one a line
    (vocab.bpe, merges.txt)."""
    try:
        vocab = {
            str(token): int(i)
            for token, i in json.loads(vocab_path.read_text(encoding="utf-8")).items()
        }
        lines = merges_path.read_text(encoding="utf-8").split("\n")
        lines = lines[lines[0].startswith("#version") :]
        merges = [(a, b) for a, b in (line.split(" ") for line in lines if line)]
    except (ValueError, AttributeError) as error:
        raise UsageError(
            f"tokenizer {vocab_path.parent.name}: {vocab_path.name} and {merges_path.name} are not a map "
            f"of tokens to ids and a list of merges: {error}"
        ) from None
    specials = [name for name in EOT_NAMES if name in vocab][:1]
    return json_tokenizer(bpe_json(vocab, merges, "gpt2", specials), vocab_path.parent.name)


def sentencepiece_tokenizer(content: str, name: str) -> Tokenizer:
    """A SentencePiece model from the base64 of its file, encoded by the sentencepiece package. Not
    `lossless`: it normalises text as it was trained to, and a character it does not know (without
    byte fallback) decodes to " ⁇ ".

    UsageError without the package, for a file that is no model, or one without an end-of-text
    token."""
    try:
        import sentencepiece
    except ImportError:
        raise UsageError(
            f"tokenizer {name}: needs the sentencepiece package; "
            "pip install 'gpt_jax[sentencepiece]'"
        ) from None
    try:
        model = sentencepiece.SentencePieceProcessor()
        model.load_from_serialized_proto(
            base64.b64decode(content)
        )  # the constructor takes an empty one for none
    except Exception as error:  # the library raises RuntimeError, and others for what is no text
        raise UsageError(
            f"tokenizer {name}: not a SentencePiece model: {str(error).strip()}"
        ) from None
    names = [model.id_to_piece(i) for i in range(model.vocab_size())]
    eot = (
        model.eos_id()
        if model.eos_id() >= 0
        else next((names.index(n) for n in EOT_NAMES if n in names), None)
    )
    if eot is None:
        raise UsageError(f"tokenizer {name}: has no end-of-text token; train it with an eos_id")

    def piece(i: int) -> bytes:
        if model.is_control(i) or i == eot:
            return b""
        return (
            bytes([int(names[i][3:5], 16)])
            if model.is_byte(i)
            else (model.decode([i]) if model.is_unknown(i) else names[i].replace("▁", " ")).encode()
        )

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        return model.encode([text.encode() for text in texts], return_type="numpy")

    specials = {names[i]: i for i in range(len(names)) if model.is_control(i) or i == eot}
    prefix = b" " if model.normalize("a").startswith("▁") else b""
    return Tokenizer(
        "sentencepiece",
        name,
        content,
        tuple(map(piece, range(len(names)))),
        eot,
        encode,
        lambda text: iter((text,)),
        specials,
        prefix=prefix,
        lossless=False,
        unknown=model.unk_id(),
    )


def read_sentencepiece(path: Path) -> Tokenizer:
    """A SentencePiece .model file."""
    return sentencepiece_tokenizer(base64.b64encode(path.read_bytes()).decode(), path.name)


def read_json(path: Path) -> Tokenizer:
    """A tokenizer.json of the tokenizers library."""
    return json_tokenizer(path.read_text(encoding="utf-8"), path.name)


READERS: dict[str, Callable[[Path], Tokenizer]] = {
    ".json": read_json,
    ".model": read_sentencepiece,
    ".tiktoken": read_tiktoken,
}
# What a folder may hold, the most complete first.
FOLDERS: tuple[tuple[Callable[..., Tokenizer], tuple[str, ...]], ...] = (
    (read_json, ("tokenizer.json",)),
    (read_merges, ("encoder.json", "vocab.bpe")),
    (read_merges, ("vocab.json", "merges.txt")),
    (read_sentencepiece, ("tokenizer.model",)),
)


def _read(path: Path, pattern: str) -> Tokenizer:
    """The tokenizer of a path; OSError or UnicodeDecodeError if it cannot be read, UsageError
    for what is in it."""
    if path.suffix == ".tiktoken":
        return read_tiktoken(path, pattern or "cl100k")
    if path.suffix.lower() in PACKINGS[1:] and path.is_file():
        raise UsageError(
            f"tokenizer {path}: is compressed; decompress it first, and give the file without "
            f"{path.suffix}"
        )
    pair = next((names for _, names in FOLDERS if path.name in names and len(names) == 2), None)
    if pair and path.is_file():  # half of GPT-2's pair: the other half lies beside it
        if missing := [name for name in pair if not path.with_name(name).is_file()]:
            raise UsageError(
                f"tokenizer {path}: is read together with {missing[0]}, which is not beside it; put both "
                "in one folder and give that"
            )
        return read_merges(*map(path.with_name, pair))
    if not path.is_dir():
        return READERS.get(path.suffix, read_json)(path)
    for read, names in FOLDERS:
        if all((path / name).is_file() for name in names):
            return read(*(path / name for name in names))
    raise FileNotFoundError(
        "the folder holds none of " + ", ".join(" + ".join(names) for _, names in FOLDERS)
    )


def read_tokenizer(spec: str, field: str = "config.data.tokenizer") -> Tokenizer:
    """The tokenizer of a path, for ranks `path.tiktoken:PATTERN`; UsageError when there is none."""
    path, _, pattern = spec.rpartition(".tiktoken:")
    path, pattern = (f"{path}.tiktoken", pattern) if path else (spec, "")
    try:
        return _read(Path(path).expanduser(), pattern)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{field} = {spec!r}: expected bytes, char, bpe:N or the path of a tokenizer.json, .model, "
            f".tiktoken or a folder of encoder.json and vocab.bpe: {why}"
        ) from None
