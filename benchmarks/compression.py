"""How far tokenizers shorten text: tokens per character and bytes per token, Chinese and English.

    python benchmarks/compression.py DATA            # minutes, most of them training six vocabularies

DATA is a folder with `lm_zh/` (zizhitongjian_modern, hongloumeng, cluecorpussmall_sampled:
.txt.xz), `lm_en/gutenberg/` (.txt, latin-1) and `tokenizers/` (GPT-2's encoder.json.xz and
vocab.bpe, cl100k_base.tiktoken.xz). Byte-level BPE of 4,096 and 16,384 ids is trained on the first
nine tenths of zizhitongjian with every row of `bpe.PATTERNS`, and measured there on the last tenth;
English is foreign to them, as Chinese is to GPT-2. Prints a table, writes `compression.json` beside
this file.
"""

import argparse
import json
import lzma
import platform
import tempfile
import time
from pathlib import Path

import tokenizers

from gpt_jax.data.tokenizers.bpe import PATTERNS, train_bpe
from gpt_jax.data.tokenizers.files import read_tokenizer
from gpt_jax.data.tokenizers.vocabulary import Tokenizer

HERE = Path(__file__).resolve().parent
SIZES = (4096, 16384)


def read(path: Path) -> str:
    return lzma.open(path).read().decode("utf-8")


def texts_of(data: Path) -> tuple[str, dict[str, str]]:
    """(text to train on, texts to measure on by name)."""
    history = read(data / "lm_zh/zizhitongjian_modern.txt.xz")
    cut = len(history) * 9 // 10
    novels = sorted((data / "lm_en/gutenberg").glob("*.txt"))
    return history[:cut], {
        "zizhitongjian": history[cut:],
        "hongloumeng": read(data / "lm_zh/hongloumeng.txt.xz"),
        "cluecorpussmall": read(data / "lm_zh/cluecorpussmall_sampled.txt.xz"),
        "gutenberg": "".join(path.read_text(encoding="latin-1") for path in novels),
    }


def published(data: Path) -> list[Tokenizer]:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "gpt2"
        folder.mkdir()
        (folder / "encoder.json").write_bytes(
            lzma.open(data / "tokenizers/gpt2/encoder.json.xz").read()
        )
        (folder / "vocab.bpe").write_bytes((data / "tokenizers/gpt2/vocab.bpe").read_bytes())
        ranks = folder / "cl100k_base.tiktoken"
        ranks.write_bytes(lzma.open(data / "tokenizers/tiktoken/cl100k_base.tiktoken.xz").read())
        return [read_tokenizer(str(folder)), read_tokenizer(str(ranks))]


def measured(tokenizer: Tokenizer, texts: dict[str, str]) -> dict[str, dict]:
    """Per text: characters, bytes, tokens, and the two ratios. Every text must come back."""
    found = {}
    for name, text in texts.items():
        parts = tokenizer.encode_batch(list(tokenizer.parts(text)))
        assert "".join(map(tokenizer.decode, parts)) == text, (tokenizer.name, name)
        tokens, size = sum(map(len, parts)), len(text.encode())
        found[name] = {
            "characters": len(text),
            "bytes": size,
            "tokens": tokens,
            "tokens_per_character": round(tokens / len(text), 4),
            "bytes_per_token": round(size / tokens, 3),
        }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    training, texts = texts_of(parser.parse_args().data)
    rows = {}
    print("tokens per character (bytes per token)\n")
    print(f"| tokenizer | ids | {' | '.join(texts)} |\n|---|---|{'---|' * len(texts)}", flush=True)

    def row(tokenizer: Tokenizer, seconds: float):
        found = measured(tokenizer, texts)
        rows[tokenizer.name] = {
            "ids": tokenizer.vocab,
            "training_seconds": round(seconds, 1),
            "texts": found,
        }
        cells = [
            f"{f['tokens_per_character']:.3f} ({f['bytes_per_token']:.2f})" for f in found.values()
        ]
        print(f"| {tokenizer.name} | {tokenizer.vocab:,} | {' | '.join(cells)} |", flush=True)

    for size in SIZES:
        for pattern in PATTERNS:
            start = time.perf_counter()
            row(train_bpe([training], size, pattern), time.perf_counter() - start)
    for tokenizer in published(parser.parse_args().data):
        row(tokenizer, 0.0)
    about = {"machine": platform.machine(), "tokenizers": tokenizers.__version__}
    (HERE / "compression.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
