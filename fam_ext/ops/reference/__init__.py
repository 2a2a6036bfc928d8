"""Plain-PyTorch implementations: the fallback, the oracle of the tests and the baseline of the benchmarks."""
