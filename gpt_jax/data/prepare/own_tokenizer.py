"""A tokenizer that is made from the text of a corpus."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gpt_jax.data.prepare import units
from gpt_jax.data.prepare.units import WORK, PrepareJob, Unit
from gpt_jax.data.tokenizers.spec import Spec, make_tokenizer, tokenizer_from_json
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.errors import DataError, UsageError
from gpt_jax.files import digest_json, replace_file


def make_own_tokenizer(
    job: PrepareJob,
    spec: Spec,
    todo: Sequence[Unit],
    scans: Sequence[dict],
    keys: Sequence[str] | None,
    say: Callable[[str], None],
) -> Tokenizer:
    """The tokenizer of a spec: characters of all text, or BPE of a sample of the training side.

    It is kept among the work, so a later call does not make it again.
    """
    digest = digest_json([unit.key for unit in todo], keys)
    path = job.folder / WORK / f"trained-{digest}.json"
    if not path.exists():
        characters = "".join(sorted(set().union(*(scan["characters"] for scan in scans))))
        say(f"tokenizer: making {spec.name}")

        def texts() -> Iterator[str]:
            return _sample(job, todo, keep=keys is not None)

        replace_file(path, make_tokenizer(spec, texts, characters).to_json().encode())
    try:
        return tokenizer_from_json(path.read_text(encoding="utf-8"))
    except (ValueError, UsageError) as error:
        raise DataError(f"{path}: damaged ({error}); remove it") from None


def _sample(job: PrepareJob, todo: Sequence[Unit], keep: bool) -> Iterator[str]:
    """At most `tokenizer_mb` of text to train on.

    It comes from the beginning of every unit, in proportion to its share of the input.
    """
    settings = job.settings
    total = max(sum(unit.size for unit in todo), 1)
    for unit in todo:
        room = int(settings.tokenizer_mb * 1e6 * unit.size / total)
        if not room:
            continue
        kept = np.fromfile(job.folder / units.keep_file(unit), bool) if keep else None
        for text in units.read(job, unit, units.Counts(), kept):
            if units.is_held_out(text.hash, settings.eval_fraction):
                continue
            part = text.text.encode()[:room].decode("utf-8", "ignore")  # not half a character
            yield part
            room -= len(part.encode())
            if room <= 0 or len(part) < len(text.text):
                break
