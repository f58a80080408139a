"""A workdir at a URL: the run works in a folder of this machine, and sends what is finished there.

The store is the truth. A run takes its lease, brings down the newest whole checkpoint and the files
that resuming reads, and works in the mirror as in any workdir. Each finished checkpoint is sent,
the manifest last. So are the other files whenever they have changed, each minute and at each
checkpoint.

The mirror keeps the token of the lease that it worked under. If nobody has taken the lease since,
what could not be sent before is sent at the next start. Otherwise it is dropped.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.cluster import agree_on
from gpt_jax.data import is_remote
from gpt_jax.errors import Busy, Exit, NoCheckpoint, SaveFailed
from gpt_jax.files import replace_file
from gpt_jax.interop import UNFINISHED
from gpt_jax.run.convert import EXPORT_FOLDER
from gpt_jax.run.fetch import Place, fetch_step, group_steps, writing
from gpt_jax.run.lease import LEASE, RENEW_SECONDS, Lease
from gpt_jax.run.mirror_folder import check_shared, holding, list_locks, make_folder
from gpt_jax.run.store import Store, in_threads
from gpt_jax.schema import Each, read_json
from gpt_jax.train import CHECKPOINT_FOLDER, MANIFEST, META, NOWHERE, Outlet, find_damage, steps_in

BELOW = f"{CHECKPOINT_FOLDER}/"
# Beside the mirror's folder: the token of its run, and the next one from before its lease is taken.
TOKENS = "tokens"


class Mirror(Outlet):
    """The folder that a run works in, for a workdir at `url`. Process 0 alone sends.

    `metrics` are the steps in the store and their value of the best metric, or None.
    """

    is_away = True

    def __init__(self, url: str, folder: Path, policy: configs.Checkpoint, say) -> None:
        self.url = url.rstrip("/")
        self.folder = folder
        self.metrics: dict[int, float | None] = {}
        self._policy = policy
        self._say = say
        self._store = Store(url, say, SaveFailed)
        self._lease = Lease(self._store)
        self._known: dict[str, tuple[int, int]] = {}  # size and time of each file as it was sent
        self._sending = threading.Lock()
        self._sent = 0
        self._lost: Busy | None = None  # why the run must end
        self._is_over = threading.Event()
        self._keeper = threading.Thread(target=self._keep_lease, daemon=True, name="lease")

    def name(self, line: str) -> str:
        """A line for people, with the URL in the place of the folder."""
        return line.replace(str(self.folder), self.url)

    # ---- the start ----

    def begin(self) -> None:
        """Takes the lease, and gives the folder what resuming needs.

        Raises Busy if another run has the workdir, NoCheckpoint if its checkpoints are damaged, and
        UsageError or SaveFailed if the store cannot be reached.
        """
        is_own = self._take_lease()
        self.folder.mkdir(exist_ok=True)
        files = self._store.list()
        place = Place(self._store, BELOW, group_steps(files, BELOW))
        self._drop_unfinished(place)
        self._send_rest(place)
        place = place._replace(steps=group_steps(self._store.list(BELOW), BELOW))
        newest = self._bring_newest(place)
        self._keep_only(newest, place)
        self.metrics = {one: self._read_metric(one) for one in place.sealed if one <= newest}

        top = [name for name in files if "/" not in name and name[0] != "." and name != LEASE]
        for name in top:
            if not is_own:
                self._store.fetch(name, self.folder / name)
                self._known[name] = _stamp(self.folder / name)
            elif (self.folder / name).exists():
                self._known[name] = (-1, -1)
        if is_own:
            self._know_exports(files)
        replace_file(self.folder.parent / TOKENS, self._lease.token.encode())
        self._keeper.start()
        threading.Thread(target=self._keep_sending, daemon=True, name="files").start()
        self._say(
            f"workdir {self.url}: the run works in {self.folder}; checkpoints and metrics are sent "
            "from there"
        )

    def _take_lease(self) -> bool:
        """Takes the lease. Returns whether the folder is what the store's last run worked in.

        If it is not, it is made anew. A kill at any moment leaves no folder that is taken for whole
        and is not.
        """
        file = self.folder.parent / TOKENS
        tokens = file.read_text().split() if file.exists() else []
        if tokens:
            replace_file(file, "\n".join([*tokens, self._lease.token]).encode())
        if self._lease.take(tokens) in tokens:
            return True
        file.unlink(missing_ok=True)
        self._clear()
        return False

    def _know_exports(self, files: Mapping[str, int]) -> None:
        """Keeps files of finished exports, which do not change, from being sent once more."""
        for name, size in files.items():
            path = self.folder / name
            if name.startswith(f"{EXPORT_FOLDER}/") and path.is_file():
                stamp = _stamp(path)
                if stamp[0] == size:
                    self._known[name] = stamp

    def give_back(self) -> None:
        """Gives the lease back after a start that failed."""
        with contextlib.suppress(Exit):
            self._lease.release()

    def _clear(self) -> None:
        """Drops what an earlier run has left here, because others have been in the store since."""
        steps = steps_in(self.folder / CHECKPOINT_FOLDER)
        if steps:
            self._say(
                f"{self.folder} is made anew: another run has had {self.url} since, so what was "
                f"not sent from there is dropped (steps {', '.join(map(str, steps))} were there)"
            )
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _drop_unfinished(self, place: Place) -> None:
        for step in sorted({*place.steps} - {*place.sealed}):
            self._say(
                f"checkpoint step {step} in {place.url} was not finished; its remains are removed"
            )
            self._remove_step(place.at(step).name, list(place.steps[step]))

    def _send_rest(self, place: Place) -> None:
        """Sends whole steps that are newer than all in the store. An earlier run could not."""
        directory = self.folder / CHECKPOINT_FOLDER
        newest = max(place.sealed, default=-1)
        for step in steps_in(directory):
            folder = directory / str(step)
            if step > newest and (folder / MANIFEST).exists() and not find_damage(folder):
                self._say(f"checkpoint step {step} is sent to {self.url} now")
                self._send_step(step)

    def _bring_newest(self, place: Place) -> int:
        """The newest whole step, which lies in the folder then; -1 if there never was one."""
        damaged = []
        for step in place.sealed[::-1]:
            folder = self.folder / CHECKPOINT_FOLDER / str(step)
            damage = fetch_step(place.at(step), folder, lambda name: True, self._say)
            if not damage:
                return step
            damaged.append(f"step {step}: {damage}")
            self._say(
                f"checkpoint step {step} in {place.url} is damaged and is passed over: {damage}"
            )
        if damaged:
            raise NoCheckpoint(
                f"{place.url}: no valid checkpoint; found {'; '.join(damaged)}. Restore one from a "
                "copy, or start again with another workdir"
            )
        return -1

    def _keep_only(self, step: int, place: Place) -> None:
        """Deletes all other steps of the folder, but those that wait for their export."""
        every = self._policy.export_every_steps
        for other in steps_in(self.folder / CHECKPOINT_FOLDER):
            folder = self.folder / CHECKPOINT_FOLDER / str(other)
            is_whole = other in place.sealed and (folder / MANIFEST).exists()
            is_due = every > 0 and other % every == 0
            is_awaited = is_due and not (self.folder / EXPORT_FOLDER / str(other)).exists()
            if other != step and not (other < step and is_whole and is_awaited):
                shutil.rmtree(folder)

    def _read_metric(self, step: int) -> float | None:
        """A step's value of the best metric, if the policy asks for it."""
        if not self._policy.keep_best:
            return None
        raw = self._store.read(f"{BELOW}{step}/{META}")
        try:
            metrics = read_json(raw or b"", {"metrics": Each("number")})["metrics"]
        except ValueError:
            return None  # A damaged step cannot be among the best.
        return metrics.get(self._policy.best_metric)

    # ---- the run ----

    def send(self, step: int) -> None:
        """Sends a finished step, and then what else has changed. Raises Busy and SaveFailed."""
        try:
            self._lease.renew()
            self._send_step(step)
        except Busy as error:
            self._lost = error
            raise
        except Exit as error:
            raise SaveFailed(
                f"step {step} could not be sent to {self.url}: {error}; it is whole in "
                f"{self.folder}, from where the same command on this machine sends it"
            ) from None
        self._sync_or_say()

    def _sync_or_say(self) -> None:
        """Sends other files. If that fails it is told, because they are sent again later."""
        try:
            self.sync()
        except (Exit, OSError) as error:
            self._say(f"{error}; the run goes on, and sends it later")

    def _send_step(self, step: int) -> None:
        name = f"{BELOW}{step}"
        folder = self.folder / CHECKPOINT_FOLDER / str(step)
        there = [file[len(name) + 1 :] for file in self._store.list(name)]
        files = [
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        ]
        # What lies there is damaged, or was never finished.
        if MANIFEST in there:
            self._say(f"{self.url}/{name}: the damaged one there is replaced")
        self._remove_files(name, [file for file in there if file not in files or file == MANIFEST])

        def put(file: str) -> None:
            self._store.send(folder / file, f"{name}/{file}")
            self._sent += 1

        in_threads(put, sorted({*files} - {MANIFEST}))
        # A reader, or a kill, finds a manifest only if all else is there.
        put(MANIFEST)

    def remove(self, step: int) -> None:
        """Deletes a step in the store. A failure is reported, and is no failure of the run."""
        name = f"{BELOW}{step}"
        try:
            files = [file[len(name) + 1 :] for file in self._store.list(name)]
            self._remove_step(name, files)
        except Exit as error:
            self._say(f"{self.url}/{name} could not be deleted: {error}")

    def _remove_files(self, folder: str, files: list[str]) -> None:
        """Deletes files. The manifest goes first, so that no reader takes the rest for whole."""
        if MANIFEST in files:
            self._store.remove(f"{folder}/{MANIFEST}")
        in_threads(self._store.remove, [f"{folder}/{file}" for file in files if file != MANIFEST])

    def _remove_step(self, name: str, files: list[str]) -> None:
        """Deletes a step with all of its files."""
        self._remove_files(name, files)
        self._store.drop_folder(name)

    def progress(self) -> int:
        """A number that grows while files are sent."""
        return self._sent

    def check(self) -> None:
        """Raises Busy if another run has taken the lease."""
        if self._lost is not None:
            raise self._lost

    def sync(self) -> None:
        """Sends the files beside the checkpoints that have changed. Raises SaveFailed."""
        with self._sending:
            names = list(_list_others(self.folder))
            for name in names:
                path = self.folder / name
                stamp = _stamp(path)
                if self._known.get(name) != stamp:
                    self._store.send(path, name)
                    self._sent += 1
                    self._known[name] = stamp
            for name in sorted({*self._known} - {*names}):
                self._store.remove(name)
                del self._known[name]

    def _keep_sending(self) -> None:
        """Sends files beside the checkpoints until the end, in a thread.

        The lease has another one, because it must be renewed while gigabytes are sent.
        """
        while not self._is_over.wait(RENEW_SECONDS):
            if self._lost is None:
                self._sync_or_say()

    def _keep_lease(self) -> None:
        """Renews the lease until the end, in a thread."""
        while not self._is_over.wait(RENEW_SECONDS):
            try:
                self._lease.renew()
            except Busy as error:
                self._lost = error
                return
            except Exit as error:
                self._say(f"{error}; the run goes on, and renews its lease later")

    def end(self, error: BaseException | None) -> None:
        """Sends what is left and gives the lease back. `error` is what ends the run, if any."""
        self._is_over.set()
        # A renewal that is under way would take the lease once more after it was given back.
        self._keeper.join()
        if self._lost is not None:
            return
        try:
            self.sync()
            self._lease.release()
        except (Exit, OSError) as problem:
            line = (
                f"metrics could not be sent to {self.url}: {problem}; they are whole in "
                f"{self.folder}, from where the same command on this machine sends them"
            )
            if error is None:
                raise SaveFailed(line) from None
            self._say(line)


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file is written: its size and its time."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _list_others(folder: Path) -> Iterator[str]:
    """The names of all files but checkpoints, hidden ones, and exports that are being written."""
    for where, folders, files in os.walk(folder):
        inside = Path(where).relative_to(folder)
        # os.walk enters what is left in this list.
        folders[:] = [
            name for name in sorted(folders) if name[0] != "." and not name.endswith(UNFINISHED)
        ]
        if where == str(folder) and CHECKPOINT_FOLDER in folders:
            folders.remove(CHECKPOINT_FOLDER)
        yield from ((inside / name).as_posix() for name in sorted(files) if name[0] != ".")


