"""A compiled module as a folder: `export` writes it, `load` runs it in a process without a compiler."""
