"""A folder a question: `python -m experiments` lists the commands."""
