"""Who runs the pairs that are left."""
