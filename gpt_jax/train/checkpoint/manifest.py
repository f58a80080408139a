"""Tells which checkpoints on disk are whole, and finds the newest valid one.

Each checkpoint has a manifest of our own, because Orbax restores flipped bits without a word. The
manifest has the name, size and sha256 of every file, and the sha256 of that list. It is written
last. So a step with a manifest was complete once, and bytes that differ from it are damage.

A file `<step>.saving` next to a step says that its save has begun and not ended. It tells an
unfinished save, whose process was killed, from a checkpoint that has lost its manifest.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType

import jax

from gpt_jax.cluster import agree_on
from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.files import describe_error, replace_file
from gpt_jax.schema import Each, Schema, read_json, require
from gpt_jax.train.checkpoint.verify import (
    Files,
    compare_files,
    hash_files,
    idle,
    own_share,
)

MANIFEST = "manifest.json"
META = "meta.json"
# The format of a checkpoint's folder and of meta.json. Format 2 differs only in the names of some
# config keys, which the reader of the config translates.
FORMAT = 3
READABLE = (2, FORMAT)
CHECKPOINT_FOLDER = "checkpoints"  # inside a workdir
TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's name for a step that it is still writing
SAVING = ".saving"
MANIFEST_SCHEMA = {"sha256": "text", "files": Each(("count", "text"))}
# What `save` adds to the meta of its caller.
META_SCHEMA = {"step": "count", "metrics": Each("number"), "format": "count"}
# A caller that adds nothing of its own to meta.json.
NOTHING_MORE: Schema = MappingProxyType({})


def cause_of(error: BaseException) -> str:
    """One line that tells what went wrong, in the system's own words where it has some."""
    text = str(error).strip() or type(error).__name__
    number = re.search(r"os_error_code='(\d+)'", text)  # tensorstore hides the errno in its message
    if number:
        return os.strerror(int(number[1]))
    if isinstance(error, OSError) and error.strerror:
        return describe_error(error)
    return text.splitlines()[0][:300]


def list_files(folder: Path) -> dict[str, int]:
    """Relative name -> bytes of every file below `folder` except its manifest, sorted by name."""
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in paths
        if path != folder / MANIFEST
    }


def render_manifest(files: dict[str, list]) -> str:
    """The manifest's text: `{name: [bytes, sha256]}` and the sha256 of that.

    One table has exactly one text.
    """
    table = json.dumps(files, sort_keys=True, separators=(",", ":"))
    own = hashlib.sha256(table.encode()).hexdigest()
    return json.dumps({"sha256": own, "files": json.loads(table)}, separators=(",\n", ":")) + "\n"


def parse_manifest(raw: bytes) -> Files | None:
    """The table of files in the bytes of a manifest, or None if they are not as written."""
    try:
        files = read_json(raw, MANIFEST_SCHEMA)["files"]
        return files if render_manifest(files).encode() == raw else None
    except ValueError:
        return None


def write_manifest(folder: Path) -> None:
    """Hashes all files of the finished step in `folder` and seals it."""
    sizes = list_files(folder)
    hashes = hash_files(folder, sizes)
    text = render_manifest({n: [s, h] for (n, s), h in zip(sizes.items(), hashes, strict=False)})
    replace_file(folder / MANIFEST, text.encode())


def find_damage(folder: Path, meta_schema: Schema = NOTHING_MORE) -> str:
    """The damage of the step in `folder` as "file: reason", or "" if every byte is as saved.

    This process reads all of it. `meta_schema` is that of the values which the caller of `save`
    adds to meta.json. A meta that lacks them is damage, even if its digest is right.
    """
    damage, files = look(folder)
    return damage or compare_files(folder, files) or check_meta(folder, meta_schema)


def find_damage_together(folder: Path, beat: Callable[[], None], meta_schema: Schema) -> str:
    """As `find_damage`, by all processes of the job. `beat` is called as long as it goes on."""
    damage = agree_on(lambda: look(folder)[0])
    if damage:
        return damage
    # Another process may see another folder there. It takes part all the same, and says so.
    known, files = look(folder)
    damage = compare_files(folder, {} if known else files, beat, own_share(), known)
    return damage or agree_on(lambda: check_meta(folder, meta_schema))


def check_meta(folder: Path, meta_schema: Schema) -> str:
    """What meta.json lacks, as "file: reason", or ""."""
    try:
        _parse_meta((folder / META).read_bytes(), meta_schema)
        return ""
    except OSError as error:
        return f"{META}: {describe_error(error)}"
    except ValueError as error:
        return f"{META}: {error}"


def look(folder: Path) -> tuple[str, Files]:
    """(the damage that shows without reading the files, the manifest's table of them)."""
    try:
        return _look(folder)
    except OSError as error:
        # A folder that the disk no longer gives back is damage, too.
        return f"{error.filename or folder}: {describe_error(error)}", {}


