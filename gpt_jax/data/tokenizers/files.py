"""Tokenizers in the files of other tools, by the form of the path.

Byte-level BPE becomes the text of a tokenizer.json, whatever file it comes in. So one encoder
serves all of them, and it gives the ids that the original gives. SentencePiece keeps its own
library, because its normaliser and its lattice of float32 scores have no exact equal elsewhere.

    *.json              a tokenizer.json of the tokenizers library
    *.model             a SentencePiece model
    *.tiktoken          ranks of tiktoken; `:PATTERN` may follow, cl100k if left out
    a folder            tokenizer.json, encoder.json + vocab.bpe, vocab.json + merges.txt, or
                        tokenizer.model
"""

import base64
import binascii
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from gpt_jax import schema
from gpt_jax.data.read.sources import COMPRESSIONS
from gpt_jax.data.tokenizers.bpe import PATTERNS, make_bpe_json, make_json_tokenizer
from gpt_jax.data.tokenizers.json_fields import describe_hidden
from gpt_jax.data.tokenizers.llama2c import read_llama2c
from gpt_jax.data.tokenizers.promises import check_promises
from gpt_jax.data.tokenizers.spelling import make_byte_alphabet
from gpt_jax.data.tokenizers.vocabulary import EOT, EOT_NAMES, FIM_TOKENS, Tokenizer
from gpt_jax.errors import UsageError, install_command
from gpt_jax.files import describe_error

# The character that spells each byte.
LETTERS = {byte: letter for letter, byte in make_byte_alphabet().items()}
# Special tokens that are not in OpenAI's files of ranks, by how many ranks the file has. The row is
# that of cl100k_base (tiktoken_ext/openai_public.py). Other files get <|endoftext|> at the first id
# that is free, as r50k and p50k have it.
OPENAI_SPECIALS = {
    100_256: {
        EOT: 100_257,
        **{name: 100_258 + i for i, name in enumerate(FIM_TOKENS)},
        "<|endofprompt|>": 100_276,
    }
}
O200K = 199_998  # ranks of o200k_base


# ---- tiktoken ----


