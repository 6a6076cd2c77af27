"""Whether certificates hold what they promise, on resampled document losses; see `__main__`."""
