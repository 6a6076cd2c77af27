"""Routing policies: pure tensor maths over the router's decisions. Imports torch alone."""