def _spell(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def _parse_ranks(path: Path) -> dict[bytes, int]:
    """The rank of each token of a .tiktoken file, which is its id.

    A line is the base64 of the token's bytes and the rank. Raises UsageError for another line, and
    for ranks that are negative or equal.
    """
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UsageError(
                f"tokenizer {path.name}: line {number}, {line[:40]!r}, is not the base64 of a "
                "token and its rank; give a file of tiktoken ranks"
            ) from None

    if len(set(ranks.values())) < len(ranks) or min(ranks.values(), default=0) < 0:
        raise UsageError(
            f"tokenizer {path.name}: two tokens have the same rank, or one is negative; "
            "give a whole file"
        )
    return ranks


def _merge_below(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """What BPE makes of `token` with lower ranks only.

    The result has two parts if the token can be reached by merging.
    """
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        lowest = min(pair_ranks)
        if lowest >= limit:
            break
        at = pair_ranks.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _find_merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pairs that BPE over ranks merges, in order.

    A token that no lower ranks lead to may still come about out of order, by any two tokens that
    spell it. As a whole word it is found without merging (`ignore_merges`).
    """
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        parts = _merge_below(token, ranks)
        if len(parts) == 2:
            yield parts[0], parts[1]
            continue
        for i in range(1, len(token)):
            first = token[:i]
            second = token[i:]
            if first in ranks and second in ranks:
                yield first, second


def _choose_specials(path: Path, ranks: Mapping[bytes, int]) -> dict[str, int]:
    """The special tokens of a file of ranks.

    Raises UsageError if an ordinary token has their name or their id.
    """
    used = set(ranks.values())
    first_free = next(i for i in range(len(ranks) + 1) if i not in used)
    specials = OPENAI_SPECIALS.get(len(ranks), {EOT: first_free})
    for name, i in specials.items():
        if i in used or name.encode() in ranks:
            raise UsageError(
                f"tokenizer {path.name}: its ranks hold {name} or its id; "
                "give a file of ordinary tokens"
            )
    return specials


def read_tiktoken(path: Path, pattern: str = "cl100k") -> Tokenizer:
    """A tokenizer of tiktoken's ranks, which are its ids.

    The file does not say how text falls into words, so `pattern` names a row of PATTERNS. Raises
    UsageError for an unknown pattern, and for a file that lacks a byte or holds no ranks.
    """
    if pattern not in PATTERNS:
        raise UsageError(
            f"tokenizer {path.name}:{pattern}: unknown pattern; choose one of {', '.join(PATTERNS)}"
        )
    ranks = _parse_ranks(path)
    if len(ranks) == O200K:
        raise UsageError(
            f"tokenizer {path.name}: these are the ranks of o200k_base, whose way to split text "
            f"into words is not among the patterns ({', '.join(PATTERNS)}), so its ids would be "
            "wrong; give it as a tokenizer.json"
        )

    specials = _choose_specials(path, ranks)
    vocab = {_spell(token): rank for token, rank in ranks.items()} | specials
    merges = [(_spell(first), _spell(second)) for first, second in _find_merges(ranks)]
    content = make_bpe_json(vocab, merges, pattern, specials, ignore_merges=True)
    return make_json_tokenizer(content, f"{path.name}:{pattern}")


# ---- GPT-2's pair of files ----


def read_merges(vocab_path: Path, merges_path: Path) -> Tokenizer:
    """A tokenizer of GPT-2's two files.

    They hold ids by token (encoder.json, vocab.json) and merges, one a line (vocab.bpe,
    merges.txt). Raises UsageError if they hold anything else.
    """
    try:
        vocab = schema.read_json(vocab_path.read_text(encoding="utf-8"), schema.Each("count"))
        lines = merges_path.read_text(encoding="utf-8").split("\n")
        if lines[0].startswith("#version"):
            lines = lines[1:]
        merges = [(a, b) for a, b in (line.split(" ") for line in lines if line)]
    except ValueError as error:
        raise UsageError(
            f"tokenizer {vocab_path.parent.name}: {vocab_path.name} and {merges_path.name} are not "
            f"a map of tokens to ids and a list of merges: {error}"
        ) from None

    specials = [name for name in EOT_NAMES if name in vocab][:1]
    content = make_bpe_json(vocab, merges, "gpt2", specials)
    return make_json_tokenizer(content, vocab_path.parent.name)


# ---- SentencePiece ----


def _load_sentencepiece(content: str, name: str):
    """The library's model.

    Raises UsageError without the package and for a file that is no model.
    """
    try:
        import sentencepiece
    except ImportError:
        raise UsageError(
            f"tokenizer {name}: needs the package sentencepiece; {install_command('sentencepiece')}"
        ) from None
    try:
        model = sentencepiece.SentencePieceProcessor()
        # The constructor would take an empty file for no file.
        model.load_from_serialized_proto(base64.b64decode(content))
    except Exception as error:  # RuntimeError, and others for content that is no model at all
        raise UsageError(
            f"tokenizer {name}: not a SentencePiece model: {str(error).strip()}"
        ) from None
    return model


def _find_eot(model, name: str) -> int:
    """The id of end of text: the model's own, or else a piece with one of its names."""
    eot = model.eos_id()
    if eot >= 0:
        return eot
    names = [model.id_to_piece(i) for i in range(model.vocab_size())]
    eot = next((names.index(end) for end in EOT_NAMES if end in names), None)
    if eot is None:
        raise UsageError(f"tokenizer {name}: has no end-of-text token; train it with an eos_id")
    return eot


def _make_control(content: str, i: int, name: str) -> str:
    """The base64 of a model in which piece `i` is a control symbol, which no text spells.

    Raises UsageError without a protobuf that the package goes with.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2 as formats
    except Exception as error:  # protobuf has an error of its own for each kind of mismatch
        raise UsageError(
            f"tokenizer {name}: its end of text is an ordinary piece, and to change that needs "
            f"the package protobuf ({error}); {install_command('protobuf')}"
        ) from None
    model = formats.ModelProto.FromString(base64.b64decode(content))  # pyright: ignore
    model.pieces[i].type = formats.ModelProto.SentencePiece.CONTROL  # pyright: ignore
    return base64.b64encode(model.SerializeToString()).decode()


def make_sentencepiece_tokenizer(content: str, name: str) -> Tokenizer:
    """A tokenizer of a SentencePiece model, from the base64 of its file.

    It is not `lossless`, because it normalises text as it was trained to. A character that it does
    not know decodes to " ⁇ ", unless the model falls back to bytes. Raises UsageError without the
    package, for a file that is no model, and for one without an end-of-text token.
    """
    model = _load_sentencepiece(content, name)
    eot = _find_eot(model, name)
    notes = ()
    if not model.is_control(eot):
        # Such as a user-defined symbol, which the text that says so would become.
        model = _load_sentencepiece(_make_control(content, eot, name), name)
        notes = describe_hidden([model.id_to_piece(eot)])
    names = [model.id_to_piece(i) for i in range(model.vocab_size())]

    def spell(i: int) -> bytes:
        if model.is_control(i):
            return b""
        if model.is_byte(i):
            return bytes([int(names[i][3:5], 16)])  # <0xNN>
        if model.is_unknown(i):
            return model.decode([i]).encode()
        return names[i].replace("▁", " ").encode()

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        return model.encode([text.encode() for text in texts], return_type="numpy")

    tokenizer = Tokenizer(
        "sentencepiece",
        name,
        content,
        tuple(map(spell, range(len(names)))),
        eot,
        encode,
        lambda text: iter((text,)),
        specials={names[i]: i for i in range(len(names)) if model.is_control(i)},
        prefix=b" " if model.normalize("a").startswith("▁") else b"",
        lossless=False,
        unknown=model.unk_id(),
        notes=notes,
    )
    return check_promises(tokenizer)


def find_sentencepiece_begin(tokenizer: Tokenizer) -> int | None:
    """The id that a SentencePiece model has for the beginning of a text, or None."""
    begin = _load_sentencepiece(tokenizer.content, tokenizer.name).bos_id()
    return begin if begin >= 0 else None


def read_sentencepiece(path: Path) -> Tokenizer:
    """A SentencePiece .model file."""
    return make_sentencepiece_tokenizer(base64.b64encode(path.read_bytes()).decode(), path.name)


# ---- paths ----


def read_json(path: Path) -> Tokenizer:
    """A tokenizer.json of the tokenizers library."""
    return make_json_tokenizer(path.read_text(encoding="utf-8"), path.name)


READERS: dict[str, Callable[[Path], Tokenizer]] = {
    ".json": read_json,
    ".model": read_sentencepiece,
    ".bin": read_llama2c,
}
# What a folder may hold, the most complete first.
FOLDERS: tuple[tuple[Callable[..., Tokenizer], tuple[str, ...]], ...] = (
    (read_json, ("tokenizer.json",)),
    (read_merges, ("encoder.json", "vocab.bpe")),
    (read_merges, ("vocab.json", "merges.txt")),
    (read_sentencepiece, ("tokenizer.model",)),
)


def _read_file(path: Path) -> Tokenizer:
    """The tokenizer of a file, with its other half if it is one of GPT-2's pair."""
    if path.suffix.lower() in COMPRESSIONS[1:] and path.is_file():
        raise UsageError(
            f"tokenizer {path}: is compressed; decompress it first, and give the file without "
            f"{path.suffix}"
        )

    pair = next((names for _, names in FOLDERS if path.name in names and len(names) == 2), None)
    if pair is None or not path.is_file():
        return READERS.get(path.suffix, read_json)(path)

    if missing := [name for name in pair if not path.with_name(name).is_file()]:
        raise UsageError(
            f"tokenizer {path}: is read together with {missing[0]}, which is not beside it; put "
            "both in one folder and give that"
        )
    return read_merges(*map(path.with_name, pair))


def _read_folder(path: Path) -> Tokenizer:
    """The tokenizer of a folder. Raises FileNotFoundError if it holds no row of FOLDERS."""
    for read, names in FOLDERS:
        if all((path / name).is_file() for name in names):
            return read(*(path / name for name in names))
    known = ", ".join(" + ".join(names) for _, names in FOLDERS)
    raise FileNotFoundError(f"the folder holds none of {known}")


def read_tokenizer(spec: str, field: str = "config.data.tokenizer") -> Tokenizer:
    """The tokenizer of a path, which for ranks may be `path.tiktoken:PATTERN`.

    Raises UsageError if there is none.
    """
    stem, _, pattern = spec.rpartition(".tiktoken:")
    path = Path(f"{stem}.tiktoken" if stem else spec).expanduser()
    try:
        if path.suffix == ".tiktoken":
            return read_tiktoken(path, (stem and pattern) or "cl100k")
        if path.is_dir():
            return _read_folder(path)
        return _read_file(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{field} = {spec!r}: expected bytes, char, bpe:N or the path of a tokenizer.json, "
            ".model, .tiktoken or a folder of encoder.json and vocab.bpe: "
            f"{describe_error(error)}"
        ) from None
