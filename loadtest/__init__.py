"""Measures a running onebase, and its peers beside it."""
