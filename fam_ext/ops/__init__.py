"""Public operations: input checks, backend choice, fake kernels and autograd of the native ones."""
