"""Speed that the road does not need: kernels and compiled layers beside the reference."""
