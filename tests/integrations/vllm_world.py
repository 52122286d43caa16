"""What vLLM's layers want around them where no engine runs: a configuration, and a world of one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock


@contextmanager
def one_worker(folder: Path) -> Iterator[None]:
    """Where vLLM's parallel layers can be made.

    Args:
        folder: an empty one, for the file by which processes would meet.
    """
    from vllm import distributed
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        distributed.init_distributed_environment(1, 0, f"file://{folder / 'store'}", 0, backend="gloo")
        distributed.initialize_model_parallel()
        yield
    distributed.cleanup_dist_env_and_memory()


@contextmanager
def attention_of(whose: str) -> Iterator[None]:
    """vLLM's layers that are made within take vLLM's attention ("vllm") or ours ("ours")."""
    from vit_encoder.integrations.vllm import attention
    from vllm.model_executor.custom_op import op_registry_oot

    with mock.patch.dict(op_registry_oot):
        op_registry_oot.pop(attention.NAME, None)
        if whose == "ours":
            assert attention.swap_in() is None
        yield
