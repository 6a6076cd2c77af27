"""The command line. Each command's heavy imports happen when it runs."""

from __future__ import annotations

from var_moe.cli.main import main

__all__ = ["main"]
