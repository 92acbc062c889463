"""One clear sentence for bad input instead of a traceback."""

import errno
import sys
from collections.abc import Callable, Iterator

BAD_INPUT = 2  # exit code for input that only the user can mend
SKIPPED = 3  # for a result without some of the input
INTERRUPTED = 130  # the shell's code for Ctrl-C
CONTINUES = "the same command continues where it stopped"
FULL = (errno.ENOSPC, errno.EDQUOT)
# What libraries that are not Python's say instead; a C++ stream, as in torch.save(path), does not say why.
FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "iostream error")


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and what to do about it."""


class TrainingError(Exception):
    """A run that cannot give a meaningful number (NaN loss, collapsed scores); the message says why."""


def run_script(main: Callable[[], None], again: str = CONTINUES) -> None:
    """Run a script's `main` and turn expected failures into one sentence and an exit code.

    Bad input exits with 2, Ctrl-C with 130 (`again` says what then), a failed training or a full disk with 1.
    """
    if again == CONTINUES and "--overwrite" in sys.argv:  # which would remove what is there
        again = again.replace("command", "command without --overwrite")
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        explained = _explain(error, again)
        if explained is None:
            raise
        sentence, code = explained
        print(sentence, file=sys.stderr, flush=True)
        sys.exit(code)


def _explain(error: BaseException, again: str) -> tuple[str, int] | None:
    """A sentence and an exit code for an expected failure."""
    if _is_interrupt(error):
        return f"interrupted; {again}", INTERRUPTED
    if isinstance(error, UserError):
        return f"error: {error}", BAD_INPUT
    if isinstance(error, TrainingError):
        return f"error: {error}", 1
    for each in chain(error):
        if is_full(each) or any(text in str(each) for text in FULL_TEXTS):
            name = getattr(each, "filename", None)
            where = f" while writing {name}" if name else ""
            return f"error: the disk is full{where}; free some space and run the same command again", 1
    return _explain_place(error) if isinstance(error, OSError) else None


def _explain_place(error: OSError) -> tuple[str, int] | None:
    """The same for a place that cannot be written."""
    name = error.filename2 or error.filename  # the second is where a temporary file was to go
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"error: no permission to write {error.filename}; choose another folder", BAD_INPUT
    if name and error.errno == errno.EISDIR:
        return f"error: {name} is a folder; give the name of a file", BAD_INPUT
    if name and error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"error: {name} cannot be made, as a file is in its way; choose another place", BAD_INPUT
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those before it: a library may then fail in its own way, as torch.save does."""
    while error is not None:
        yield error
        error = error.__context__


def is_full(error: BaseException) -> bool:
    """Whether it says that there is no room on the disk."""
    return isinstance(error, OSError) and error.errno in FULL


def _is_interrupt(error: BaseException) -> bool:
    """Ctrl-C, also where it hit a library."""
    return any(isinstance(each, KeyboardInterrupt) for each in chain(error))
