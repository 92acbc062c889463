"""One clear sentence for bad input instead of a traceback."""

import errno
import sys
from collections.abc import Callable

BAD_INPUT = 2  # exit code for input that only the user can mend
INTERRUPTED = 130  # the shell's code for Ctrl-C


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and what to do about it."""


class TrainingError(Exception):
    """A run that cannot give a meaningful number (NaN loss, collapsed scores); the message says why."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` and turn expected failures into one sentence and an exit code.

    Bad input exits with 2, Ctrl-C with 130, a failed training or a full disk with 1.
    """
    try:
        main()
    except UserError as error:
        sys.exit(_say(f"error: {error}", BAD_INPUT))
    except TrainingError as error:
        sys.exit(_say(f"error: {error}", 1))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted; the same command continues where it stopped", INTERRUPTED))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {error.filename}" if error.filename else ""
            sys.exit(
                _say(f"error: the disk is full{where}; free some space and run the same command again", 1)
            )
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            sys.exit(
                _say(f"error: no permission to write {error.filename}; choose another folder", BAD_INPUT)
            )
        raise


def _say(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr, flush=True)
    return code
