"""Callbacks and loggers: what a run writes and shows."""
