"""The output folder of `gpt-jax prepare` before the work begins.

It may be new, finished, or left by a call that was ended. One call at a time works in it.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from gpt_jax import files
from gpt_jax.data.prepare import assemble, identity
from gpt_jax.data.prepare.units import WORK
from gpt_jax.data.tokens import corpus
from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error, replace_file
from gpt_jax.schema import Each, Misfit, Schema, read_json

Say = Callable[[str], None]


@contextlib.contextmanager
def explain_errors(folder: Path) -> Iterator[None]:
    """Turns OSError, such as of a full disk, into UsageError that names the folder.

    A lack of memory becomes one that names the input.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--output={folder}: {describe_error(error)}; make room or choose a folder that can "
            "be written; what is finished stays: the same command goes on from there"
        ) from None
    except MemoryError:
        raise UsageError(
            "--input: memory ran out while text was filtered and tokenized; give fewer --workers, "
            "or cut the longest documents; what is finished stays: the same command goes on from "
            "there"
        ) from None


@contextlib.contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder. Raises UsageError if another call holds it."""
    with contextlib.ExitStack() as holding:
        try:
            holding.enter_context(files.hold_lock(folder / WORK / "lock", wait=None))
        except BlockingIOError:
            raise UsageError(
                f"--output={folder}: another gpt-jax prepare is at work there; wait for it, or "
                "choose another folder"
            ) from None
        yield


def answer_finished(folder: Path, about: dict, state: dict, say: Say) -> dict:
    """The manifest of a finished folder, if the call is the one that made it.

    `about` are the settings of the call and `state` is that of its input. Raises UsageError if
    either differs, and DataError if a file is missing or cut.
    """
    manifest = corpus.read_manifest(folder)
    identity.refuse_other(folder, manifest["settings"], about)
    _refuse_changed_input(folder, state)
    corpus.check_sizes(folder, manifest)

    if assemble.find_leftovers(folder, manifest):  # without any it need not be writable
        (folder / WORK).mkdir(exist_ok=True)
        # Another call may have cleaned up meanwhile.
        with contextlib.suppress(FileNotFoundError), hold_lock(folder):
            assemble.clean(folder, manifest)
    say(
        f"{folder}: is finished already, with these settings and this input. Sizes were checked. "
        f"`gpt-jax prepare --verify={folder}` checks the content."
    )
    return manifest


def _read_own(path: Path, folder: Path, schema: Schema):
    """What an earlier call has written there. Raises UsageError for anything else."""
    try:
        return read_json(path.read_bytes(), schema)
    except Misfit as error:
        raise UsageError(
            f"--output={folder}: {path.name} there is damaged ({error}); choose another folder, or "
            "remove this one"
        ) from None


def _refuse_changed_input(folder: Path, state: dict) -> None:
    """Raises UsageError if the input is no longer what the folder was made from."""
    inputs = folder / corpus.INPUTS
    if not inputs.exists():  # it is no part of a corpus, so a copy need not have it
        return
    saved = _read_own(inputs, folder, Each(["text"]))
    before = {identity.locate(path): value for path, value in saved.items()}
    changed = [path for path in {**before, **state} if path not in before or path not in state]
    changed += [
        path
        for path, value in before.items()
        if path in state and identity.has_changed(path, value, state[path])
    ]
    if changed:
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        raise UsageError(
            f"--output={folder}: is finished, and the input has changed since ({changed[0]}"
            f"{more}); choose another folder, or remove this one"
        )


def make_room(folder: Path) -> None:
    """Makes the folder, and the folder of the work in it.

    Raises UsageError for what is not empty and was not begun by an earlier call.
    """
    if folder.is_symlink() and not folder.exists():
        raise UsageError(
            f"--output={folder}: is a link to {os.readlink(folder)}, which is not there; make that "
            "folder, or remove the link"
        )
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output={folder}: is a file; name a folder")
    work = folder / WORK
    if not work.is_dir() and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(
            f"--output={folder}: is not empty, and nothing there was begun by gpt-jax prepare; "
            "name a new folder"
        )
    work.mkdir(parents=True, exist_ok=True)


def begin(folder: Path, about: dict, say: Say) -> None:
    """Writes the settings of the work, or checks that they are those of an earlier call.

    The version of the program is among them, because a corpus of two versions would be of neither.
    The caller holds the lock, so a call that is refused leaves no settings behind.
    """
    work = folder / WORK
    settings = work / "settings.json"
    program = identity.identify_program()
    # Before the first unit is done, a call with other settings would lose nothing.
    if settings.exists() and any(work.glob("*-*.json")):
        saved = _read_own(settings, folder, identity.SETTINGS_SCHEMA)
        begun_by = saved.pop("program", None)
        identity.refuse_other(folder, saved, about)
        identity.refuse_other_program(folder, begun_by, program)
        say(f"{folder}: goes on from where an earlier call ended")
    else:
        replace_file(settings, json.dumps(about | {"program": program}).encode())
