"""Where an exported configuration lies: a local folder, or a snapshot of one on the Hub."""

from __future__ import annotations

from pathlib import Path

from var_moe import hub
from var_moe.errors import UsageError, one_line

HEAD_FILE, PARTS_FILE, CARD_FILE = "var_moe.json", "var_moe.safetensors", "README.md"


def locate(source: str | Path) -> Path:
    """The folder that is meant: this one, or the Hub's, which is fetched where it is not cached.

    Args:
        source: a folder that `var-moe export` wrote, or a Hub id (owner/name).

    Raises:
        UsageError: there is neither; says which of both was looked for.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name = str(source)
    if isinstance(source, Path) or not _could_be_hub_id(name):
        raise UsageError(
            f"{name}: no such folder; expected one that `var-moe export` wrote, or a Hub id as "
            "owner/name"
        )
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    reachable = hub.reachable()
    if not reachable and not isinstance(try_to_load_from_cache(name, HEAD_FILE), str):
        raise UsageError(
            f"{name}: no such folder, not in the local Hub cache, and the Hugging Face Hub does "
            "not answer; give a folder that `var-moe export` wrote"
        )
    try:
        wanted = [HEAD_FILE, PARTS_FILE, CARD_FILE]
        found = snapshot_download(
            repo_id=name, allow_patterns=wanted, local_files_only=not reachable
        )
    except Exception as error:  # the library's own errors have no common parent
        raise UsageError(f"{name}: cannot be fetched from the Hub ({one_line(error)})") from None
    return Path(found)


def _could_be_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
