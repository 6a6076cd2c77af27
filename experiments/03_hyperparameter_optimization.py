"""Phase 3: Hyperparameter Optimization. The same as ``var-moe tune``; see ``--help`` there."""

import sys

try:
    from var_moe.cli import main
except ModuleNotFoundError as error:
    if error.name != "var_moe":
        raise
    sys.exit("error: var_moe is not installed for this Python: pip install -e . (or make tune)")

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
