"""Inference: one engine for all verbs that answer, exams, predictions and logged samples."""