def _parse_meta(raw: bytes, meta_schema: Schema) -> dict:
    """The values of a meta.json. Raises Misfit.

    Of a format that this program does not read, only the number of the format is looked at.
    """
    meta = read_json(raw, {"format": "count"})
    if meta["format"] in READABLE:
        require(meta, META_SCHEMA | dict(meta_schema))
    return meta


def _look(folder: Path) -> tuple[str, Files]:
    """As `look`. Raises OSError if a file cannot be read."""
    sizes = list_files(folder)
    if not (folder / MANIFEST).exists():
        return f"{MANIFEST}: missing" if sizes else f"{folder.name}: empty directory", {}

    files = parse_manifest((folder / MANIFEST).read_bytes())
    if files is None:
        return f"{MANIFEST}: content changed", {}

    bad = {name: "missing" for name in files if name not in sizes}
    bad |= {name: "not part of the checkpoint as saved" for name in sizes if name not in files}
    bad |= {
        name: f"{sizes[name]} bytes instead of {size}"
        for name, (size, _) in files.items()
        if name in sizes and sizes[name] != size
    }
    more = f" (and {len(bad) - 1} more files)" if len(bad) > 1 else ""
    return next((f"{name}: {reason}{more}" for name, reason in bad.items()), ""), files


def steps_in(directory: Path) -> list[int]:
    """The steps that have a folder in `directory`, whole or not, in order.

    Without such a directory the list is empty.
    """
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir()
    )


def unfinished_in(directory: Path) -> list[int]:
    """The steps whose save began and did not end.

    The save is still under way, or its process was killed.
    """
    names = [path.name.removesuffix(SAVING) for path in directory.glob(f"*{SAVING}")]
    names += [
        path.name.removesuffix(TEMPORARY)
        for path in directory.glob(f"*{TEMPORARY}")
        if not path.with_name(path.name.removesuffix(TEMPORARY)).exists()
    ]

    return sorted(
        {
            int(name)
            for name in names
            if name.isdecimal() and not (directory / name / MANIFEST).exists()
        }
    )


def latest_valid(
    directory,
    report: Callable[[str], None] = print,
    beat: Callable[[], None] = idle,
    meta_schema: Schema = NOTHING_MORE,
) -> int | None:
    """The newest step in `directory` whose every byte is as saved.

    The result is None if nothing was ever saved there. All processes call it, and get the same
    answer. Process 0 reports each checkpoint that is passed over in a line with step, file and
    reason. Nothing is deleted. `beat` is called while files are read. Raises NoCheckpoint if there
    are checkpoints and none is valid. `meta_schema` is that of `find_damage`.
    """
    directory = Path(directory).absolute()
    damaged = []
    newest = None
    while True:
        newest = agree_on(partial(_next_older, directory, newest, report))
        if newest is None:
            break
        damage = find_damage_together(directory / str(newest), beat, meta_schema)
        if not damage:
            return newest
        damaged.append(f"step {newest}: {damage}")
        if jax.process_index() == 0:
            report(
                f"checkpoint step {newest} in {directory} is damaged and is passed over: {damage}"
            )

    if damaged:
        raise NoCheckpoint(
            f"{directory}: no valid checkpoint; found {'; '.join(damaged)}. "
            "Restore one from a copy, or start again with another workdir"
        )
    return None


def _next_older(directory: Path, newer: int | None, report: Callable[[str], None]) -> int | None:
    """The newest finished step below `newer`, which may be None for any. It reports the others."""
    unfinished = unfinished_in(directory)
    for step in sorted({*steps_in(directory), *unfinished}, reverse=True):
        if newer is not None and step >= newer:
            continue
        if step not in unfinished:
            return step
        report(f"checkpoint step {step} in {directory} is not finished and is passed over")
    return None


def resolve_checkpoint(
    path, step: int = 0, report=print, meta_schema: Schema = NOTHING_MORE
) -> tuple[Path, int]:
    """(checkpoints directory, step) of a whole checkpoint, from a path that a user typed.

    The path is a workdir, its checkpoints folder or one step's folder. `step` 0 takes the newest
    valid step. Raises UsageError if the path or the step does not exist, with a list of those that
    do. Raises NoCheckpoint if that step, or every step, is damaged. `meta_schema` is that of
    `find_damage`.
    """

    def locate():
        directory, wanted_step = _locate(Path(path).absolute(), step)
        return [str(directory), wanted_step]

    name, wanted_step = agree_on(locate)
    directory = Path(name)
    if wanted_step:
        _check_step(directory, wanted_step, path, meta_schema)
        return directory, wanted_step

    newest = latest_valid(directory, report, meta_schema=meta_schema)
    if newest is None:
        raise UsageError(
            f"checkpoint {str(path)!r}: nothing finished there yet; {_nearby(directory)}"
        )
    return directory, newest


