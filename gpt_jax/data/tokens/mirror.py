"""A corpus on an object store, copied to this machine once.

Training reads rows by place all over the shards, which a store serves a thousand times slower than
a disk.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpt_jax.data.read import remote
from gpt_jax.data.read.sources import HUB
from gpt_jax.data.tokens import corpus
from gpt_jax.errors import DataError, UsageError
from gpt_jax.files import Digest, digest_file, replacing, sync_file, write_file

COPIES = 8  # files copied at once
BLOCK = 1 << 22


def is_remote_corpus(url: str) -> bool:
    """Whether a folder of a store was made by `gpt-jax prepare`.

    A data set of the hub never was, so the hub is not asked.
    """
    if not remote.is_remote(url) or url.startswith(HUB):
        return False
    return remote.exists(f"{url.rstrip('/')}/{corpus.MANIFEST}")


def _read_blocks(url: str) -> Iterator[bytes]:
    """The file at `url`, in blocks. Raises UsageError for whatever the store or network says."""
    with remote.open_remote(url) as file:
        while True:
            with remote.reaching(url):
                block = file.read(BLOCK)
            if not block:
                return
            yield block


def _copy(url: str, path: Path, wanted: Digest) -> None:
    """Copies one file, unless it lies there already. Raises DataError if it is damaged there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and digest_file(path) == wanted:
        return
    with replacing(path) as temporary:
        with open(temporary, "wb") as out:
            for block in _read_blocks(url):
                out.write(block)
            sync_file(out)
        if digest_file(temporary) != wanted:
            raise DataError(f"{url}: damaged, its checksum is wrong; copy it there again")


def mirror(url: str, cache: Path, say: Callable[[str], None]) -> Path:
    """The folder below `cache` that holds the corpus at `url`, copied there if need be.

    The folder is named by its content. Each file is checked against its SHA-256, and appears whole
    or not at all; the manifest comes last. Files of an earlier call that was killed stay.

    Raises UsageError when the corpus cannot be reached or there is no room, and DataError for a
    file that is damaged on the store.
    """
    url = url.rstrip("/")
    raw = b"".join(_read_blocks(f"{url}/{corpus.MANIFEST}"))
    manifest = corpus.parse_manifest(raw, f"{url}/{corpus.MANIFEST}")
    folder = cache / f"corpus-{manifest['digest'][:20]}"
    if corpus.is_corpus(folder):
        return folder

    files = manifest["files"]
    megabytes = sum(size for size, _ in files.values()) / 1e6
    say(f"data: copying {megabytes:,.0f} MB from {url} to {folder}")

    def copy(name: str) -> None:
        _copy(f"{url}/{name}", folder / name, Digest(*files[name]))

    try:
        with ThreadPoolExecutor(COPIES) as pool:
            list(pool.map(copy, files))
        with replacing(folder / corpus.MANIFEST) as temporary:
            write_file(temporary, raw)
    except OSError as error:
        raise UsageError(
            f"config.data.cache = {cache}: no copy of {url} there: {error.strerror or error}; "
            "choose a folder that can be written and has room"
        ) from None
    return folder
