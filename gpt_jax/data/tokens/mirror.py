"""A corpus on an object store, copied to this machine once (called by dataset).

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

COPIES = 8  # at once
BLOCK = 1 << 22


def is_remote_corpus(url: str) -> bool:
    """Whether a folder of a store was made by `gpt-jax prepare`; a data set never is, and the
    hub is not asked."""
    return (
        remote.is_remote(url)
        and not url.startswith(HUB)
        and remote.exists(f"{url.rstrip('/')}/{corpus.MANIFEST}")
    )


def _blocks(url: str) -> Iterator[bytes]:
    """The file at `url`. UsageError naming it for whatever the store or the network says on the
    way."""
    with remote.open_remote(url) as file:
        while True:
            with remote.reaching(url):
                block = file.read(BLOCK)
            if not block:
                return
            yield block


def mirror(url: str, cache: Path, say: Callable[[str], None]) -> Path:
    """The folder below `cache` that holds the corpus at `url`, copied there if need be: named by
    its content, each file checked against its SHA-256 and there as a whole or not at all, the
    manifest last; files that are there already (of an earlier call that was killed) stay.
    UsageError when it cannot be had, DataError for a file damaged there."""
    url = url.rstrip("/")
    raw = b"".join(_blocks(f"{url}/{corpus.MANIFEST}"))
    manifest = corpus.parse_manifest(raw, f"{url}/{corpus.MANIFEST}")
    folder = cache / f"corpus-{manifest['digest'][:20]}"
    if corpus.is_corpus(folder):
        return folder
    say(
        f"data: copying {sum(size for size, _ in manifest['files'].values()) / 1e6:,.0f} MB from {url} to {folder}"
    )

    def fetch(name: str) -> None:
        path, wanted = folder / name, Digest(*manifest["files"][name])
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and digest_file(path) == wanted:
            return
        with replacing(path) as temporary:
            with open(temporary, "wb") as out:
                for block in _blocks(f"{url}/{name}"):
                    out.write(block)
                sync_file(out)
            if digest_file(temporary) != wanted:
                raise DataError(
                    f"{url}/{name}: damaged, its checksum is wrong; copy it there again"
                )

    try:
        with ThreadPoolExecutor(COPIES) as pool:
            list(pool.map(fetch, manifest["files"]))
        with replacing(folder / corpus.MANIFEST) as temporary:
            write_file(temporary, raw)
    except OSError as error:
        raise UsageError(
            f"config.data.cache = {cache}: no copy of {url} there: {error.strerror or error}; choose a "
            "folder that can be written and has room"
        ) from None
    return folder
