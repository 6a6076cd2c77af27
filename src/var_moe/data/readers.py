"""Reading local files and data sets of the Hugging Face Hub as documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from var_moe.data.columns import HEAD_ROWS, find_column, needed, row_text, table_texts
from var_moe.data.documents import SHARES, SPLITS, TextColumn, TextDocument, TextSplit, share_of
from var_moe.errors import UsageError, one_line
from var_moe.hub import cache_only, datasets_offline

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
PACK_CHARACTERS = 2_000  # about 512 tokens, without asking a tokenizer

# The one documented alias: the name alone stands for wikitext-2-raw-v1.
WIKITEXT_REPO, WIKITEXT_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"

_KINDS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_HASHED = "split by a hash of each document, 40/25/15/20"

# The Hub's split that each of ours is taken from: the first that exists. Where several of ours
# are taken from the same one, a hash divides its documents among them.
_TRAIN, _VALIDATION, _TEST = ("train",), ("validation", "valid", "dev"), ("test",)
_ORIGINS = {
    "calibration": ("calibration", *_TRAIN, *_VALIDATION, *_TEST),
    "validation": (*_VALIDATION, *_TRAIN, *_TEST),
    "certify": ("certify", *_VALIDATION, *_TRAIN, *_TEST),
    "test": (*_TEST, *_VALIDATION, *_TRAIN),
}


# -- local files -----------------------------------------------------------------------------


def exists(dataset: str) -> bool:
    """Whether a path of this name exists; False for what cannot be one (too long, ~nobody)."""
    try:
        return Path(dataset).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def looks_local(dataset: str) -> bool:
    """Whether a name is a path: it exists, or no Hub name is written like it."""
    written = dataset.startswith(("/", "./", "../", "~")) or dataset.lower().endswith(SUFFIXES)
    return written or dataset.partition(":")[0].count("/") > 1 or exists(dataset)


def check_local(dataset: str) -> Path:
    """The path of a local data set; one that is not there, or no `SUFFIXES`, is a UsageError."""
    if not exists(dataset):
        raise UsageError(f"{dataset}: no such file; expected a {_KINDS} file or a folder of them")
    path = Path(dataset).expanduser()
    if not path.is_dir() and path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{dataset}: expected a file ending in {_KINDS}")
    return path


def local_split(dataset: str, split: str, column: str | None = None) -> TextSplit:
    """A split of a local file or folder; ``all`` is the whole of a file.

    A folder has one file per split. A single file is divided by a hash of each document.
    """
    path = check_local(dataset)
    folder = path.is_dir()
    path = _file_of(path, dataset, split) if folder else path
    documents, independent = read_file(path, column)
    note = f"from {path.name}" if folder else "the whole file"
    if not folder and split != "all":
        note, whole = _HASHED, len(documents)
        documents = [one for one in documents if share_of(one.text, SPLITS) == split]
        if not documents:
            raise UsageError(
                f"{dataset}: none of its {whole} documents falls to split {split!r} "
                f"({_HASHED}); give more documents, or a folder with a file per split"
            )
    return TextSplit(
        dataset=dataset,
        split=split,
        documents=tuple(documents),
        independent=independent,
        note=note if independent else f"{note}; paragraphs packed, not independent",
    )


def _file_of(folder: Path, dataset: str, split: str) -> Path:
    """The one file of a folder that holds the split."""
    if split == "all":
        raise UsageError(f"{dataset}: a folder has no split 'all'; choose of {', '.join(SPLITS)}")
    names = [f"{split}{suffix}" for suffix in SUFFIXES]
    present = [name for name in names if (folder / name).is_file()]
    if not present:
        expected = ", ".join(names)
        raise UsageError(f"{dataset}: no file for split {split!r}; expected one of {expected}")
    if len(present) > 1:
        both = " and ".join(present)
        raise UsageError(f"{dataset}: {both} are both there; keep one file for split {split!r}")
    return folder / present[0]


def read_file(path: Path, column: str | None = None) -> tuple[list[TextDocument], bool]:
    """A file's documents, and whether they are independent.

    Each row of a table (.jsonl, .json, .parquet) is a document; ``column`` names its text. Each
    part of a .txt file between form feeds is a document; without form feeds, paragraphs are
    packed to about 512 tokens, which are not independent. Empty documents are dropped; ids count
    them.

    Raises:
        UsageError: the file cannot be read as what its suffix says, or holds no text.
    """
    suffix, texts, independent, taken = path.suffix.lower(), [], True, None
    try:
        if suffix == ".txt":
            if column is not None:
                raise UsageError(f"{path}: a .txt file has no columns; leave out {column!r}")
            whole = path.read_text(encoding="utf-8-sig")
            texts = whole.split("\f")
            independent = sum(bool(part.strip()) for part in texts) > 1
            if not independent:
                texts = packed(whole.replace("\f", "\n\n"))
        elif suffix == ".parquet":
            texts, taken = _read_parquet(path, column)
        else:
            texts, taken = _read_json(path, column)
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text; convert it first") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    documents = [
        TextDocument(f"{path.name}:{number}", path.stem, text, column=taken)
        for number, text in enumerate(texts)
        if text.strip()
    ]
    if not documents:
        raise UsageError(f"{path}: holds no text; expected at least one non-empty document")
    return documents, independent


def packed(text: str) -> list[str]:
    """Paragraphs, joined in order up to `PACK_CHARACTERS`."""
    documents: list[str] = []
    current = ""
    for paragraph in _BLANK_LINES.split(text.strip("\n")):
        for piece in _pieces(paragraph):
            if current and len(current) + len(piece) > PACK_CHARACTERS:
                documents.append(current)
                current = ""
            current = f"{current}\n\n{piece}" if current else piece
    return [*documents, current]


def _pieces(paragraph: str) -> Iterator[str]:
    """A paragraph, cut at line ends, else at spaces, where it is longer than a document."""
    while len(paragraph) > PACK_CHARACTERS:
        cut = max(paragraph.rfind("\n", 1, PACK_CHARACTERS), 0)
        cut = cut or max(paragraph.rfind(" ", 1, PACK_CHARACTERS), 0) or PACK_CHARACTERS
        yield paragraph[:cut]
        paragraph = paragraph[cut:].lstrip("\n ")
    yield paragraph


# Not datasets.load_dataset("json"): it makes a date of a text that reads like one, names no
# line of the file, and takes most of a second to import.
def _read_json(path: Path, asked: str | None) -> tuple[list[str], TextColumn | None]:
    """The texts of JSON rows, and their column."""
    rows = _json_rows(path)
    head = list(islice(rows, HEAD_ROWS))
    if not head:
        return [], None
    names = list(dict.fromkeys(name for _, row in head for name in row))
    column = find_column(names, [row for _, row in head], str(path), asked=asked)
    return [row_text(row, column, where) for where, row in chain(head, rows)], column


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with its place: one to a line, or the items of a .json file's one list."""
    with path.open(encoding="utf-8-sig") as file:
        whole = file.read() if path.suffix.lower() == ".json" else ""
        if whole.lstrip().startswith("["):
            items = _parsed(whole, str(path))
            rows = ((f"{path}, row {at}", item) for at, item in enumerate(items))
        else:
            # Not splitlines(): a JSON string may hold U+2028 and its like as they are.
            lines = enumerate(whole.split("\n") if whole else file, start=1)
            named = ((f"{path}, line {at}", line) for at, line in lines if line.strip())
            rows = ((where, _parsed(line, where)) for where, line in named)
        for where, row in rows:
            if not isinstance(row, dict):
                raise UsageError(f"{where}: expected a JSON object, one to a line")
            yield where, row


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error})") from None


