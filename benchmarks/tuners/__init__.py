"""Search methods compared on the same reduced objective; see `__main__`."""
