"""Writing to folders so that what was there survives a full disk, an error and an interrupt."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


def want_writable(folder: Path) -> None:
    """Raise unless `folder`, or the nearest folder above it that exists, can be written to.

    Raises:
        NotADirectoryError: there is a file in its place.
        PermissionError: no file can be made there, for whatever reason.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"output: got {folder}, but {nearest} is a file; wants a folder")
    try:
        tempfile.TemporaryFile(dir=nearest).close()  # permissions alone do not say it
    except OSError as error:
        reason = error.strerror or error
        raise PermissionError(f"output: got {folder}, but {nearest} cannot be written to ({reason})") from error


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place at the end; after any error all is as it was.

    Raises:
        OSError: it could not be written; the message names it.
    """
    folder = folder.resolve()
    with _told(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        unfinished, old = beside / "unfinished", beside / "old"
        try:
            unfinished.mkdir()
            yield unfinished
            if folder.exists():
                folder.rename(old)
            unfinished.rename(folder)
        finally:
            if old.exists() and not folder.exists():
                old.rename(folder)
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def updating(folder: Path) -> Iterator[Path]:
    """A new folder whose files take their places in `folder` at the end, beside what else is there; as `replacing`."""
    folder = folder.resolve()
    with _told(folder):
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".unfinished.", dir=folder))
        unfinished = beside / "new"
        try:
            unfinished.mkdir()
            yield unfinished
            _move_in(unfinished, folder, beside / "old")
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            if new:
                with suppress(OSError):  # something is in it
                    folder.rmdir()


def _move_in(unfinished: Path, folder: Path, old: Path) -> None:
    """Move all files of `unfinished` to their places in `folder`, or after any error none."""
    begun: list[tuple[Path, Path, bool]] = []
    try:
        for file in [path for path in unfinished.rglob("*") if path.is_file()]:
            place, kept = (root / file.relative_to(unfinished) for root in (folder, old))
            if place.is_dir():
                raise IsADirectoryError(f"{place} is a folder, where a file is to go")
            for path in (place, kept):
                path.parent.mkdir(parents=True, exist_ok=True)
            begun.append((place, kept, place.exists()))
            if place.exists():
                place.rename(kept)
            file.rename(place)
    except BaseException:
        for place, kept, existed in begun:
            if kept.exists():
                kept.replace(place)
            elif not existed:
                place.unlink(missing_ok=True)
        raise


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # how safetensors says that a disk is full
        raise OSError(f"{folder}: could not be written ({error}); what was there is as it was") from error
