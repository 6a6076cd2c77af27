"""What can be wrong with token ids: beyond the embedding's rows, or with two start tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from var_moe.errors import UsageError

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument

_LOG = logging.getLogger(__name__)


def check_documents(
    documents: Sequence[EncodedDocument], model: Any, tokenizer: Any, where: str
) -> str:
    """Refuse what the model can't embed; return, and log, a note on what it may not be meant for.

    Raises:
        UsageError: as `check_ids`.
    """
    for document in documents:
        check_ids(document.ids, model, tokenizer, where)
    start = getattr(tokenizer, "bos_token_id", None)
    twice = sum(
        start is not None and bool((document.ids[:2] == start).all()) for document in documents
    )
    if not twice:
        return ""
    note = (
        f"{twice} of {len(documents)} documents begin with the start token "
        f"{tokenizer.bos_token!r} twice, which changes perplexity: leave it out of the text"
    )
    _LOG.warning("%s: %s", where, note)
    return note


def check_ids(ids: Any, model: Any, tokenizer: Any, where: str) -> None:
    """Refuse ids that the model has no embedding of, by what really occurs.

    Tokenizers of released models often have fewer or more entries than the embedding has rows.

    Raises:
        UsageError: names the token, its id and both sizes.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    highest = int(np.max(ids, initial=-1))
    if highest < rows:
        return
    token = tokenizer.convert_ids_to_tokens(highest) if highest < len(tokenizer) else None
    named = f"token {token!r} has id {highest}" if token else f"there is a token id {highest}"
    raise UsageError(
        f"{where}: {named}, and the model's embedding has {rows} rows (the tokenizer has "
        f"{len(tokenizer)} tokens): use the model's own tokenizer, or resize_token_embeddings"
    )
