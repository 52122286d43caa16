"""An extension of vLLM's workers that tells how long the vision encoder takes.

`vllm serve --worker-extension-cls experiments.vllm.timer.EncoderTimer`; its method is then callable on every
worker. vLLM 0.32 has such times too (`enable_mm_processor_stats`), but no argument of `vllm serve` turns them on.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch


class EncoderTimer:
    """Mixed into the worker, whose `model_runner` holds the model."""

    model_runner: Any

    def encoder_seconds(self) -> dict[str, float]:
        """Seconds spent in `embed_multimodal` since the last question; the first one starts the clock.

        The device is waited for before and after each call, so that its time is the encoder's own.
        """
        model = self.model_runner.get_model()
        if not hasattr(model, "_encoder_clock"):
            model._encoder_clock = {"seconds": 0.0, "calls": 0}
            model.embed_multimodal = _timed(model.embed_multimodal, model._encoder_clock)
        measured = dict(model._encoder_clock)
        model._encoder_clock.update(seconds=0.0, calls=0)
        return measured


def _timed(encode: Any, clock: dict[str, float]) -> Any:
    @functools.wraps(encode)
    def timed(*args: Any, **kwargs: Any) -> Any:
        _synchronise()
        start = time.perf_counter()
        try:
            return encode(*args, **kwargs)
        finally:
            _synchronise()
            clock["seconds"] += time.perf_counter() - start
            clock["calls"] += 1

    return timed


def _synchronise() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
