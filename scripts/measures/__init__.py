"""What docs/results.md measures of texts: pure functions of what a model wrote."""
