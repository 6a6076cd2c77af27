"""Phase 2: Evaluate VAR: ``var-moe evaluate``, by default of the three presets.

See ``--help``.
"""

import sys

try:
    from var_moe.cli import main
except ModuleNotFoundError as error:
    if error.name != "var_moe":
        raise
    sys.exit("error: var_moe is not installed for this Python: pip install -e . (or make tune)")

PRESETS = ("conservative", "balanced", "aggressive")

if __name__ == "__main__":
    words = sys.argv[1:]
    if not any(word.startswith(("--config", "--preset", "--policy")) for word in words):
        words = [*(part for name in PRESETS for part in ("--preset", name)), *words]
    if not any(word.startswith("--output") for word in words):
        words = ["--output", "results/phase2", *words]
    sys.exit(main(["evaluate", *words]))
