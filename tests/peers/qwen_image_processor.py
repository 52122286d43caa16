"""The suite of Qwen's image processor, of a checkout of transformers, on `patch_image`: a file for pytest."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.peers.suite_loading import TRANSFORMERS, cases_of, load_transformers_tests

load_transformers_tests(Path(os.environ["PEERS_TRANSFORMERS"]))
_suite = importlib.import_module(f"{TRANSFORMERS}.models.qwen2_vl.test_image_processing_qwen2_vl")
globals().update(dict(cases_of(_suite)))


@pytest.fixture(scope="session", autouse=True)
def our_patches() -> Iterator[None]:
    """transformers' checks and conversions of its arguments stay; resize, normalisation and patches are ours."""
    if os.environ["PEERS_RUN"] == "stock":
        yield
        return
    from transformers import Qwen2VLImageProcessor

    from tests.peers.patch_image_shim import preprocess

    with mock.patch.object(Qwen2VLImageProcessor, "_preprocess", preprocess):
        yield
