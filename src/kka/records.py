"""Files of JSON lines that grow while a command runs, and go on after it was killed."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from kka.anomalies import end_line, read_lines
from kka.errors import UserError


@contextmanager
def appending(path: Path, key: str, kind: type) -> Iterator[BinaryIO]:
    """The file, open to append, without the unfinished line of a killed process.

    Raises UserError if it cannot be written, another process has it, or `read_records` refuses it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another file") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{path} is in use by another process; wait for it or choose another file"
            ) from None
        read_records(path, key, kind)  # a file of somebody else is refused as it is
        end_line(file)
        yield file


def append(file: BinaryIO, records: Sequence[dict[str, Any]]) -> None:
    """Write records as lines of JSON, and return when they are safe on disk."""
    if records:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path, key: str, kind: type) -> list[dict[str, Any]]:
    """The objects in a .jsonl file; raises UserError naming the line of one without a `key` of that kind."""
    records = []
    for number, value in read_lines(path):
        if not isinstance(value, dict) or not isinstance(value.get(key), kind):
            raise UserError(f"{path}, line {number} has no {key!r}; restore it or remove the line")
        records.append(value)
    return records
