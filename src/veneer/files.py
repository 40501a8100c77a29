"""Reading and writing files: written whole or not at all, and nothing read is trusted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import StoreError

DAMAGED = "The file is damaged; take another copy"
MOST_JSON = 64 << 20  # the description of a base with 100,000 tensors takes less
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_rehearsing: ContextVar[bool] = ContextVar("_rehearsing", default=False)
STALE = 3600.0  # seconds after which a file that a killed process left aside is nobody's


def digest(data: bytes) -> str:
    """The SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


# -- writing ----------------------------------------------------------------------------------------------------------
def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees all of it or what was there before.

    Raises: StoreError where the folder cannot be made or written, or the disk is full; the old file is then in place.
    """
    with _refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the reason for being here is the one to tell
                os.unlink(aside)
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Within it `whole_folder` keeps nothing: what is written lies aside, can be read again there, and vanishes. What writes a
    single file asks `rehearsing`."""
    before = _rehearsing.set(True)
    try:
        yield
    finally:
        _rehearsing.reset(before)


def rehearsing() -> bool:
    return _rehearsing.get()


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends well, and vanishes when it does not.

    Raises: StoreError where `path` holds something already, cannot be made, or the disk is full.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StoreError("there is something here already", where=str(path), fix="Give a new folder, or an empty one")
    with _refusals(path):
        dry = _rehearsing.get()
        if not dry:
            path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=None if dry else path.parent))
        try:
            yield aside
            if not dry:
                os.chmod(aside, 0o755)
                os.replace(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        if not dry:
            _sync_folder(path.parent)


def sweep(folder: Path, keep: set[str], old: Any) -> None:
    """Remove from `folder` the files whose names match the pattern `old`, and what killed processes left long ago.

    A file that cannot be removed stays: it is out of use, and what was saved is whole.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            aside = entry.name.startswith(".adapter") and time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE
            if entry.name not in keep and (old.fullmatch(entry.name) or aside):
                os.unlink(entry.path)


def _sync_folder(folder: Path) -> None:
    """A rename outlasts a power cut once its folder is on the disk."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise StoreError("a file is where the folder should be", where=str(path.parent), fix="Give the path of a folder, new or old") from None
    except IsADirectoryError:
        raise StoreError("a folder is where the file should be", where=str(path), fix="Remove it, or give another path") from None
    except PermissionError as e:
        raise StoreError(f"cannot write: {e.strerror}", where=str(path), fix="Give a folder that you may write to") from e
    except StoreError:
        raise
    except Exception as e:
        said = system_error(e) or (e.strerror or str(e) if isinstance(e, OSError) else "")
        if not said:
            raise
        raise StoreError(f"cannot write: {said}", where=str(path), fix=room(path.parent)) from e


def system_error(error: BaseException) -> str:
    """What the system said of a full disk (a quota, a limit, a failing or read-only one), wherever in the chain of errors; ''
    where it said nothing of the kind. Libraries in Rust put its number into their own message."""
    seen: list[BaseException] = []
    now: BaseException | None = error
    while now is not None and now not in seen:
        seen.append(now)
        told = re.search(r"os error (\d+)", str(now))
        number = now.errno if isinstance(now, OSError) else int(told[1]) if told else None
        if number in NO_ROOM:
            return os.strerror(number)
        now = now.__cause__ or now.__context__
    return ""


def room(folder: Path) -> str:
    """How much may be written there, in words."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return "Give another folder"
    return f"{free / (1 << 20):,.1f} MiB are free there"


# -- reading ----------------------------------------------------------------------------------------------------------
def regular(path: Path, missing: str, fix: str = "") -> int:
    """The size of the file at `path`. Raises: StoreError where there is none, or a pipe, a device or a folder."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(missing, where=str(path), fix=fix) from None
    except (OSError, ValueError) as e:
        raise StoreError(f"cannot be read: {e}", where=str(path), fix=fix) from None
    if not stat.S_ISREG(found.st_mode):
        raise StoreError("not a file", where=str(path), fix=fix or DAMAGED)
    return found.st_size


def read_json(path: Path) -> Any:
    """What the JSON file holds. Raises: StoreError for a missing, damaged or absurd one."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise StoreError(f"the key {twice!r} stands twice", where=str(path), fix=DAMAGED)
        return out

    size = regular(path, "there is no adapter here", "Give the folder that vn.save wrote")
    if size > MOST_JSON:
        raise StoreError(f"{size >> 20} MiB of JSON, and an adapter's description has at most {MOST_JSON >> 20}", where=str(path), fix=DAMAGED)
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except StoreError:
        raise
    except OSError as e:
        raise StoreError(f"cannot be read: {e.strerror or e}", where=str(path)) from None
    except (ValueError, RecursionError) as e:  # not JSON, not UTF-8, numbers of thousands of digits, or endless nesting
        raise StoreError(f"not a JSON file: {e}", where=str(path), fix=DAMAGED) from None


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, whose digest is `sha256` where given. Raises: StoreError."""
    from safetensors.torch import load_file

    regular(path, "the weights are missing")
    try:
        if sha256 is not None:
            with path.open("rb") as f:
                found = hashlib.file_digest(f, "sha256").hexdigest()
            if found != sha256:
                raise StoreError(
                    f"the weights are not those that were saved: their SHA-256 begins with {found[:12]}, not {sha256[:12]}",
                    where=str(path),
                    fix="The file is truncated, damaged or exchanged; take another copy",
                )
        return load_file(path)
    except StoreError:
        raise
    except Exception as e:  # whatever the parser raises on bytes that it cannot read, it means this
        raise StoreError(f"not a whole safetensors file: {e}", where=str(path), fix="The file is truncated or damaged; take another copy") from None
