"""Models: loading them, what is refused, and where their experts and routers are."""
