"""The switch from the old files of a folder to the new ones, which a kill leaves undone, done, or to be completed.

The new files are complete in ``new/`` of a workspace inside the folder before a journal beside them begins the switch.
Then the old files move to ``old/``, and the new ones to their places. Every move is one rename, so the journal and the
places of the files say at any moment what is left to do.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.disk import EVALUATION_NAME, SPECTRA_NAME, TRAINED_NAME, flush_file, flush_folder, read_text

NEW = "new"
_OLD = "old"
_JOURNAL = "journal.json"
_MAX_BYTES = 1 << 24

# Whoever reads a folder opens one of these first, and reads nothing where it is missing.
_READ_FIRST = ("adapter_config.json", "config.json", EVALUATION_NAME)
# What this package alone reads, which completes a switch before it reads.
_READ_BY_US = ("README.md", "nesting.json", SPECTRA_NAME, TRAINED_NAME)

Mark = tuple[int, int]
"""By which a file is known again: its size, and when it was written, in nanoseconds."""


@dataclass(frozen=True)
class Switch:
    """One switch that has begun.

    Attributes:
        folder: Whose files are replaced.
        workspace: Where the new files come from and the old ones go.
        new: The files to put, relative to the folder.
        old: The files to take.
    """

    folder: Path
    workspace: Path
    new: Mapping[Path, Mark]
    old: Mapping[Path, Mark]

    @classmethod
    def begin(cls, folder: Path, workspace: Path, gone: Iterable[Path]) -> Switch:
        """Write the journal: from now on the switch is to be completed.

        Args:
            folder: Whose files are replaced.
            workspace: Inside it, with the new files in ``new/``.
            gone: Old files that go though no new one has their name.
        """
        source = workspace / NEW
        files = [file.relative_to(source) for file in sorted(source.rglob("*")) if file.is_file()]
        for file in files:
            if (folder / file).is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{file} is a folder")
        old = [file for file in dict.fromkeys((*files, *gone)) if os.path.lexists(folder / file)]
        switch = cls(
            folder,
            workspace,
            {file: mark(source / file) for file in files},
            {file: mark(folder / file) for file in old},
        )
        known = {NEW: switch.new, _OLD: switch.old}
        named = {key: {file.as_posix(): own for file, own in marks.items()} for key, marks in known.items()}
        draft = workspace / f"{_JOURNAL}.draft"
        draft.write_text(json.dumps(named), encoding="utf-8")
        flush_file(draft)
        os.replace(draft, workspace / _JOURNAL)
        flush_folder(workspace)
        flush_folder(folder)
        return switch

    @classmethod
    def found(cls, folder: Path, workspace: Path) -> Switch | None:
        """The switch that has begun and has not ended; None where there is none.

        Raises:
            MatryoshkaError: The journal cannot be read, or speaks of files elsewhere.
        """
        if not has_journal(workspace):
            return None
        file = workspace / _JOURNAL
        try:
            data = json.loads(read_text(file, _MAX_BYTES))
            new, old = (
                {Path(PurePosixPath(name)): (int(size), int(time)) for name, (size, time) in data[key].items()}
                for key in (NEW, _OLD)
            )
            for name in (*new, *old):
                for root in (folder, workspace / NEW, workspace / _OLD):
                    if not (root / name).parent.resolve().is_relative_to(folder) or ".." in name.parts:
                        raise ValueError(f"{name} is not in the folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MatryoshkaError(
                f"{file} cannot be read: {error!r:.200}. A program was stopped while it replaced files in {folder}; "
                f"copy or save the folder again, and delete {workspace}"
            ) from error
        return cls(folder, workspace, new, old)

    def complete(self) -> None:
        """Take what is still to be taken and put what is still to be put; may be stopped and called again.

        Raises:
            MatryoshkaError: Another program has written one of these files since the switch began.
        """
        if any(self._waits(file) for file in self.new):
            self._check_untouched()
            for turn in range(3):
                self._move(self.folder, self.workspace / _OLD, filter(self._stands, self.old), turn)
            for turn in reversed(range(3)):
                self._move(self.workspace / NEW, self.folder, filter(self._waits, self.new), turn)

    def undo(self) -> None:
        """Put everything back where it was, in the reverse order, and end the switch."""
        for turn in range(3):
            arrived = (file for file in self.new if not self._waits(file) and os.path.lexists(self.folder / file))
            self._move(self.folder, self.workspace / NEW, arrived, turn)
        for turn in reversed(range(3)):
            taken = (file for file in self.old if os.path.lexists(self.workspace / _OLD / file))
            self._move(self.workspace / _OLD, self.folder, taken, turn)
        self.end()

    def end(self) -> None:
        """Delete the journal, and the folders that are empty now."""
        (self.workspace / _JOURNAL).unlink(missing_ok=True)
        parents = {parent for file in (*self.new, *self.old) for parent in file.parents if parent.name}
        for parent in sorted(parents, key=lambda parent: -len(parent.parts)):
            with suppress(OSError):  # it holds something else, or is gone
                (self.folder / parent).rmdir()

    def _waits(self, file: Path) -> bool:
        """Whether a new file has not been put yet."""
        return file in self.new and os.path.lexists(self.workspace / NEW / file)

    def _stands(self, file: Path) -> bool:
        """Whether an old file has not been taken yet."""
        return os.path.lexists(self.folder / file) and (file not in self.new or self._waits(file))

    def _check_untouched(self) -> None:
        for file in dict.fromkeys((*self.new, *self.old)):
            known = self.old if file not in self.new or self._waits(file) else self.new
            there = mark(self.folder / file) if os.path.lexists(self.folder / file) else None
            # An old file may be gone already.
            if there != known.get(file) and (there is not None or known is self.new):
                raise MatryoshkaError(
                    f"a program was stopped while it replaced files in {self.folder}, and {file} was changed since. "
                    f"Copy or save the folder again, and delete {self.workspace}, which holds the old and the new files"
                )

    def _move(self, source: Path, target: Path, files: Iterable[Path], turn: int) -> None:
        """Move the files whose turn it is, and wait until the disk has that."""
        mine = [file for file in files if _turn(file) == turn]
        for file in mine:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(source / file, target / file)
        for folder in sorted({(target / file).parent for file in mine} | {(source / file).parent for file in mine}):
            flush_folder(folder)


def has_journal(workspace: Path) -> bool:
    """Whether a switch has begun there and has not ended."""
    return os.path.isfile(workspace / _JOURNAL)


def _turn(file: Path) -> int:
    """When an old file is taken; new ones are put in the reverse order."""
    return 0 if file.name in _READ_BY_US else 1 if file.name in _READ_FIRST else 2


def mark(file: Path) -> Mark:
    """Of a file as it is now."""
    found = file.lstat()
    return found.st_size, found.st_mtime_ns
