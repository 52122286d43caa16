"""What does compiling cost, until the first result and in each call, and why is a module not one graph?"""
