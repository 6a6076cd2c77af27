"""Which column of a table holds the text, and its rows: texts, chats or token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from var_moe.data.documents import TextColumn
from var_moe.errors import UsageError

HEAD_ROWS = 1_000  # rows that decide what a column holds
_NAME_IT = "name the one with --text_column (in Python: text_column=, or Dataset.select_columns)"

_ROLES = {"human": "user", "gpt": "assistant"}  # of from/value; other names are kept
_KNOWN_ROLES = ("user", "assistant", "system", "tool")
_MOST_IDS = 2**31  # far above any vocabulary, and within int64
_EXPECTED = {"text": "a string", "chat": "a chat", "ids": "token ids"}
_MISSING = object()


def find_column(
    names: Sequence[str],
    head: Sequence[Mapping[str, Any]],
    where: str,
    *,
    asked: str | None = None,
) -> TextColumn:
    """The column that holds the text.

    It is the one asked for; else ``text``; else the chats under ``messages`` or
    ``conversations``; else the only column; else the token ids under ``input_ids``.

    ``names`` are all columns, ``head`` the first rows, ``where`` names the table in messages.

    Raises:
        UsageError: no such column, or of a kind that is no text; names the columns.
    """
    have = ", ".join(map(str, names)) or "none"
    if asked is not None and asked not in names:
        raise UsageError(f"{where}: no column {asked!r}; it has {have}")
    only = list(names) if len(names) == 1 else []
    wanted = [asked] if asked else ["text", "messages", "conversations", *only, "input_ids"]
    name = next((name for name in wanted if name in names), None)
    if name is None:
        raise UsageError(f"{where}: no column 'text'; it has {have}; {_NAME_IT}")
    values = (_plain(row.get(name)) for row in head)
    first = next((value for value in values if value not in (None, [])), "")
    kind = _kind(first)
    if kind is None:
        raise UsageError(
            f"{where}: expected strings in column {name!r} (or chats, or token ids), found "
            f"{type(first).__name__}"
        )
    return TextColumn(name, kind, tuple(other for other in names if other != name))


def needed(column: TextColumn) -> list[str]:
    """The columns to read: token ids come with their mask, where there is one."""
    mask = [name for name in ("attention_mask",) if name in column.others and column.kind == "ids"]
    return [column.name, *mask]


def row_text(row: Mapping[str, Any], column: TextColumn, where: str) -> str:
    """A row's text, or its chat or token ids as canonical JSON; null gives the empty text.

    Raises:
        UsageError: the row holds something else; names it by ``where``.
    """
    value = _plain(row.get(column.name, _MISSING))
    if value is None:
        return ""
    if _kind(value) != column.kind and not (value == [] and column.kind != "text"):
        what = _EXPECTED[column.kind]
        raise UsageError(f"{where}: expected {what} in field {column.name!r}")
    if column.kind == "ids":
        text = _ids_text(value, _plain(row.get("attention_mask")), where)
    elif column.kind == "chat":
        messages = [_message(message, where) for message in value]
        text = json.dumps(messages, ensure_ascii=False, sort_keys=True) if messages else ""
    else:
        text = value
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can escape half a character
        raise UsageError(f"{where}: {column.name!r} holds a lone surrogate") from None
    return text


def table_texts(rows: Any, where: str, asked: str | None = None) -> tuple[list[str], TextColumn]:
    """The texts of a datasets.Dataset, and the column that holds them."""
    names = rows.column_names
    known = asked or "text"
    head = rows.select_columns([known]) if known in names else rows
    column = find_column(names, list(islice(head, HEAD_ROWS)), where, asked=asked)
    read = rows.select_columns(needed(column))
    return [row_text(row, column, f"{where}, row {at}") for at, row in enumerate(read)], column


def _ids_text(ids: list[int], mask: list[int] | None, where: str) -> str:
    wrong = [token for token in ids if not 0 <= token < _MOST_IDS]
    if wrong:
        raise UsageError(f"{where}: expected token ids from 0, got {wrong[0]}")
    if mask is not None:
        if len(mask) != len(ids):
            raise UsageError(f"{where}: {len(ids)} token ids, and a mask of {len(mask)}")
        ids = [token for token, kept in zip(ids, mask, strict=True) if kept]
    return json.dumps(ids) if ids else ""


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message as chat templates take it: ``role`` and ``content``."""
    if "role" in message:
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            found = type(content).__name__
            raise UsageError(
                f"{where}: the content of a message of {message['role']!r} is {found}; expected "
                "text alone"
            )
        # A parquet file has null for what a message lacks.
        given = {name: value for name, value in message.items() if value is not None}
        return {**given, "content": content}
    role = _ROLES.get(message["from"], message["from"])
    if role not in _KNOWN_ROLES:
        known = ", ".join([*_ROLES, *_KNOWN_ROLES])
        raise UsageError(f"{where}: a message from {role!r}; expected one of {known}")
    return {"role": role, "content": message["value"]}


def _plain(value: Any) -> Any:
    """Tensors, arrays and tuples as lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _kind(value: Any) -> str | None:
    """``text``, ``chat`` or ``ids``; None for anything else."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(item, Mapping) and _is_message(item) for item in value):
        return "chat"
    return "ids" if all(type(item) is int for item in value) else None


def _is_message(item: Mapping[str, Any]) -> bool:
    if isinstance(item.get("role"), str):
        return "content" in item or "tool_calls" in item
    return isinstance(item.get("from"), str) and isinstance(item.get("value"), str)
