"""The one inference path: generate, predict, exams and the samples logged in training."""
