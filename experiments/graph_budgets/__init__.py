"""How much of what CUDA graphs compute is padding, with our budgets and with powers of two?"""
