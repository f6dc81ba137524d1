"""The invented world behind MiniGPT's bundled sample data, one file per kind of data."""
