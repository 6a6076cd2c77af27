"""Whether the Hub can be reached: asked once, quickly, before a library waits for minutes."""

from __future__ import annotations

import os
import threading
from functools import cache

PROBE_SECONDS = 3.0


@cache
def reachable() -> bool:
    """Whether the Hub answers a request within `PROBE_SECONDS`, through the usual proxies."""
    return not offline() and answers(PROBE_SECONDS)


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids asking."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_HUB_OFFLINE") == "1"


def answers(seconds: float) -> bool:
    """Whether the Hub answers a request within so many seconds."""
    from huggingface_hub import constants

    answered = threading.Event()

    def ask() -> None:
        from huggingface_hub import get_session

        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
        except Exception:
            return
        answered.set()

    # A thread, because name resolution has a timeout of its own that can't be set.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()
