"""What the graph runner asks of an encoder: how images become the inputs of a graph, and how those are padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class GraphInputs(Protocol):
    """The static inputs of an encoder's graphs.

    A budget counts what an image takes of a graph: tiles, or patches. `size` is never less than that, and where a graph
    has room for so many of several things, images whose sizes fit together fit in each of them.

    Attributes:
        module: what is captured; it is called with what `static` gives.
        budgets: of the graphs to capture where a user names none.
    """

    module: nn.Module
    budgets: tuple[int, ...]

    def check(self, images: Sequence[Any]) -> None:
        """Raise TypeError or ValueError, with the index, for what is no image of this encoder."""

    def check_budgets(self, budgets: Sequence[int]) -> None:
        """Raise ValueError for an increasing budget that no batch can have."""

    def size(self, image: Any) -> int:
        """What an image takes of a budget."""

    def allocate(self, largest: int) -> None:
        """Make the memory that the graphs of all budgets read, up to the largest, filled with what does no harm."""

    def static(self, budget: int) -> tuple[Tensor, ...]:
        """The arguments of the module in the graph of a budget, views of the memory that all graphs share."""

    def fill(self, budget: int, images: Sequence[Any]) -> None:
        """Write images into `static(budget)`, and make what is left of it inert, whatever an earlier batch left there.

        Inert padding changes no bit of what the module gives for the images but by the shapes of matrix products.
        """

    def uncaptured(self, images: Sequence[Any]) -> Tensor:
        """The features of images that no graph takes, in one call of the model."""

    def split(self, features: Tensor, images: Sequence[Any]) -> list[Tensor]:
        """The features of each image; those behind the last one are of the padding, and dropped."""
