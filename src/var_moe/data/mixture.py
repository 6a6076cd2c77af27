"""Several data sets as one text, ``a,b,c``: each document knows its own, and all take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from var_moe.data.columns import exists, split_column
from var_moe.data.documents import TextDocument, TextSplit
from var_moe.errors import UsageError

Item = TypeVar("Item")


def names_of(dataset: str) -> tuple[str, ...]:
    """The data sets that a name stands for: itself, or those between its commas.

    A file or folder that exists by the whole name is one, commas or not.

    Raises:
        UsageError: a name is empty or stands there twice.
    """
    if not dataset.strip():
        raise UsageError(f"dataset {dataset!r}: expected a name")
    name, column = split_column(dataset)
    whole = "," not in (column or "") and exists(name)
    if "," not in dataset or whole:
        return (dataset,)
    names = tuple(name.strip() for name in dataset.split(","))
    if not all(names):
        raise UsageError(f"dataset {dataset!r}: expected a name before and after each comma")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"dataset {dataset!r}: {twice!r} is given twice")
    return names


def in_turn(groups: Sequence[Sequence[Item]], *, equal: bool = False) -> list[Item]:
    """Items of all groups, each group's own in their order, evenly mixed.

    Args:
        groups: the items.
        equal: take one of each group in turn, as long as it lasts. By default the first so many
            hold the groups in the proportions of the whole.
    """
    places = [
        (float(at) if equal else (at + 0.5) / len(group), number, at)
        for number, group in enumerate(groups)
        for at in range(len(group))
    ]
    return [groups[number][at] for _, number, at in sorted(places)]


def mixed_split(
    dataset: str, names: Sequence[str], split: str, load: Callable[[str, str], TextSplit]
) -> TextSplit:
    """One split of several data sets, with each document's data set noted.

    A text that an earlier data set has as well counts there alone.

    Raises:
        UsageError: a data set has no text in this split, or none that the others lack.
    """
    seen: set[str] = set()
    parts = []
    for name in names:
        found = load(name, split)
        own = [_of(document, name) for document in found.documents if document.text not in seen]
        if not own:
            why = "no text that the others lack" if found.documents else "no text"
            raise UsageError(f"dataset {dataset!r}: {name!r} has {why} in split {split!r}")
        seen.update(document.text for document in own)
        shared = len(found.documents) - len(own)
        note = f"{found.note}; {shared} documents are of the others" if shared else found.note
        parts.append(replace(found, documents=tuple(own), note=note))
    return TextSplit(
        dataset=dataset,
        split=split,
        documents=tuple(in_turn([part.documents for part in parts])),
        independent=all(part.independent for part in parts),
        note=f"{len(parts)} data sets",
        parts=tuple(parts),
    )


def _of(document: TextDocument, name: str) -> TextDocument:
    """With the data set's name in front of the id: two folders may number their rows alike."""
    return replace(document, id=f"{name}/{document.id}", dataset=name)
