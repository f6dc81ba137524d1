"""Work on data files before training: check, measure, look at and fetch them."""
