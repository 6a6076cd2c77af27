"""``python -m var_moe.cli``."""

import sys

from var_moe.cli import main

sys.exit(main())
