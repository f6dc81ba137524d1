"""HTML and Markdown reports: pages that need nothing but a browser."""
