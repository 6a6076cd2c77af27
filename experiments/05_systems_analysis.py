"""Phase 5: Systems Analysis: ``var-moe analyze``. See ``--help``."""

import sys

try:
    from var_moe.cli import main
except ModuleNotFoundError as error:
    if error.name != "var_moe":
        raise
    sys.exit("error: var_moe is not installed for this Python: pip install -e . (or make tune)")

if __name__ == "__main__":
    sys.exit(main(["analyze", *sys.argv[1:]]))
