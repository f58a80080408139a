"""The tokenizer file of llama2.c: pieces with scores, merged as SentencePiece merges them.

The file has the longest length as int32, and for each piece a float32 score, an int32 length and
its bytes (https://github.com/karpathy/llama2.c, tokenizer.py). Ids 0 to 2 are unknown, begin and
end. Ids 3 to 258 are the bytes. A text of such a model begins after `<s>`, and the next one too.
"""

import base64
import json
import struct
from dataclasses import replace
from pathlib import Path

from gpt_jax.data.tokenizers.bpe import make_json_tokenizer
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.errors import UsageError

CONTROLS = ("<unk>", "<s>", "</s>")
BEGIN = 1


def read_pieces(raw: bytes, name: str) -> list[tuple[float, str]]:
    """The (score, piece) of each id, with ▁ for a space. Raises UsageError for another file."""
    pieces = []
    place = 4
    try:
        while place < len(raw):
            score, length = struct.unpack_from("<fi", raw, place)
            place += 8
            if not 0 <= length <= len(raw) - place:
                raise ValueError("a piece goes beyond the file")
            pieces.append((score, raw[place : place + length].decode().replace(" ", "▁")))
            place += length
        byte_names = [f"<0x{byte:02X}>" for byte in range(256)]
        if [piece for _, piece in pieces[3:259]] != byte_names:
            raise ValueError("ids 3 to 258 are no bytes")
    except (ValueError, struct.error) as error:
        raise UsageError(f"tokenizer {name}: is no tokenizer of llama2.c: {error}") from None
    return [(0.0, control) for control in CONTROLS] + pieces[3:]


def find_merges(pieces: list[tuple[float, str]]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the best score first."""
    ids = {piece: i for i, (_, piece) in enumerate(pieces)}
    learned = sorted(range(259, len(pieces)), key=lambda i: -pieces[i][0])
    merges = []
    for i in learned:
        piece = pieces[i][1]
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def make_llama2c_tokenizer(content: str, name: str) -> Tokenizer:
    """A tokenizer from the base64 of such a file. Raises UsageError for another file."""
    pieces = read_pieces(base64.b64decode(content), name)
    controls = [
        {
            "id": i,
            "content": control,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, control in enumerate(CONTROLS)
    ]
    spec = {
        "version": "1.0",
        "added_tokens": controls,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, (_, piece) in enumerate(pieces)},
            "merges": [list(pair) for pair in find_merges(pieces)],
        },
    }
    tokenizer = make_json_tokenizer(json.dumps(spec), name)
    # Texts of such a model are parted by `<s>`; `</s>` never occurs.
    return replace(tokenizer, kind="llama2c", content=content, eot=BEGIN)


def read_llama2c(path: Path) -> Tokenizer:
    """A tokenizer .bin of llama2.c."""
    return make_llama2c_tokenizer(base64.b64encode(path.read_bytes()).decode(), path.name)