def find_steps(path: str | Path) -> tuple[Path, list[int]]:
    """The checkpoints directory of a path that a user typed, and its steps, whole or not.

    Of a path that is one step's folder it is that step. Steps that are being saved are left out.
    Raises UsageError if nothing is there.
    """
    path = Path(path).absolute()
    directory, step = _locate(path, 0)
    # A workdir may have the name of a step.
    is_one = directory == path.parent
    unfinished = unfinished_in(directory)
    steps = [step] if is_one else steps_in(directory)
    return directory, [one for one in steps if one not in unfinished]


def _check_step(directory: Path, step: int, path, meta_schema: Schema) -> None:
    """Raises UsageError if there is no such step, and NoCheckpoint if it is damaged.

    `path` is what the user typed. All processes call it.
    """

    def list_steps() -> str:
        steps = steps_in(directory)
        return f"steps in {directory}: {', '.join(map(str, steps)) or 'none'}"

    def find() -> str:
        if step not in steps_in(directory):
            raise UsageError(f"checkpoint {str(path)!r}: no step {step}; {list_steps()}")
        return "not finished" if step in unfinished_in(directory) else ""

    folder = directory / str(step)
    damage = agree_on(find) or find_damage_together(folder, idle, meta_schema)
    if damage:
        raise NoCheckpoint(
            f"checkpoint step {step} in {directory} is damaged: {damage}; {list_steps()}"
        )


def peek_meta(path, step: int = 0, meta_schema: Schema = NOTHING_MORE) -> dict:
    """The meta of a checkpoint, from a path as in `resolve_checkpoint`, without verifying files.

    Every process reads it for itself. Raises UsageError if the path or the step does not exist.
    """
    directory, wanted_step = _locate(Path(path).absolute(), step)
    sealed = [one for one in steps_in(directory) if (directory / str(one) / MANIFEST).exists()]
    found = [one for one in sealed if one == wanted_step or not wanted_step]
    if not found:
        raise UsageError(
            f"checkpoint {str(path)!r}: no step {wanted_step or 'that is finished'}; "
            f"steps in {directory}: {', '.join(map(str, sealed)) or 'none'}"
        )
    return read_meta(directory, found[-1], meta_schema)


def _locate(path: Path, step: int) -> tuple[Path, int]:
    """(checkpoints directory, step or 0 for the newest) of a typed path. Raises UsageError."""
    if (path / CHECKPOINT_FOLDER).is_dir():
        return path / CHECKPOINT_FOLDER, step
    if path.name.isdecimal() and (path.is_dir() or steps_in(path.parent)):
        if step not in (0, int(path.name)):
            raise UsageError(
                f"checkpoint {str(path)!r}: is step {path.name}, but step {step} was asked for; "
                "drop one"
            )
        return path.parent, int(path.name)
    if path.is_dir() and (path.name == CHECKPOINT_FOLDER or steps_in(path)):
        return path, step

    problem = "holds no checkpoints" if path.exists() else "does not exist"
    raise UsageError(f"checkpoint {str(path)!r}: {problem}; {_nearby(path)}")


def _nearby(path: Path) -> str:
    """What could have been meant: runs with checkpoints near the nearest folder that exists.

    Folders above the working folder are not searched. What lies there is often somebody else's,
    and a search of the root would read the whole disk.
    """
    path = path.resolve()
    base = next(parent for parent in (path, *path.parents) if parent.is_dir())
    for root in [base, *base.parents][:4]:
        if root == root.parent or root in Path.cwd().parents:
            break

        patterns = [f"{depth}{CHECKPOINT_FOLDER}" for depth in ("", "*/", "*/*/")]
        folders = sorted({folder for pattern in patterns for folder in root.glob(pattern)})
        runs = [
            f"{folder.parent} (steps {', '.join(map(str, steps_in(folder)))})"
            for folder in folders
            if steps_in(folder)
        ]
        if runs:
            return f"found {'; '.join(runs[:10])}"
    return f"no checkpoints under {base} either; give a workdir"


def read_meta(directory, step: int, meta_schema: Schema = NOTHING_MORE) -> dict:
    """The meta of a saved step: the values given to `save`, with `step`, `metrics` and `format`.

    `meta_schema` is that of `find_damage`. Raises NoCheckpoint if the meta cannot be read, or if it
    lacks a value. Raises UsageError if its format is another program's.
    """
    path = Path(directory).absolute() / str(step) / META
    try:
        meta = _parse_meta(path.read_bytes(), meta_schema)
    except (OSError, ValueError) as error:
        raise NoCheckpoint(f"{path}: cannot be read: {cause_of(error)}") from error

    if meta["format"] not in READABLE:
        way_out = "use the program that wrote it, or train again"
        if meta["format"] > FORMAT:
            way_out = "update the program"
        raise UsageError(
            f"{path}: format {meta['format']} is not this program's {FORMAT}; {way_out}"
        )
    return meta
