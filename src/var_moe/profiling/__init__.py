"""Profiling: streaming statistics of a model's routing on calibration text."""
