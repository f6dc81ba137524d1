"""MiniGPT: the shortest road from raw JSONL to a small chat model that you own."""

__version__ = "0.1.0"
