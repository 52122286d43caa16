"""Vision encoders built on vit_kernels, and the compile scaffold that keeps them one graph."""
