"""What a model can do, in numbers that bear comparison: likelihoods, exams, generation, taste."""