def _read_parquet(path: Path, asked: str | None) -> tuple[list[str], TextColumn]:
    """The texts of a parquet file, read in batches of the columns it needs, and their column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            head = next(file.iter_batches(HEAD_ROWS), None)
            first = [] if head is None else head.to_pylist()
            column = find_column(file.schema_arrow.names, first, str(path), asked=asked)
            batches = file.iter_batches(columns=needed(column))
            rows = (row for batch in batches for row in batch.to_pylist())
            texts = [row_text(row, column, f"{path}, row {at}") for at, row in enumerate(rows)]
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path}: not a readable parquet file ({one_line(error)})") from None
    return texts, column


# -- the Hub ---------------------------------------------------------------------------------


def hub_name(dataset: str) -> tuple[str, str | None]:
    """The Hub's repository and configuration of ``wikitext`` or ``name[:config]``."""
    name, _, config = dataset.partition(":")
    if name == "wikitext":
        return WIKITEXT_REPO, config or WIKITEXT_CONFIG
    return name, config or None


def check_hub(dataset: str) -> bool:
    """Whether only the local cache can serve a Hub data set; out of reach is a UsageError."""
    return cache_only("dataset", dataset, repo=hub_name(dataset)[0])


def hub_split(dataset: str, split: str, column: str | None = None) -> TextSplit:
    """A split of a Hub data set.

    Its train split calibrates. Its validation split is divided between validation and certify by
    a hash of each document, 25/15. Its test split is the test. A split that it lacks is taken
    from one that it has, in the proportion 40/25/15/20. Any other of its own splits, by name, is
    taken whole, and so is everything as ``all``.

    Raises:
        UsageError: out of reach, no such split, no text column.
    """
    repo, config = hub_name(dataset)
    loaded = _load_hub(dataset, repo, config)
    origins, sharing = _origins(dataset, split, [str(name) for name in loaded])
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


def _origins(dataset: str, split: str, have: Sequence[str]) -> tuple[list[str], list[str]]:
    """The Hub's splits to read, and those of ours that share them."""
    if split == "all":
        return list(have), []
    if split in SPLITS:
        only = have[0] if len(have) == 1 else None  # whatever its name, it is like a single file
        origin = {ours: next((n for n in _ORIGINS[ours] if n in have), only) for ours in SPLITS}
        chosen = origin[split]
        if chosen is not None:
            return [chosen], [ours for ours in SPLITS if origin[ours] == chosen]
    elif split in have:
        return [split], []
    known = ", ".join(have)
    raise UsageError(
        f"split {split!r}: dataset {dataset!r} has {known}; expected one of these"
        + ("" if split in SPLITS else f", or of {', '.join(SPLITS)}")
    )


def _load_hub(dataset: str, repo: str, config: str | None) -> Any:
    """The data set by the Hub's splits; from the cache alone where offline."""
    cached = check_hub(dataset)  # before the import of a library that is slow to import
    import datasets

    try:
        with datasets_offline(cached):
            return datasets.load_dataset(repo, config)
    except Exception as error:
        raise UsageError(f"dataset {dataset!r}: cannot be loaded ({one_line(error)})") from None


def articles(lines: Iterable[str]) -> list[str]:
    """wikitext's lines as articles: each starts at a level-1 heading `` = Title = ``."""
    grouped: list[list[str]] = []
    for line in lines:
        words = line.strip()
        heading = words.startswith("= ") and words.endswith(" =") and not words.startswith("= =")
        if heading or not grouped:
            grouped.append([])
        grouped[-1].append(line)
    return ["".join(article) for article in grouped]
