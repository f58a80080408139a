"""The section `data`: where text comes from, and how it becomes rows."""

from dataclasses import dataclass

from gpt_jax.config.knobs import PACKINGS, SPLITS, TOKEN_TYPES, WEIGHTS, knob


@dataclass(frozen=True)
class Data:
    """Where text comes from and how it becomes rows."""

    path: tuple[str, ...] = knob(
        (),
        "Files, folders, globs, a folder made by `gpt-jax prepare`, or the word stdlib, which is "
        "the source of Python's standard library. A comma separates paths, unless it is part of "
        "one that exists.",
        entries="paths",
    )
    sources: tuple[tuple[str, str, float], ...] = knob(
        (), "A mixture in place of `path`: (name, path, weight) for each source."
    )
    weights: str = knob(
        "tokens", "The unit that the weights of sources are parts of.", choices=WEIGHTS
    )
    temperature: float = knob(
        0.0,
        "For t > 0 every weight is multiplied by size ** (1 / t). The size is in the unit of "
        "`weights`.",
        low=0.0,
    )
    phases: tuple[tuple[int, tuple[float, ...]], ...] = knob(
        (),
        "Later weights of the mixture: (token, a weight for each source). A phase begins with the "
        "first row at or after its token.",
    )
    block: int = knob(
        1000,
        "Examples that hold each source's share exactly. A block is shorter only before a phase.",
        low=1,
    )
    eval_path: tuple[str, ...] = knob(
        (),
        "Held-out text. Where it is empty, a part of `path` is held out.",
        entries="paths",
    )
    eval_fraction: float = knob(
        0.1,
        "The part of text files that is held out. It has no effect on folders made by "
        "`gpt-jax prepare`, which are already split.",
        low=0.0,
        high=0.9,
    )
    split: str = knob(
        "tail",
        "What is held out: the last part of the text, or documents chosen by their hash.",
        choices=SPLITS,
    )
    field: str = knob(
        "text", "The field that holds the text in .jsonl, .json, .csv, .tsv, .parquet and .arrow."
    )
    errors: str = knob(
        "strict", "What happens to bytes that cannot be decoded.", choices=("strict", "replace")
    )
    encodings: tuple[str, ...] = knob(
        ("utf-8",), "Encodings that are tried in turn on each document."
    )
    documents: str = knob("file", "What a document of a text file is.", choices=("file", "line"))
    separator: str = knob(
        "",
        "The text between the documents of a text file, such as <|endoftext|>. It is taken out, "
        "with the end of line after it. Empty means that nothing stands between them.",
    )
    tokenizer: str = knob(
        "",
        "bytes, char, bpe:VOCAB or a path, see docs/data.md. Empty means that of a prepared "
        "folder, or else bytes.",
    )
    begin: bool = knob(
        False,
        "Whether each document begins with the token that the tokenizer's model expects before a "
        "text, such as <s>. A folder made by `gpt-jax prepare` must agree (--begin).",
    )
    token_type: str = knob(
        "auto",
        "The type of the ids in a .bin file that says nothing of it, such as nanoGPT's. auto is "
        "uint16, unless the file or the tokenizer speaks against it.",
        choices=TOKEN_TYPES,
    )
    packing: str = knob(
        "window",
        "How rows are cut: window takes random windows, chunk takes each token once an epoch, "
        "document begins a row with a document, first_fit and best_fit pack whole documents.",
        choices=PACKINGS,
    )
    document_mask: bool = knob(
        False, "Whether documents of a row neither see nor predict each other."
    )
    shuffle_documents: bool = knob(
        False, "Whether the documents inside a row are put in another order."
    )
    fim: float = knob(
        0.0, "The part of documents that is rearranged to fill in the middle.", low=0.0, high=1.0
    )
    fim_spm: float = knob(
        0.5, "The part of the rearranged documents that has the suffix first.", low=0.0, high=1.0
    )
    cache: str = knob(
        "~/.cache/gpt_jax", "The folder of token files, keyed by content and tokenizer."
    )
    workers: int = knob(0, "Threads that tokenize. 0 means one for each core.", low=0)
    prefetch: int = knob(4, "Batches that are ready ahead of the device.", low=1)
    threads: int = knob(1, "Threads that make batches.", low=1)

    @property
    def where(self) -> str:
        """What names the text, for messages."""
        if not self.sources:
            return f"config.data.path = {', '.join(self.path)}"
        names = ", ".join(f"{name} ({path})" for name, path, _ in self.sources)
        return f"config.data.sources = {names}"
