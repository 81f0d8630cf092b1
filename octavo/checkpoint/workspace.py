"""The directory beside an output in which it is made, until it is whole.

``.NAME.octavo`` holds, while ``NAME`` is written::

    lock        locked by the one process that may write here
    journal     what is finished, for a run that can be resumed
    edition/    the output to be
    whole       there once nothing of it is missing
    replaced    what was in the output's place, between the two renames of the end

The output appears by a rename. Whatever moment a process dies at, either the old output or the new one is
whole, here or in its place, and :class:`Workspace` finds its way from there. Each entry is on disk before
anything relies on it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from octavo.checkpoint.disk import explained, sync
from octavo.checkpoint.writer import Place
from octavo.errors import OctavoError, WriteError


class Workspace:
    """Holds the lock of one output while it is made; a context manager.

    Leaving the context without :meth:`publish` removes everything, unless ``keep`` is set and what ended it
    was an interruption rather than the user's mistake. A resumed run removes nothing but by success.

    Attributes:
        target: the directory to create.
        directory: where it is made.
        edition: what will be renamed to ``target``.
        journal: the path of the journal.
        resumed: whether there is an interrupted run to go on with.
        keep: whether what is there is worth resuming.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        """
        Args:
            target: the directory to create.
            overwrite: replace ``target`` if it exists, and an interrupted run if there is one.
            resume: go on with an interrupted run if there is one.

        Raises:
            OctavoError: ``target`` exists, another process writes it, there is an interrupted run and
                neither option says what to do with it, or nothing can be written here.
        """
        self.target = target
        self.directory = target.parent / f".{target.name}.octavo"
        self.edition = self.directory / "edition"
        self.journal = self.directory / "journal"
        self.resumed = self.keep = False
        self._published = False
        self._overwrite = overwrite
        self._replaced = self.directory / "replaced"
        self._whole = self.directory / "whole"
        self._new_parents = [path for path in target.parents if not path.exists()]
        if not self.directory.exists():
            self._refuse_existing(resume)
        try:
            with explained(target, 0):
                target.parent.mkdir(parents=True, exist_ok=True)
                self._lock = self._acquire()
        except BaseException:
            self._remove_empty()
            raise
        try:
            with explained(target, 0):
                self._begin(resume)
        except BaseException:
            if not self.journal.exists():
                self._remove()
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None or not self.keeps(error):
                self._remove()
        except BaseException as interruption:
            error = interruption
            raise
        finally:
            os.close(self._lock)
            if self._published and error is not None:
                error.add_note(f"{self.target} is complete.")

    @property
    def place(self) -> Place:
        """Where the edition is written."""
        return Place(self.target, self.edition, self.resumed)

    def keeps(self, error: BaseException) -> bool:
        """Whether what has been done stays there when ``error`` ends the run."""
        mistake = isinstance(error, OctavoError) and not isinstance(error, WriteError)
        return not self._published and (self.resumed or (self.keep and not mistake))

    def publish(self) -> None:
        """Move the edition into the target's place; it must be on disk already.

        Raises:
            OctavoError: the target appeared meanwhile, or cannot be replaced.
        """
        self._refuse_existing()
        with explained(self.target, 0):
            sync(self.edition)
            self._whole.touch()
            sync(self.directory)
            with suppress(FileNotFoundError):
                os.rename(self.target, self._replaced)
            try:
                os.rename(self.edition, self.target)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.rename(self._replaced, self.target)
                raise
            sync(self.target.parent)
        self._published = True

    def _acquire(self) -> int:
        """Lock the directory, which may vanish at any time before that."""
        path = self.directory / "lock"
        while True:
            self.directory.mkdir(exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(descriptor, 20, 0).decode(errors="replace") or "unknown"
                os.close(descriptor)
                raise OctavoError(
                    f"{self.target} is being written by another process (number {owner}), which holds the lock "
                    f"{path}. Wait until it ends, or choose another output directory."
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            os.close(descriptor)

    def _begin(self, resume: bool) -> None:
        """Take up what an earlier process left, or clear it away; all under the lock."""
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)
        if self.journal.exists() and not resume and not self._overwrite:
            raise OctavoError(
                f"{self.target} has been begun: {self.directory} holds an interrupted run. "
                "Pass --resume to go on with it, or --overwrite to start over."
            )
        if resume and self.journal.exists() and self._whole.exists() and not self.edition.exists():
            # Renamed at the end of a run that did not live to see it: once more.
            with suppress(FileNotFoundError):
                os.rename(self.target, self.edition)
        self.resumed = resume and self.journal.exists() and self.edition.exists()
        if not self.resumed:
            self._clear()
        self._refuse_existing(resume)
        self.edition.mkdir(exist_ok=True)
        for path in (self.edition, self.directory, *self._new_parents):
            sync(path.parent)

    def _clear(self) -> None:
        """Remove what is in the directory but the lock, the journal first."""
        self.journal.unlink(missing_ok=True)
        if os.path.lexists(self._replaced) and not os.path.lexists(self.target):
            os.rename(self._replaced, self.target)
        for path in self.directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != "lock":
                # A link is replaced, what it leads to stays.
                path.unlink()

    def _remove(self) -> None:
        """Remove everything, as far as that is possible: the next run does the rest."""
        with suppress(OSError):
            self._clear()
            (self.directory / "lock").unlink()
        self._remove_empty()

    def _remove_empty(self) -> None:
        for path in (self.directory, *self._new_parents):
            with suppress(OSError):
                path.rmdir()

    def _refuse_existing(self, resume: bool = False) -> None:
        """Raise if something is where the output is to be, and may not be replaced."""
        if not os.path.lexists(self.target) or self._overwrite:
            return
        if self.edition.exists():
            raise WriteError(
                f"{self.target} exists, and so does {self.directory}, where it is being made. Move it away, "
                "or pass --overwrite to replace it."
            )
        told = " and no interrupted run of it is left to resume" if resume else ""
        raise OctavoError(
            f"{self.target} already exists{told}. Choose another output directory, "
            "or pass --overwrite to replace it."
        )
