"""Files that are either whole or not there: atomic writes, JSON, checksums."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from kka.errors import UserError, chain, is_full


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a temporary file in the same folder, sync it, and move it to `path`.

    If anything fails the old file stays as it was and the temporary one is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        _sync_folder(path.parent)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)  # it has been moved if only the folder could not be synced
        for each in chain(error):
            if isinstance(each, OSError) and each.filename is None and (each is error or is_full(each)):
                each.filename = str(path)
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically."""
    write_atomically(path, lambda file: file.write(data))


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write JSON atomically; NaN is refused, because it is not JSON."""
    try:
        data = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # the name of a file in another encoding: escaped, it is read as it was
        data = json.dumps(value, indent=indent, allow_nan=False).encode()
    write_bytes(path, data + b"\n")


def read_json(path: Path) -> Any:
    """Read JSON, with or without a byte-order mark.

    Raises UserError naming the file if it is missing or malformed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{str(path)[:200]} cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number; NaN, which Python's JSON has, is none."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def user_path(text: str | Path) -> Path:
    """A path as it was typed, with ~ and ~name; raises UserError for a user who is not there."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no home folder of that name; write the path out") from None


def check_writable(path: Path, flag: str, folder: bool = False) -> None:
    """Raises UserError unless `path` can be written, as a file or a folder; leaves nothing behind.

    Before the work, so that no result is lost. A probe tells more than permissions: root has all of them,
    and still cannot write into /proc.
    """
    try:
        if folder and path.exists() and not path.is_dir():
            raise UserError(f"{flag} {path} is a file; name a folder")
        if not folder and path.is_dir():
            raise UserError(f"{flag} {path} is a folder; name a file")
        place = path if folder else path.parent
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise UserError(
                f"{flag} {path} cannot be written, because {place} is a file; choose another place"
            )
        with tempfile.NamedTemporaryFile(dir=place, prefix=f".{path.name}.", suffix=".tmp"):
            pass
    except OSError as error:
        raise UserError(
            f"{flag} {str(path)[:200]} cannot be written ({error.strerror}); choose another place"
        ) from None


def read_listed(listing: Path) -> set[str]:
    """Names of the files beside `listing` that this program wrote; none without the list.

    Raises UserError for a list of something else, so that nobody's file is taken for ours.
    """
    names = read_json(listing) if listing.exists() else []
    if not isinstance(names, list) or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise UserError(f"{listing} is no list of files of this program; choose another folder")
    return set(names)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