class Workdir(NamedTuple):
    """A folder to train in, where its checkpoints are sent, and who tells people about it."""

    folder: Path
    outlet: Outlet
    say: Callable[[str], None]


@contextlib.contextmanager
def opening_workdir(
    workdir: str | Path, policy: configs.Checkpoint, say: Callable[[str], None]
) -> Iterator[Workdir]:
    """Yields a workdir, which for a URL is a mirror that sends what is finished.

    All processes call it, for a path too. Raises what `Mirror.begin` and `Mirror.end` raise, and
    UsageError for a URL or a mirror that cannot be used.
    """
    if not is_remote(workdir):
        yield Workdir(Path(workdir), NOWHERE, say)
        return

    url = str(workdir)
    folder = make_folder(url, policy.mirror)
    check_shared(folder, url)
    mirror = Mirror(url, folder, policy, say)
    with contextlib.ExitStack() as closing:

        def begin() -> None:
            for lock in list_locks(folder, url):
                closing.enter_context(holding(lock, url, say))
            try:
                mirror.begin()
            except BaseException:
                mirror.give_back()
                raise
            closing.push(lambda kind, error, trace: mirror.end(error))

        with writing(policy.mirror, url):
            agree_on(begin)
        try:
            yield Workdir(folder, mirror, lambda line: say(mirror.name(line)))
        except Exit as error:
            # The user knows the run by its URL, and not by the copy of it on this machine.
            error.args = tuple(map(mirror.name, error.args))
            raise
