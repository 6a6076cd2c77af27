"""Pictures and pages from saved results; nothing here loads a model."""
