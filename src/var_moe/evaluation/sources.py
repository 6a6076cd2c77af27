"""Where text comes from: the bundled demo, local files, the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from var_moe.errors import UsageError
from var_moe.evaluation.text import SPLITS, TextDocument, TextSplit, text_column
from var_moe.hub import require_reachable

DEMO_FOLDER = Path(__file__).resolve().parents[1] / "demo" / "text"
DEMO_SOURCES = ("postgres", "python", "wordnet", "kjv")
SUFFIXES = (".txt", ".jsonl", ".parquet")
PACK_CHARACTERS = 2_000  # about 512 tokens

# Shares of a single file's documents, by the hash of each: the same on every machine.
SHARES = (("calibration", 0.40), ("validation", 0.25), ("certify", 0.15), ("test", 0.20))


def demo_split(dataset: str, split: str) -> TextSplit:
    """A split of the bundled text: the mix, or one source."""
    source = dataset.removeprefix("demo").removeprefix("-")
    if source and source not in DEMO_SOURCES:
        known = ", ".join(["demo", *(f"demo-{name}" for name in DEMO_SOURCES)])
        raise UsageError(f"dataset {dataset!r}: expected one of {known}")
    if split == "all":
        raise UsageError(f"dataset {dataset!r}: expected a split of {', '.join(SPLITS)}")
    import pandas as pd

    path = DEMO_FOLDER / ("kjv.parquet" if source == "kjv" else f"{split}.parquet")
    frame = pd.read_parquet(path)
    if source == "kjv":
        frame = frame[frame["split"] == split]
    elif source:
        frame = frame[frame["source"] == source]
    documents = tuple(
        TextDocument(str(row.id), str(row.source), str(row.text)) for row in frame.itertuples()
    )
    return TextSplit(dataset=dataset, split=split, documents=documents, note="bundled demo")


def looks_local(dataset: str) -> bool:
    """Whether a name means a path: it exists, or it is written like one."""
    path = Path(dataset).expanduser()
    written = dataset.startswith(("/", "./", "../", "~")) or dataset.endswith(SUFFIXES)
    return written or path.exists()


def local_split(dataset: str, split: str) -> TextSplit:
    """A split of a local file or folder."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _folder_split(path, dataset, split)
    if not path.is_file():
        raise UsageError(f"{dataset}: no such file; expected a .txt, .jsonl or .parquet file")
    documents, independent = read_file(path)
    if split != "all":
        documents = [document for document in documents if split_of(document.text) == split]
    note = "split by a hash of each document, 40/25/15/20"
    return TextSplit(
        dataset=dataset,
        split=split,
        documents=tuple(documents),
        independent=independent,
        note=note if independent else f"{note}; paragraphs packed, not independent",
    )


def _folder_split(folder: Path, dataset: str, split: str) -> TextSplit:
    for suffix in SUFFIXES:
        path = folder / f"{split}{suffix}"
        if path.is_file():
            documents, independent = read_file(path)
            return TextSplit(
                dataset=dataset,
                split=split,
                documents=tuple(documents),
                independent=independent,
                note=f"from {path.name}",
            )
    names = ", ".join(f"{split}{suffix}" for suffix in SUFFIXES)
    raise UsageError(f"{dataset}: no file for split {split!r}; expected one of {names}")


def split_of(text: str) -> str:
    """The split of a document of a single file: by its SHA-256, 40/25/15/20."""
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64
    for name, share in SHARES:
        if number < share:
            return name
        number -= share
    return SHARES[-1][0]


def read_file(path: Path) -> tuple[list[TextDocument], bool]:
    """A file's documents, and whether they are independent.

    A .jsonl or .parquet row is a document. A .txt file's parts between form feeds are
    documents, else its paragraphs packed to about 512 tokens, which are not independent.

    Raises:
        UsageError: it can't be read as what its name says, or holds no text.
    """
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UsageError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    texts, independent = readers[path.suffix](path)
    documents = [
        TextDocument(f"{path.name}:{number}", path.stem, text)
        for number, text in enumerate(texts)
        if text.strip()
    ]
    if not documents:
        raise UsageError(f"{path}: holds no text; expected at least one non-empty document")
    return documents, independent


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text; convert it first") from None


