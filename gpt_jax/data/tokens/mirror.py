"""A corpus on an object store, copied to this machine once.

Training reads rows by place all over the shards, which a store serves a thousand times slower than
a disk.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpt_jax.data.read import remote
from gpt_jax.data.read.sources import HUB
from gpt_jax.data.tokens import corpus
from gpt_jax.errors import DataError, UsageError
from gpt_jax.files import (
    Digest,
    describe_error,
    digest_file,
    hold_lock,
    replacing,
    sync_file,
    write_file,
)

COPIES = 8  # files copied at once


def is_remote_corpus(url: str) -> bool:
    """Whether a folder of a store was made by `gpt-jax prepare`.

    A data set of the hub never was, so the hub is not asked.
    """
    if not remote.is_remote(url) or url.startswith(HUB):
        return False
    return remote.exists(f"{url.rstrip('/')}/{corpus.MANIFEST}")


def _copy(url: str, path: Path, wanted: Digest) -> None:
    """Copies one file, unless it lies there already. Raises DataError if it is damaged there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and digest_file(path) == wanted:
        return
    with replacing(path) as temporary:
        with open(temporary, "wb") as out:
            for block in remote.read_blocks(url):
                out.write(block)
            sync_file(out)
        if digest_file(temporary) != wanted:
            raise DataError(f"{url}: damaged, its checksum is wrong; copy it there again")


def mirror(url: str, cache: Path, say: Callable[[str], None]) -> Path:
    """The folder below `cache` that holds the corpus at `url`, copied there if need be.

    The folder is named by its content. Each file is checked against its SHA-256, and appears whole
    or not at all; the manifest comes last. Files of an earlier call that was killed stay. Of
    several processes that share the cache, one copies and the others wait.

    Raises UsageError when the corpus cannot be reached or there is no room, and DataError for a
    file that is damaged on the store.
    """
    url = url.rstrip("/")
    raw = b"".join(remote.read_blocks(f"{url}/{corpus.MANIFEST}"))
    manifest = corpus.parse_manifest(raw, f"{url}/{corpus.MANIFEST}")
    folder = cache / f"corpus-{manifest['digest'][:20]}"
    if corpus.is_corpus(folder):
        return folder

    def wait() -> None:
        say(f"data: waiting for another process that copies {url}")

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with hold_lock(folder.with_suffix(".lock"), wait):
            if not corpus.is_corpus(folder):
                _copy_corpus(url, folder, raw, manifest["files"], say)
    except OSError as error:
        raise UsageError(
            f"config.data.cache = {cache}: no copy of {url} there: {describe_error(error)}; "
            "choose a folder that can be written and has room"
        ) from None
    return folder


def _copy_corpus(
    url: str, folder: Path, raw: bytes, files: dict, say: Callable[[str], None]
) -> None:
    """Copies the files of a manifest, and then the manifest itself, which is `raw`."""
    megabytes = sum(size for size, _ in files.values()) / 1e6
    say(f"data: copying {megabytes:,.0f} MB from {url} to {folder}")

    def copy(name: str) -> None:
        _copy(f"{url}/{name}", folder / name, Digest(*files[name]))

    with ThreadPoolExecutor(COPIES) as pool:
        list(pool.map(copy, files))
    with replacing(folder / corpus.MANIFEST) as temporary:
        write_file(temporary, raw)
