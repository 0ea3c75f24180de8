"""Processes that end with the one that started them."""

import os
import threading
import time

_EVERY = 1.0  # seconds between two looks at the parent


def end_with_parent(grace: float = 0.0) -> None:
    """From now on this process ends when its parent is gone, however that ended.

    A thread watches, so that this holds while the process waits for something: a worker of a data loader
    whose message is larger than the pipe waits for its reader for ever, since other workers keep the
    pipe open.

    Args:
        grace: seconds for which it may go on, to end by itself.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_EVERY)
        time.sleep(grace)
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
