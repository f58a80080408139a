"""Tokenizers of models that expect a token before each text."""

from pathlib import Path

import tokenizers


def save_tokenizer(folder: Path, template: str) -> str:
    """A byte-level tokenizer.json whose post-processor adds what `template` says."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["<s>", "</s>"])
    if template:
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 256), ("</s>", 257)]
        )
    library.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")
