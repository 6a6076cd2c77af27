"""Phase 3: Hyperparameter Optimization: ``var-moe tune``, with the documented defaults.

Those are the bayesian method, and a grid that runs the model for each of its points; ``var-moe
tune`` itself searches by replay unless told otherwise. See ``--help``.
"""

import sys

try:
    from var_moe.cli import main
except ModuleNotFoundError as error:
    if error.name != "var_moe":
        raise
    sys.exit("error: var_moe is not installed for this Python: pip install -e . (or make tune)")

if __name__ == "__main__":
    words = sys.argv[1:]
    if not any(word.startswith(("--method", "--validate", "--from")) for word in words):
        words = ["--method", "bayesian", *words]
    sys.exit(main(["tune", "--exhaustive", *words]))
