"""Whether the Hub can be reached: asked once, quickly, before a library waits for minutes."""

from __future__ import annotations

import os
import threading
from functools import cache

from var_moe.errors import UsageError

PROBE_SECONDS = 3.0


def require_reachable(kind: str, name: str, *, repo: str) -> None:
    """Refuse what is neither in the local cache nor within reach, in one line.

    Args:
        kind: ``"model"`` or ``"dataset"``.
        name: what the user asked for, for the message.
        repo: the Hub's id.

    Raises:
        UsageError: it is not cached and the Hub does not answer, or it is offline by setting.
    """
    if in_cache(kind, repo) or reachable():
        return
    raise UsageError(
        f"{kind} {name!r}: neither a local path nor in the local Hub cache, and the Hugging Face "
        f"Hub does not answer within {PROBE_SECONDS:g} s; give a local path, or download it "
        f"where there is a network (hf download {repo}"
        + (" --repo-type dataset)" if kind == "dataset" else ")")
    )


def in_cache(kind: str, repo: str) -> bool:
    """Whether any revision of a repository lies in the local Hub cache."""
    from pathlib import Path

    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(folder.iterdir())


@cache
def reachable() -> bool:
    """Whether the Hub answers a request within `PROBE_SECONDS`, through the usual proxies."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    answered = threading.Event()

    def ask() -> None:
        from huggingface_hub import get_session

        try:
            get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
        except Exception:
            return
        answered.set()

    # A thread, because name resolution has a timeout of its own that can't be set.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()
