"""``var-moe lm-eval``: the LM Evaluation Harness, with ``--model var-moe``."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter


def lm_eval(*words: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Run the LM Evaluation Harness with the model `var-moe` known to it.

    All words go on to `lm_eval` as they are, as in `var-moe lm-eval --model var-moe --model_args
    pretrained=demo,var_config=results/phase3/export --tasks arc_easy`.

    Args:
        words: those of `lm_eval`; `var-moe lm-eval --help` shows them.
    """
    from var_moe.extras import require

    require("lm_eval")
    from lm_eval.__main__ import cli_evaluate

    import var_moe.lm_eval  # noqa: F401, which registers the model

    before = sys.argv
    sys.argv = ["lm-eval", *words]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
