"""Tracing: the router's decisions on a text, recorded once and replayed for any configuration."""
