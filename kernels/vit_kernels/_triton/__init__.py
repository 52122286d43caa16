"""Triton kernels and their launchers; imported by the op modules at the first launch only."""
