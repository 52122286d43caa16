"""What does a model predict for kernels that others measured, how far off is it, and what would ours take?"""
