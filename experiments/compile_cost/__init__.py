"""What does compiling cost: the first result, each call, and why a module is not one graph."""
