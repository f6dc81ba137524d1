"""Benchmarks: MiniGPT's own commands against the loops and libraries that people would use."""
