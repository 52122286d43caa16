"""Tools for testing that a module is one graph, for this project's tests and for yours.

- `whole_graph`: a block compiles as so many whole graphs, without a break or a recompilation.
- `fake_cuda`: tensors on a "cuda" device without a GPU, so that the CUDA path can be traced; `install_device_guard` is
  what a process needs for that.
"""

from vit_encoder.testing.fake_cuda import fake_cuda, install_device_guard
from vit_encoder.testing.whole_graph import GraphReport, whole_graph

__all__ = ["GraphReport", "fake_cuda", "install_device_guard", "whole_graph"]
