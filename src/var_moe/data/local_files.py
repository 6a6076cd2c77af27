"""Local text: a .txt, .jsonl or .parquet file, or a folder with one file per split."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from var_moe.data.columns import HEAD_ROWS, exists, find_column, needed, row_text
from var_moe.data.documents import TextColumn, TextDocument, TextSplit
from var_moe.data.splitting import SPLITS, split_of
from var_moe.errors import UsageError

SUFFIXES = (".txt", ".jsonl", ".parquet")
PACK_CHARACTERS = 2_000  # about 512 tokens, without asking a tokenizer

_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_HASHED = "split by a hash of each document, 40/25/15/20"
_PACKED = "paragraphs packed, not independent"


def looks_local(dataset: str) -> bool:
    """Whether a name means a path: it exists, or no Hub name is written like it."""
    written = dataset.startswith(("/", "./", "../", "~")) or dataset.lower().endswith(SUFFIXES)
    return written or dataset.partition(":")[0].count("/") > 1 or exists(dataset)


def check_local(dataset: str) -> Path:
    """The path of a local data set, after the checks that need no reading.

    Raises:
        UsageError: no such file or folder, or its name ends in none of `SUFFIXES`.
    """
    kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    if not exists(dataset):
        raise UsageError(f"{dataset}: no such file; expected a {kinds} file or a folder of them")
    path = Path(dataset).expanduser()
    if not path.is_dir() and path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{dataset}: expected a file ending in {kinds}")
    if not path.is_dir() and not path.is_file():  # reading a pipe would wait, and only once
        raise UsageError(f"{dataset}: is no regular file; write the text to a {kinds} file first")
    return path


def local_split(dataset: str, split: str, column: str | None = None) -> TextSplit:
    """A split of a local file or folder; ``all`` takes the whole of a file.

    ``column`` names the one that holds the text.
    """
    path = check_local(dataset)
    if path.is_dir():
        path = _file_of(path, dataset, split)
        documents, independent = read_file(path, column)
        notes = [f"from {path.name}"]
    else:
        documents, independent = read_file(path, column)
        notes = ["the whole file" if split == "all" else _HASHED]
        if split != "all":
            whole = len(documents)
            documents = [document for document in documents if split_of(document.text) == split]
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
        note="; ".join(notes if independent else [*notes, _PACKED]),
    )


def _file_of(folder: Path, dataset: str, split: str) -> Path:
    """The folder's file for a split; two would leave open which one counts."""
    if split == "all":
        raise UsageError(f"{dataset}: a folder has no split 'all'; choose of {', '.join(SPLITS)}")
    found = [
        folder / f"{split}{suffix}"
        for suffix in SUFFIXES
        if (folder / f"{split}{suffix}").is_file()
    ]
    if not found:
        names = ", ".join(f"{split}{suffix}" for suffix in SUFFIXES)
        raise UsageError(f"{dataset}: no file for split {split!r}; expected one of {names}")
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UsageError(f"{dataset}: {names} are both there; keep one file for split {split!r}")
    return found[0]


def read_file(path: Path, column: str | None = None) -> tuple[list[TextDocument], bool]:
    """A file's documents, and whether they are independent.

    A .jsonl or .parquet row is a document; ``column`` names its text. A .txt file's parts
    between form feeds are documents, else its paragraphs packed to about 512 tokens, which are
    not independent.
    Empty documents are dropped; a document's id keeps its place in the file.

    Raises:
        UsageError: it can't be read as what its name says, or holds no text.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    independent, taken = True, None
    if suffix == ".txt":
        if column is not None:
            raise UsageError(f"{path}: a .txt file has no columns; leave out {column!r}")
        texts, independent = _read_txt(path)
    else:
        read = _read_jsonl if suffix == ".jsonl" else _read_parquet
        texts, taken = read(path, column)
    documents = [
        TextDocument(f"{path.name}:{number}", path.stem, text, column=taken)
        for number, text in enumerate(texts)
        if text.strip()
    ]
    if not documents:
        raise UsageError(f"{path}: holds no text; expected at least one non-empty document")
    return documents, independent


def _decoded(path: Path) -> str:
    """The file's text, with line ends as \\n and without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text; convert it first") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None


def _read_txt(path: Path) -> tuple[list[str], bool]:
    text = _decoded(path)
    parts = text.split("\f")
    if sum(bool(part.strip()) for part in parts) > 1:
        return parts, True
    return packed(text.replace("\f", "\n\n")), False


def packed(text: str) -> list[str]:
    """Paragraphs, joined in order while they stay within `PACK_CHARACTERS`."""
    found: list[str] = []
    current = ""
    for paragraph in _BLANK_LINES.split(text.strip("\n")):
        for piece in _pieces(paragraph):
            if current and len(current) + len(piece) > PACK_CHARACTERS:
                found.append(current)
                current = ""
            current = f"{current}\n\n{piece}" if current else piece
    return [*found, current]


def _pieces(paragraph: str) -> Iterator[str]:
    """A paragraph, cut at line ends, else at spaces, where it is too long for one document."""
    while len(paragraph) > PACK_CHARACTERS:
        cut = max(paragraph.rfind("\n", 1, PACK_CHARACTERS), 0)
        cut = cut or max(paragraph.rfind(" ", 1, PACK_CHARACTERS), 0) or PACK_CHARACTERS
        yield paragraph[:cut]
        paragraph = paragraph[cut:].lstrip("\n ")
    yield paragraph


def _read_jsonl(path: Path, asked: str | None) -> tuple[list[str], TextColumn | None]:
    rows: dict[int, dict[str, Any]] = {}
    # Not splitlines(): a JSON string may hold U+2028 and its like as they are.
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {number}: expected a JSON object, one to a line")
        rows[number] = row
    if not rows:
        return [], None
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    column = find_column(names, list(rows.values())[:HEAD_ROWS], str(path), asked=asked)
    lines = rows.items()
    return [row_text(row, column, f"{path}, line {number}") for number, row in lines], column


def _read_parquet(path: Path, asked: str | None) -> tuple[list[str], TextColumn | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        head = next(file.iter_batches(HEAD_ROWS), None)
        column = find_column(
            file.schema_arrow.names,
            [] if head is None else head.to_pylist(),
            str(path),
            asked=asked,
        )
        rows = pq.read_table(path, columns=needed(column)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path}: not a readable parquet file ({first})") from None
    return [row_text(row, column, f"{path}, row {at}") for at, row in enumerate(rows)], column
