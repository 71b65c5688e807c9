"""Deterministic generators for the adapters' training and held-out examples."""
