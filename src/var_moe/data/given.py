"""Validation data as the documented API takes it: texts, a data set, or token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from var_moe.data.columns import table_texts
from var_moe.data.documents import TextDocument
from var_moe.errors import UsageError

_EXPECTED = (
    "expected a non-empty list of texts, a datasets.Dataset with a text column, or token ids"
)


def given_rows(data: Any) -> list[Any]:
    """One row per document: all of them texts, or all of them ids (S,) int64.

    Raises:
        UsageError: it is neither, or empty; names the first row that does not fit.
    """
    if hasattr(data, "tolist") and isinstance(listed := data.tolist(), list):
        if not listed or not isinstance(listed[0], str):  # an array of texts is a list of them
            return _ids(data, "validation_data")
        data = listed
    if isinstance(data, Mapping):
        return _ids(data, "validation_data")
    # A number is an array without dimensions: it has __iter__ and can't be iterated.
    listable = hasattr(data, "__iter__") and not isinstance(data, str | bytes)
    rows = list(data) if listable and not hasattr(data, "tolist") else []
    if not rows:
        raise UsageError(f"validation_data: {_EXPECTED}, got {_what(data)}")
    if isinstance(rows[0], str):
        for number, row in enumerate(rows):
            if not isinstance(row, str):
                raise UsageError(f"validation_data[{number}]: expected a text, got {_what(row)}")
        return rows
    if isinstance(rows[0], int | np.integer):  # a flat list is one document
        return _ids(rows, "validation_data")
    return [ids for i, row in enumerate(rows) for ids in _ids(row, f"validation_data[{i}]")]


def given_table(data: Any) -> list[TextDocument] | None:
    """The documents of a datasets.Dataset; None where it is none.

    Raises:
        UsageError: it has splits, or no column that is clearly the text.
    """
    columns = getattr(data, "column_names", None)
    if columns is None:
        return None
    if isinstance(columns, Mapping):  # a DatasetDict
        splits = ", ".join(map(str, columns))
        raise UsageError(f"validation_data: expected one split of the data set, of {splits}")
    texts, column = table_texts(data, "validation_data", hint="give select_columns of one of them")
    return [
        TextDocument(str(number), "given", text, column=column) for number, text in enumerate(texts)
    ]


def _ids(row: Any, where: str) -> list[np.ndarray]:
    """The documents (S,) of a 1-D or 2-D row of token ids, or of a tokenizer's output."""
    mask = None
    if isinstance(row, Mapping):
        row, mask = row.get("input_ids"), row.get("attention_mask")
        if isinstance(row, list | tuple) and row and isinstance(row[0], list | tuple):
            masks = [None] * len(row) if mask is None else list(mask)
            pairs = [{"input_ids": r, "attention_mask": m} for r, m in zip(row, masks, strict=True)]
            return [ids for pair in pairs for ids in _ids(pair, where)]
    try:
        ids = np.asarray(row.tolist() if hasattr(row, "tolist") else row)
    except (TypeError, ValueError):  # ragged, or no numbers at all
        raise UsageError(f"{where}: expected a text or token ids, got {_what(row)}") from None
    if ids.size == 0 and ids.ndim == 1:
        ids = ids.astype(np.int64)  # a document of nothing, which numpy takes for floats
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise UsageError(f"{where}: expected a text or token ids, got {_what(row)}")
    if ids.size and ids.min() < 0:
        raise UsageError(f"{where}: expected token ids from 0, got {ids.min()}")
    rows = np.atleast_2d(ids.astype(np.int64))  # (documents, S)
    if mask is None:
        return list(rows)
    kept = np.atleast_2d(np.asarray(mask.tolist() if hasattr(mask, "tolist") else mask)) != 0
    return [ids[keep] for ids, keep in zip(rows, kept, strict=True)]


def _what(value: Any) -> str:
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    return kind if shape is None else f"{kind} of shape {tuple(shape)} and {value.dtype}"
