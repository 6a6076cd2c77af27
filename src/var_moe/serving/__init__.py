"""A configuration with all that it needs as one folder: written, found and read."""
