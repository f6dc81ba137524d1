"""Measures of a model: likelihoods, exams, preferences, and the health of what it writes."""
