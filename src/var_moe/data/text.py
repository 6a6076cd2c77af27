"""Loading the text that a data set's name stands for: the demo, files, the Hub, or several."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from var_moe.data.documents import SPLITS, TextDocument, TextSplit, in_turn
from var_moe.data.readers import check_hub, check_local, hub_split, local_split, looks_local
from var_moe.errors import UsageError

DEMO_FOLDER = Path(__file__).resolve().parents[1] / "demo" / "text"
DEMO_NAMES = ("demo", "demo-postgres", "demo-python", "demo-wordnet", "demo-kjv")

_SEPARATOR = "::"


def check_dataset(dataset: str) -> None:
    """Refuse an unknown, missing or unreachable data set at once, reading nothing.

    Commands call it first: loading the model before the text would delay a refusal by seconds.

    Raises:
        UsageError: as `load_text`, as far as it shows without reading.
    """
    for one in names_of(dataset):
        name, column = split_column(one)
        if _is_demo(name):
            _check_demo(name, column)
        elif looks_local(name):
            check_local(name)
        else:
            check_hub(name)


def load_text(dataset: str | Path, split: str, *, text_column: str | None = None) -> TextSplit:
    """Load one split of a data set.

    Args:
        dataset: ``demo``, ``demo-postgres``, ``demo-python``, ``demo-wordnet``, ``demo-kjv``;
            ``wikitext``; another Hub data set as ``name[:config]``; a .txt, .jsonl, .json or
            .parquet file; a folder with files named after the splits; or several of these as
            ``a,b,c``. ``name::column`` names the column of a table that holds the text.
        split: ``calibration``, ``validation``, ``certify`` or ``test``; ``all`` for the whole
            of a file or a Hub data set; for a Hub data set also one of its own by name.
        text_column: the same as ``name::column``, for every data set of the name.

    Raises:
        UsageError: it is missing, out of reach, of another form, or empty.
    """
    dataset = with_column(os.fspath(dataset), text_column)
    names = names_of(dataset)
    text = _load_one(dataset, split) if len(names) == 1 else _load_mixture(dataset, names, split)
    if not text.documents:
        raise UsageError(f"{dataset}: no text in split {split!r}; expected non-empty documents")
    return text


# -- names -----------------------------------------------------------------------------------


def names_of(dataset: str) -> tuple[str, ...]:
    """The data sets between a name's commas; an empty or repeated one is a UsageError."""
    names = tuple(name.strip() for name in dataset.split(","))
    if not all(names):
        raise UsageError(f"dataset {dataset!r}: expected a name, or several with commas between")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"dataset {dataset!r}: {twice!r} is given twice")
    return names


def check_robust(robust: bool, dataset: str) -> None:
    """Raise UsageError where the worst of one data set is to be judged."""
    if robust and len(names_of(dataset)) < 2:
        raise UsageError(
            f"--robust judges the worst of several data sets, and {dataset!r} is one; give "
            "--dataset a,b"
        )


def split_column(dataset: str) -> tuple[str, str | None]:
    """``name::column`` as the data set's name and the column that holds its text."""
    name, separator, column = dataset.rpartition(_SEPARATOR)
    if not separator:
        return dataset, None
    if not name or not column:
        raise UsageError(f"dataset {dataset!r}: expected a name before and a column after '::'")
    return name, column


def with_column(dataset: str, column: str | None) -> str:
    """The name with ``::column`` after each of its data sets, as result files record it."""
    if column is None:
        return dataset
    if not column or "," in column or _SEPARATOR in column:
        raise UsageError(f"text_column = {column!r}: expected a name without ',' and '::'")
    names = names_of(dataset)
    named = [name for name in names if split_column(name)[1]]
    if named:
        raise UsageError(f"dataset {named[0]!r}: it names a column already; leave text_column out")
    return ",".join(f"{name}{_SEPARATOR}{column}" for name in names)


# -- one data set, or several ----------------------------------------------------------------


def _load_one(dataset: str, split: str) -> TextSplit:
    name, column = split_column(dataset)
    if _is_demo(name):
        _check_demo(name, column)
        return _demo_split(name, split)
    if looks_local(name):
        if split not in (*SPLITS, "all"):
            raise UsageError(f"split {split!r}: expected one of {', '.join(SPLITS)} (or all)")
        text = local_split(name, split, column)
    else:
        text = hub_split(name, split, column)
    taken = text.documents[0].column if text.documents else None
    again = len(text.documents) - len({document.text for document in text.documents})
    repeated = f"{again} of {len(text.documents)} documents repeat another" if again else ""
    note = "; ".join(filter(None, [text.note, taken.note if taken else "", repeated]))
    return replace(text, dataset=dataset, note=note)


def _load_mixture(dataset: str, names: tuple[str, ...], split: str) -> TextSplit:
    """A split of several data sets, interleaved; each document's data set is noted.

    A text that an earlier data set has as well counts there alone.
    """
    seen: set[str] = set()
    parts = []
    for name in names:
        text = _load_one(name, split)
        # With the data set's name before the id: two folders may number their rows alike.
        own = tuple(
            replace(document, id=f"{name}/{document.id}", dataset=name)
            for document in text.documents
            if document.text not in seen
        )
        if not own:
            why = "no text that the others lack" if text.documents else "no text"
            raise UsageError(f"dataset {dataset!r}: {name!r} has {why} in split {split!r}")
        seen.update(document.text for document in own)
        shared = len(text.documents) - len(own)
        note = f"{text.note}; {shared} documents are of the others" if shared else text.note
        parts.append(replace(text, documents=own, note=note))
    return TextSplit(
        dataset=dataset,
        split=split,
        documents=tuple(in_turn([part.documents for part in parts])),
        independent=all(part.independent for part in parts),
        note=f"{len(parts)} data sets",
        parts=tuple(parts),
    )


# -- the demo --------------------------------------------------------------------------------


def _is_demo(dataset: str) -> bool:
    """Demo names come before paths (such a folder is ./demo), misspelt ones too."""
    written = dataset.startswith("demo-") and "/" not in dataset and not looks_local(dataset)
    return dataset in DEMO_NAMES or written


def _check_demo(dataset: str, column: str | None) -> None:
    if dataset not in DEMO_NAMES:
        raise UsageError(f"dataset {dataset!r}: expected one of {', '.join(DEMO_NAMES)}")
    if column is not None:
        raise UsageError(f"dataset {dataset!r} has no columns; leave out {column!r}")


def _demo_split(dataset: str, split: str) -> TextSplit:
    """A split of the bundled text: all of it, or one source."""
    if split not in SPLITS:
        raise UsageError(f"split {split!r}: dataset {dataset!r} has {', '.join(SPLITS)}")
    import pyarrow.parquet as pq

    source = dataset.removeprefix("demo").removeprefix("-")
    path = DEMO_FOLDER / ("kjv.parquet" if source == "kjv" else f"{split}.parquet")
    if not path.is_file():
        raise UsageError(
            f"dataset {dataset!r}: the package lacks its text, demo/text/{path.name}; "
            "install it again"
        )
    rows = pq.read_table(path).to_pylist()
    if source:
        column, wanted = ("split", split) if source == "kjv" else ("source", source)
        rows = [row for row in rows if row[column] == wanted]
    documents = tuple(TextDocument(row["id"], row["source"], row["text"]) for row in rows)
    return TextSplit(dataset=dataset, split=split, documents=documents, note="bundled demo")
