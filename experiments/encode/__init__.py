"""Is the compiled encoder right, one graph, and how fast? The main job encodes a photograph."""
