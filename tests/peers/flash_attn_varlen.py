"""flash-attn's tests of variable lengths on `varlen_attention`: a file for pytest, run by `python -m tests.peers`."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import torch

from tests.peers.flash_attn_shim import install
from tests.peers.suite_loading import load_file, narrow_parameters

_FOLDER = Path(os.environ["PEERS_FLASH_ATTN"])
_ON_GPU = torch.cuda.is_available()
# On a CPU flash-attn's reference takes seconds a test of longer sequences.
_LONGEST = 2**31 if _ON_GPU else 256

install(_FOLDER)
with mock.patch("torch.cuda.get_device_capability", torch.cuda.get_device_capability if _ON_GPU else lambda _: (8, 0)):
    _suite = load_file(
        "flash_attn_tests",
        _FOLDER / "tests/test_flash_attn.py",
        {} if _ON_GPU else {'device = "cuda"': 'device = "cpu"'},
    )

test_flash_attn_varlen_output = _suite.test_flash_attn_varlen_output
test_flash_attn_varlen_qkvpacked = _suite.test_flash_attn_varlen_qkvpacked
test_flash_attn_bwd_varlen_overflow = _suite.test_flash_attn_bwd_varlen_overflow
test_flash_attn_varlen_deterministic = _suite.test_flash_attn_varlen_deterministic

for _test in (
    test_flash_attn_varlen_output,
    test_flash_attn_varlen_qkvpacked,
    test_flash_attn_bwd_varlen_overflow,
    test_flash_attn_varlen_deterministic,
):
    # What varlen_attention has not is left out before it is drawn: the shim refuses it, in thousands of combinations.
    narrow_parameters(
        _test,
        {
            "causal": lambda value: not value,
            "local": lambda value: not value,
            "alibi": lambda value: not value,
            "softcap": lambda value: not value,
            "dropout_p": lambda value: not value,
            "deterministic": lambda value: value,
            "seqlen": lambda value: value <= _LONGEST,
            "seqlen_q,seqlen_k": lambda value: max(value) <= _LONGEST,
        },
    )
if not _ON_GPU:
    # It takes 51 backward passes a test.
    narrow_parameters(test_flash_attn_varlen_deterministic, {"d": lambda value: value in (40, 128)})
