"""The documented import path of `var_moe.optimization`."""
