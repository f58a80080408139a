"""A folder of token shards made by `gpt-jax prepare`: opened and verified.

- `corpus.json` is the manifest. It says what the folder holds, with the SHA-256 of every other
  file, and is written last.
- `tokenizer.json` is what made the tokens (Tokenizer.to_json).
- `SOURCE/train-00000.tokens …` are token shards, see shards.py. Those of held-out text are
  `eval-…`.
- `SOURCE/train-00000.learn …` lie beside shards with tokens that are not learned.
- `SOURCE/train.offsets` and `.docs` are the index over all shards of a side.
- `SOURCE/origins.json` lists the input files, for the names of documents.
- `inputs.json` says where the input was, to notice that it has changed. It is no part of the
  corpus.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt_jax.data.tokenizers.spec import tokenizer_from_json
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import shards
from gpt_jax.data.tokens.shards import SIDES, Origin, TokenFile, Tokens
from gpt_jax.errors import DataError, UsageError
from gpt_jax.files import describe_error, digest_file, is_inside
from gpt_jax.schema import Each, Misfit, read_json, require

# Format 2 has `.learn` files. A version that does not know them must not train on the corpus. A
# corpus without such files is still written in format 1.
FORMATS = (1, 2)
MANIFEST = "corpus.json"
INPUTS = "inputs.json"

SIDE_SCHEMA = {
    "documents": "count",
    "tokens": "count",
    "bytes": "count",
    "lost?": "count",  # an older version did not count them
    "learned?": "count",
    "shards": [("text", "count")],
}
# What became of the documents, see inspect.describe_left_out.
COUNTS_SCHEMA = {
    **dict.fromkeys(("documents", "empty", "skipped", "replaced", "exact", "near"), "count"),
    "places": ["text"],
    "encodings": Each("count"),
    "filtered": Each("count"),
    "dedup": "text",
}
MANIFEST_SCHEMA = {
    "content": "text",
    "settings": {
        "eval_fraction": "number",
        "begin?": "flag",
        "task?": "text",
        "task_options?": Each("text"),
    },
    "tokenizer": {"fingerprint": "text"},
    "dtype": set(shards.ID_TYPES),
    "sources": Each(dict.fromkeys(SIDES, SIDE_SCHEMA)),
    "counts": COUNTS_SCHEMA,
    "files": Each(("count", "text")),
}


@dataclass(frozen=True, eq=False)
class PreparedCorpus:
    """An opened folder."""

    tokenizer: Tokenizer
    # {source: {side: tokens, or None without any}}
    sources: Mapping[str, Mapping[str, Tokens | None]]
    # Digest of the texts and of how they are split, whatever the files are called and tokenized by.
    content: str
    manifest: dict

    @property
    def begins(self) -> bool:
        """Whether each document begins with the tokenizer's `begin`."""
        return self.manifest["settings"].get("begin", False)


# ---- the manifest ----


def is_corpus(folder: Path) -> bool:
    """Whether a folder holds a finished corpus."""
    return (folder / MANIFEST).is_file()


def choose_format(sources: dict) -> int:
    """The number of the format that the `sources` of a manifest need."""
    sides = (side for source in sources.values() for side in source.values())
    return FORMATS[any("learned" in side for side in sides)]


def seal(manifest: dict) -> bytes:
    """The manifest as it is written, with a digest of itself."""
    return json.dumps(manifest | {"digest": _digest(manifest)}, indent=1).encode()


def _digest(manifest: dict) -> str:
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def parse_manifest(raw: bytes, path: str) -> dict:
    """The manifest that `seal` wrote. `path` is for messages.

    Raises DataError for damage, and UsageError for another format.
    """
    number = None
    try:
        manifest = read_json(raw, {"digest": "text", "format": "count"})
        number = manifest["format"]
        whole = manifest["digest"] == _digest(manifest)
    except (ValueError, RecursionError):  # writing may go less deep than reading
        whole = False
    if not whole:
        raise DataError(
            f"{path}: damaged, its digest does not fit; copy it again, or remove the folder and "
            "prepare it again"
        )
    if number not in FORMATS:
        raise UsageError(
            f"{path}: has format {number}, this version reads {FORMATS[0]} to {FORMATS[-1]}; "
            "prepare it again"
        )
    try:
        require(manifest, MANIFEST_SCHEMA)
    except Misfit as error:
        raise DataError(
            f"{path}: its entries are not those of a corpus ({error}); prepare it again"
        ) from None
    for name in _file_names(manifest):
        if not is_inside(name):
            raise DataError(
                f"{path}: names the file {name!r}, which is not inside the corpus; gpt-jax prepare "
                "never writes that, so do not trust this copy"
            )
    return manifest


