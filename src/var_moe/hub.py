"""What of the Hugging Face Hub can be used: over the network, or from the local cache.

Whether the Hub answers is asked once, quickly, before a library waits for minutes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from var_moe.errors import UsageError

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


def is_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def cache_only(kind: str, name: str, *, repo: str) -> bool:
    """Whether the local cache is all there is: True for cached and out of reach.

    Nothing heavy is imported, so that a refusal comes within five seconds.

    Args:
        kind: ``"model"`` or ``"dataset"``.
        name: what the user asked for, for the message.
        repo: the Hub's id.

    Raises:
        UsageError: no Hub id can be written like this, or it is neither cached nor in reach.
    """
    if not is_id(repo):
        raise UsageError(
            f"{kind} {name!r}: no such file or folder, and no name that the Hub could have"
        )
    if reachable():
        return False
    if in_cache(kind, repo):
        return True
    why = "HF_HUB_OFFLINE is set" if offline() else f"no answer within {PROBE_SECONDS:g} s"
    how = f"download it (hf download {repo})" if kind == "model" else "load it once"
    raise UsageError(
        f"{kind} {name!r}: neither a local path nor in the local Hub cache, and the Hub is out of "
        f"reach ({why}); give a local path, or {how} where there is a network"
    )


def in_cache(kind: str, repo: str) -> bool:
    """Whether the local cache holds enough of it to try without a network."""
    if kind == "model":
        return cached_folder(repo) is not None
    # The datasets library finds offline what it has prepared, not what was downloaded. It
    # writes the name in snake case; comparing without case and _ spares its slow import.
    wanted = _plain(repo.replace("/", "___"))
    places = _datasets_cache().glob("*/*/*/*")
    return any(place.is_dir() and _plain(place.parts[-4]) == wanted for place in places)


def cached_folder(repo: str) -> Path | None:
    """Where the local cache holds a Hub model, or an adapter; its name is the commit."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "adapter_config.json"):
        found = try_to_load_from_cache(repo, file)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _datasets_cache() -> Path:
    from huggingface_hub import constants

    if "datasets" in sys.modules:
        return Path(sys.modules["datasets"].config.HF_DATASETS_CACHE)
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")


@contextlib.contextmanager
def datasets_offline(wanted: bool) -> Iterator[None]:
    """Let the datasets library use its cache at once.

    It has no argument for that, and retries for half a minute before it looks there.
    """
    if not wanted:
        yield
        return
    import datasets
    from huggingface_hub import constants

    places: tuple[Any, ...] = (constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
