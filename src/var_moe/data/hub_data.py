"""A data set of the Hugging Face Hub as documents, by its own splits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from var_moe.data.columns import table_texts
from var_moe.data.documents import TextDocument, TextSplit
from var_moe.data.splitting import SHARES, SPLITS, share_of
from var_moe.errors import UsageError

# The one documented alias: the name alone stands for wikitext-2-raw-v1.
WIKITEXT_REPO, WIKITEXT_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"

# Which of the Hub's splits each of ours comes from: the first that is there. Where several of
# ours come from the same one, a hash shares its documents out among them.
_TRAIN, _VALIDATION, _TEST = ("train",), ("validation", "valid", "dev"), ("test",)
_ORIGINS = {
    "calibration": ("calibration", *_TRAIN, *_VALIDATION, *_TEST),
    "validation": (*_VALIDATION, *_TRAIN, *_TEST),
    "certify": ("certify", *_VALIDATION, *_TRAIN, *_TEST),
    "test": (*_TEST, *_VALIDATION, *_TRAIN),
}


def parse(dataset: str) -> tuple[str, str | None]:
    """The Hub's repository and configuration of ``wikitext`` or ``name[:config]``."""
    name, _, config = dataset.partition(":")
    if name == "wikitext":
        return WIKITEXT_REPO, config or WIKITEXT_CONFIG
    return name, config or None


def check_hub(dataset: str) -> bool:
    """Whether only the local cache can serve it.

    Raises:
        UsageError: it is neither in the local cache nor within reach.
    """
    from var_moe.models.hub import cache_only

    return cache_only("dataset", dataset, repo=parse(dataset)[0])


def hub_split(dataset: str, split: str, column: str | None = None) -> TextSplit:
    """A split of a Hub data set.

    Its train calibrates; its validation is shared out between validation and certify by a hash
    of each document, 25/15; its test is the test. What it lacks is cut from what it has, in the
    proportion 40/25/15/20. One of the Hub's own splits by another name, such as ``train``, is
    taken whole, and so is everything as ``all``. ``column`` names the one that holds the text.

    Raises:
        UsageError: out of reach, no such split, no text column.
    """
    repo, config = parse(dataset)
    with _loaded(dataset, repo, config) as loaded:
        have = [str(name) for name in loaded]
        origins, sharing = _plan(dataset, split, have)
        documents: list[TextDocument] = []
        for origin in origins:
            texts, taken = table_texts(loaded[origin], f"dataset {dataset!r}", column)
            if repo.rpartition("/")[2] == "wikitext":
                texts = articles(texts)
            documents += [
                TextDocument(f"{origin}:{number}", dataset, text, column=taken)
                for number, text in enumerate(texts)
                if text.strip() and (len(sharing) < 2 or share_of(text, sharing) == split)
            ]
    note = f"the Hub's {' + '.join(origins)}"
    if len(sharing) > 1:
        shares = "/".join(str(SHARES[name]) for name in sharing)
        note += f", shared out to {', '.join(sharing)} by a hash of each document, {shares}"
    return TextSplit(dataset=dataset, split=split, documents=tuple(documents), note=note)


def _plan(dataset: str, split: str, have: Sequence[str]) -> tuple[list[str], list[str]]:
    """The Hub's splits to read, and those of ours that share them."""
    if split == "all":
        return list(have), []
    if split in SPLITS:
        only = have[0] if len(have) == 1 else None  # whatever its name, it is like a single file
        origin = {ours: next((n for n in _ORIGINS[ours] if n in have), only) for ours in SPLITS}
        found = origin[split]
        if found is not None:
            return [found], [ours for ours in SPLITS if origin[ours] == found]
    elif split in have:
        return [split], []
    known = ", ".join(have)
    raise UsageError(
        f"split {split!r}: dataset {dataset!r} has {known}; expected one of these"
        + ("" if split in SPLITS else f", or of {', '.join(SPLITS)}")
    )


@contextlib.contextmanager
def _loaded(dataset: str, repo: str, config: str | None) -> Iterator[Any]:
    """The data set by the Hub's splits, loaded quietly; from the cache where that is all."""
    from var_moe.models.hub import offline, one_line

    cached = check_hub(dataset)  # before the import of a library that takes seconds
    import datasets

    level = datasets.logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    if cached:
        datasets.disable_progress_bars()  # while downloading they are worth having
    try:
        with offline(cached):
            loaded = datasets.load_dataset(repo, config)
    except Exception as error:
        raise UsageError(f"dataset {dataset!r}: cannot be loaded ({one_line(error)})") from None
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
    yield loaded


def articles(lines: Iterable[str]) -> list[str]:
    """wikitext's lines as articles: each starts at a level-1 heading `` = Title = ``."""
    found: list[list[str]] = []
    for line in lines:
        words = line.strip()
        heading = words.startswith("= ") and words.endswith(" =") and not words.startswith("= =")
        if heading or not found:
            found.append([])
        found[-1].append(line)
    return ["".join(article) for article in found]
