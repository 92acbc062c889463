"""Run a script that ends with the process that started it: python -P -m kka.tether SCRIPT FLAGS...

Standard input is a pipe that its parent holds. When the parent is gone, however it went, the pipe ends and
the script is killed: what it has finished stays, and no orphan keeps a run folder locked.
"""

import os
import runpy
import signal
import sys
import threading


def follow_parent() -> None:
    """Kill this process at the end of standard input."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=follow_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
