"""Triton kernels: one file per operation, installed as `fam_ext.kernels`."""
