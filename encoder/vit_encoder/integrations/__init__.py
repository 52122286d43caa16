"""Optional bridges into other engines; each imports its engine only when it is imported itself."""