def _read_txt(path: Path) -> tuple[list[str], bool]:
    text = _decoded(path)
    if "\f" in text:
        return text.split("\f"), True
    packed: list[str] = []
    current = ""
    for paragraph in text.split("\n\n"):
        if current and len(current) + len(paragraph) > PACK_CHARACTERS:
            packed.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    return [*packed, current], False


def _read_jsonl(path: Path) -> tuple[list[str], bool]:
    texts, column = [], None
    for number, line in enumerate(_decoded(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {number}: expected a JSON object with a text field")
        if column is None:
            kinds = {name: isinstance(value, str) for name, value in row.items()}
            column = text_column(list(row), kinds, str(path))
        if not isinstance(row.get(column), str):
            raise UsageError(f"{path}, line {number}: expected a string in field {column!r}")
        texts.append(row[column])
    return texts, True


def _read_parquet(path: Path) -> tuple[list[str], bool]:
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except Exception as error:
        raise UsageError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None
    kinds = {str(name): pd.api.types.is_string_dtype(frame[name]) for name in frame.columns}
    column = text_column([str(name) for name in frame.columns], kinds, str(path))
    return [str(text) for text in frame[column].dropna()], True


# -- the Hub -------------------------------------------------------------------------------

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
_HUB_NAMES = {"calibration": ("train",), "validation": ("validation", "valid", "dev")}


def hub_split(dataset: str, split: str) -> TextSplit:
    """A split of a Hub data set; its own train calibrates.

    Certify and test share the Hub's test split by a hash of each document, 40/60; where there
    is no validation split, train is cut by hash into calibration and validation, 80/20.
    """
    wanted = WIKITEXT if dataset == "wikitext" else dataset
    name, _, config = wanted.partition(":")
    rows = _hub_rows(dataset, name, config or None)
    independent = True
    parts: list[tuple[str, Iterable[str]]] = []
    have = list(rows)
    if split == "all":
        parts = [(part, rows[part]) for part in have]
    else:
        parts = [_hub_part(dataset, rows, have, split)]
    documents: list[TextDocument] = []
    for part, texts in parts:
        whole = articles(texts) if name.endswith("wikitext") else texts
        documents += [
            TextDocument(f"{part}:{number}", dataset, text)
            for number, text in enumerate(whole)
            if text.strip() and _belongs(text, split, have)
        ]
    return TextSplit(
        dataset=dataset,
        split=split,
        documents=tuple(documents),
        independent=independent,
        note="the Hub's splits; test shared out 40/60 between certify and test",
    )


def _hub_part(
    dataset: str, rows: dict[str, Any], have: Sequence[str], split: str
) -> tuple[str, Iterable[str]]:
    names = _HUB_NAMES.get(split, ("test",))
    for part in names if split != "validation" else (*names, "train"):
        if part in have:
            return part, rows[part]
    raise UsageError(f"dataset {dataset!r}: no split for {split!r}; it has {', '.join(have)}")


def _belongs(text: str, split: str, have: Sequence[str]) -> bool:
    """Whether a document of a Hub split that two of ours share falls to ``split``."""
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64
    if split in ("certify", "test"):
        return (number < 0.4) == (split == "certify")
    if not any(name in have for name in _HUB_NAMES["validation"]):
        if split == "calibration":
            return number < 0.8
        if split == "validation":
            return number >= 0.8
    return True


def _hub_rows(dataset: str, name: str, config: str | None) -> dict[str, Any]:
    """The texts of each of the Hub's splits."""
    require_reachable("dataset", dataset, repo=name)
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, config)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"dataset {dataset!r}: cannot be loaded ({first})") from None
    found = {}
    for part, rows in loaded.items():
        kinds = {
            column: getattr(feature, "dtype", "") == "string"
            for column, feature in rows.features.items()
        }
        found[str(part)] = rows[text_column(rows.column_names, kinds, f"dataset {dataset!r}")]
    return found


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