def _file_names(manifest: dict) -> list[str]:
    """The names of a manifest that this program reads and writes below a folder.

    A manifest may come from a store that others can write. Its digest shows that it is whole, not
    who wrote it.
    """
    names = [*manifest["files"], *manifest["sources"]]
    for source in manifest["sources"].values():
        names += [name for side in SIDES for name, _ in source[side]["shards"]]
    return names


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder.

    Raises UsageError when the folder holds no corpus or one of another format, and DataError for
    damage.
    """
    path = folder / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        begun = (folder / "work").is_dir()
        unfinished = ": it is unfinished, run the same command again" if begun else ""
        raise UsageError(
            f"{folder}: no {MANIFEST} there, so no output of gpt-jax prepare{unfinished}"
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {describe_error(error)}") from None


def _remedy(folder: Path) -> str:
    return f"copy it again, or remove {folder} and prepare it again"


def check_sizes(folder: Path, manifest: dict) -> None:
    """Raises DataError for the first file that is missing or has the wrong size."""
    for name, (wanted, _) in manifest["files"].items():
        path = folder / name
        try:
            size = os.path.getsize(path)
        except OSError as error:
            raise DataError(f"{path}: {describe_error(error)}; {_remedy(folder)}") from None
        if size != wanted:
            raise DataError(
                f"{path}: has {size} bytes, {MANIFEST} says {wanted}; run gpt-jax prepare "
                f"--verify={folder} for all damage, then {_remedy(folder)}"
            )


# ---- opening ----


def open_corpus(folder: Path) -> PreparedCorpus:
    """The tokens in `folder`, read from where they lie.

    Each file's size is checked, and the hash of the offsets, which are held in memory. Those of the
    shards are compared while they are read, see guard.py, or by `verify_corpus`. Raises UsageError
    when the folder holds no corpus, and DataError for a file that is missing, cut, or does not fit.
    """
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    tokenizer = _open_tokenizer(folder, manifest)
    dtype = np.dtype(manifest["dtype"])
    sources = {
        name: _open_source(folder / name, source, dtype, manifest["files"])
        for name, source in manifest["sources"].items()
    }
    return PreparedCorpus(tokenizer, sources, manifest["content"], manifest)


def _open_tokenizer(folder: Path, manifest: dict) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        tokenizer = tokenizer_from_json(path.read_text(encoding="utf-8"))
    except (ValueError, UsageError) as error:
        raise DataError(f"{path}: damaged ({error}); {_remedy(folder)}") from None

    wanted = manifest["tokenizer"]["fingerprint"]
    if tokenizer.fingerprint != wanted:
        raise DataError(
            f"{path}: is {tokenizer.fingerprint}, and the shards are of {wanted}; put back the one "
            "that made them"
        )
    return tokenizer


def _open_source(
    folder: Path, source: dict, dtype: np.dtype, files: dict
) -> dict[str, Tokens | None]:
    path = folder / "origins.json"
    try:
        rows = read_json(path.read_bytes(), shards.ORIGINS_SCHEMA)
        origins = tuple(Origin(*row) for row in rows)
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); {_remedy(folder.parent)}") from None
    return {side: _open_side(folder, side, source[side], dtype, origins, files) for side in SIDES}


def _open_side(
    folder: Path,
    side: str,
    counts: dict,
    dtype: np.dtype,
    origins: tuple[Origin, ...],
    files: dict,
) -> Tokens | None:
    if not counts["tokens"]:
        return None

    def look_up(name: str) -> str:
        return files[f"{folder.name}/{name}"][1]

    opened = tuple(
        TokenFile(folder / name, dtype, tokens, sha256=look_up(name))
        for name, tokens in counts["shards"]
    )
    size = sum(file.size for file in opened)
    try:
        wanted = look_up(f"{side}.offsets")
        offsets, docs = shards.open_index(folder / side, counts["documents"], size, wanted)
    except ValueError as error:
        raise DataError(f"{folder}/{error}; {_remedy(folder.parent)}") from None
    except KeyError as error:
        raise DataError(
            f"{folder.parent / MANIFEST}: lists no {error}; {_remedy(folder.parent)}"
        ) from None
    lost = counts.get("lost", 0)  # an older version did not count them
    learn = ()
    if "learned" in counts:
        learn = tuple(_open_learn(file, files) for file in opened)
    return Tokens(side, opened, offsets, docs, counts["bytes"], origins, lost, learn)


def _open_learn(shard: TokenFile, files: dict) -> TokenFile | None:
    """The bits beside a shard; None if all of its tokens are learned."""
    path = shard.path.with_suffix(".learn")
    name = f"{path.parent.name}/{path.name}"
    if name not in files:
        return None
    return TokenFile(path, shards.LEARN, shard.size, sha256=files[name][1])


# ---- verifying ----


def _find_damage(path: Path, size: int, sha256: str) -> str | None:
    """What is wrong with a file, None if it is whole."""
    try:
        digest = digest_file(path)
    except OSError as error:
        return describe_error(error)
    if digest.size != size:
        return f"has {digest.size} bytes instead of {size}"
    return None if digest.sha256 == sha256 else "its checksum is wrong"


def verify_corpus(folder: Path, say: Callable[[str], None]) -> list[str]:
    """Reads every file, compares its hash, and gives the names of the damaged ones.

    What is wrong with each goes to `say`, and so do files that are no part of the corpus.
    """
    files = read_manifest(folder)["files"]
    paths = [path for path in folder.rglob("*") if path.is_file()]
    for name in sorted(path.relative_to(folder).as_posix() for path in paths):
        if name not in files and name not in (MANIFEST, INPUTS):
            say(f"{folder / name}: is no part of the corpus; it is neither read nor checked")

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter's lock
        damages = pool.map(lambda name: _find_damage(folder / name, *files[name]), files)
        damaged = {name: why for name, why in zip(files, damages, strict=True) if why}
    for name, why in damaged.items():
        say(f"{folder / name}: {why}")
    return list(damaged)
