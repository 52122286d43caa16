"""Is the compiled encoder right, one graph, and how fast? The main job: a photograph through an encoder."""
