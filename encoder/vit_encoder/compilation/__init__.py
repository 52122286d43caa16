"""Compile scaffold: one whole graph for an encoder."""
