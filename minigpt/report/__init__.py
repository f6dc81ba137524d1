"""A report on runs, as HTML and Markdown."""
