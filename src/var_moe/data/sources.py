"""Where text comes from: the bundled demo, local files, the Hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from var_moe.data.columns import split_column
from var_moe.data.documents import TextDocument, TextSplit
from var_moe.data.hub_data import articles, check_hub, hub_split
from var_moe.data.local_files import check_local, local_split, looks_local, read_file
from var_moe.data.mixture import mixed_split, names_of
from var_moe.data.splitting import SPLITS, split_of
from var_moe.errors import UsageError

__all__ = ["articles", "check", "load", "read_file", "split_of"]

DEMO_FOLDER = Path(__file__).resolve().parents[1] / "demo" / "text"
DEMO_NAMES = ("demo", "demo-postgres", "demo-python", "demo-wordnet", "demo-kjv")


def check(dataset: str) -> None:
    """Refuse a data set that is unknown, missing or out of reach, before anything is loaded."""
    for name in names_of(dataset):
        _check_one(name)


def _check_one(dataset: str) -> None:
    name, column = split_column(dataset)
    if _is_demo(name):
        _check_demo(name, column)
    elif looks_local(name):
        check_local(name)
    else:
        check_hub(name)


def load(dataset: str, split: str) -> TextSplit:
    """One split of a data set, or of several, wherever it comes from."""
    names = names_of(dataset)
    return (
        _load_one(dataset, split)
        if len(names) == 1
        else mixed_split(dataset, names, split, _load_one)
    )


def _load_one(dataset: str, split: str) -> TextSplit:
    name, column = split_column(dataset)
    if _is_demo(name):
        _check_demo(name, column)
        return demo_split(name, split)
    if looks_local(name):
        if split not in (*SPLITS, "all"):
            raise UsageError(f"split {split!r}: expected one of {', '.join(SPLITS)} (or all)")
        found = local_split(name, split, column)
    else:
        found = hub_split(name, split, column)
    taken = found.documents[0].column if found.documents else None
    again = len(found.documents) - len({document.text for document in found.documents})
    repeated = f"{again} of {len(found.documents)} documents repeat another" if again else ""
    note = "; ".join(filter(None, [found.note, taken.note if taken else "", repeated]))
    return replace(found, dataset=dataset, note=note)


def _is_demo(dataset: str) -> bool:
    """Demo names go before paths (such a folder is ./demo); what is written like one is meant."""
    written = dataset.startswith("demo-") and "/" not in dataset and not looks_local(dataset)
    return dataset in DEMO_NAMES or written


def _check_demo(dataset: str, column: str | None = None) -> None:
    if dataset not in DEMO_NAMES:
        raise UsageError(f"dataset {dataset!r}: expected one of {', '.join(DEMO_NAMES)}")
    if column is not None:
        raise UsageError(f"dataset {dataset!r} has no columns; leave out {column!r}")


def demo_split(dataset: str, split: str) -> TextSplit:
    """A split of the bundled text: the mix, or one source.

    Raises:
        UsageError: no such demo name or split, or the package lacks its text.
    """
    _check_demo(dataset)
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
    if source == "kjv":
        rows = [row for row in rows if row["split"] == split]
    elif source:
        rows = [row for row in rows if row["source"] == source]
    documents = tuple(TextDocument(row["id"], row["source"], row["text"]) for row in rows)
    return TextSplit(dataset=dataset, split=split, documents=documents, note="bundled demo")
