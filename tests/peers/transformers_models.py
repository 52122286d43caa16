"""The models' own suites of a checkout of transformers: a file for pytest, run by `python -m tests.peers`."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from tests.peers.suite_loading import TRANSFORMERS, cases_of, load_transformers_tests

_MODELS = ("llama4", "qwen2_5_vl", "siglip", "clip", "pixtral")

load_transformers_tests(Path(os.environ["PEERS_TRANSFORMERS"]))
for _model in _MODELS:
    _suite = importlib.import_module(f"{TRANSFORMERS}.models.{_model}.test_modeling_{_model}")
    globals().update({f"{_model}_{name}": case for name, case in cases_of(_suite)})
