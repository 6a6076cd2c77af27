"""Rows of made-up results folders."""

from __future__ import annotations


def skip(share):
    """Random skipping: what stands for any configuration where losses are made up."""
    return {"policy": "random_skip", "settings": {"share": share}}


def point(share, degradation=None):
    """A row of a front."""
    value = 0.04 * share if degradation is None else degradation
    return {"config": skip(share), "degradation": value}
