"""Every op against its eager form, torch.compile and installed peers: pytest experiments/kernels/microbenchmarks."""
