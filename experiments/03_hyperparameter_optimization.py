"""Phase 3: Hyperparameter Optimization. The same as ``var-moe tune``; see ``--help`` there."""

import sys

from var_moe.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
