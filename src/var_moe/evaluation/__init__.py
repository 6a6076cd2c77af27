"""Evaluation: text, per-document losses, throughput."""
