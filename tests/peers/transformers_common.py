"""transformers' common tests of a model, on small vision encoders: a file for pytest, run by `python -m tests.peers`.

The source distribution of transformers holds the common tests, but not the models' own testers: these are ours.
"""

from __future__ import annotations

import os
import unittest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.llama4.configuration_llama4 import Llama4VisionConfig
from transformers.models.llama4.modeling_llama4 import Llama4VisionModel
from transformers.models.pixtral.configuration_pixtral import PixtralVisionConfig
from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from tests.peers.suite_loading import TRANSFORMERS, load_transformers_tests

load_transformers_tests(Path(os.environ["PEERS_TRANSFORMERS"]))
# transformers leaves these two the default of language models, and its tests take the inputs by this name.
Llama4VisionModel.main_input_name = "pixel_values"
Qwen2_5_VisionTransformerPretrainedModel.main_input_name = "hidden_states"
common: Any = __import__(f"{TRANSFORMERS}.test_modeling_common", fromlist=["ModelTesterMixin"])


class Tester:
    """What the common tests ask about a model."""

    batch_size = 3
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 2
    intermediate_size = 48
    num_channels = 3
    patch_size = 4
    image_size = 16
    seq_length = 16
    is_training = True

    def sizes(self) -> dict[str, int]:
        """The names that most configurations share."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
        return {name: getattr(self, name) for name in (*names, "patch_size", "image_size")}

    def config(self) -> Any:
        """A configuration of the model."""
        raise NotImplementedError

    def inputs(self) -> dict[str, Tensor]:
        """What its forward takes."""
        shape = (self.batch_size, self.num_channels, self.image_size, self.image_size)
        return {"pixel_values": common.floats_tensor(shape)}

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        """transformers' name."""
        return self.config(), self.inputs()


class Llama4Tester(Tester):
    seq_length = 17
    intermediate_size = 128

    def config(self) -> Any:
        """Heads of 16 channels, and the position embedding's one class token."""
        return Llama4VisionConfig(
            **self.sizes(), projector_input_dim=32, projector_output_dim=32, vision_output_dim=32,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )  # fmt: skip


class QwenTester(Tester):
    patch_size = 14
    batch_size = 2
    seq_length = 48

    def config(self) -> Any:
        """Windows of 2 x 2 units, and one layer with full attention."""
        return Qwen2_5_VLVisionConfig(
            depth=self.num_hidden_layers, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size,
            num_heads=self.num_attention_heads, out_hidden_size=32, window_size=56, fullatt_block_indexes=[1],
        )  # fmt: skip

    def inputs(self) -> dict[str, Tensor]:
        """Two images of 6 x 4 patches: a batch is the images' patches one after the other."""
        grid = torch.tensor([[1, 6, 4]] * self.batch_size)
        return {"hidden_states": common.floats_tensor((24 * self.batch_size, 3 * 2 * 14 * 14)), "grid_thw": grid}


class SiglipTester(Tester):
    def config(self) -> Any:
        """No class token."""
        return SiglipVisionConfig(**self.sizes())


class ClipTester(Tester):
    seq_length = 17

    def config(self) -> Any:
        """A class token first."""
        return CLIPVisionConfig(**self.sizes(), projection_dim=32)


class PixtralTester(Tester):
    seq_length = 48

    def config(self) -> Any:
        """Heads of 16 channels, rotated in two dimensions."""
        return PixtralVisionConfig(**self.sizes())

    def inputs(self) -> dict[str, Tensor]:
        """The images are one sequence of patches, and a mask that keeps them apart."""
        sizes = torch.tensor([[self.image_size, self.image_size]] * self.batch_size)
        return super().inputs() | {"image_sizes": sizes}


class VisionTests(common.ModelTesterMixin):
    """The common tests of an encoder without text: it embeds no tokens."""

    test_resize_embeddings = False
    make_tester: type[Tester]

    def setUp(self) -> None:
        """A tester for each test."""
        self.model_tester = self.make_tester()


class Llama4VisionTest(VisionTests, unittest.TestCase):
    all_model_classes = (Llama4VisionModel,)
    make_tester = Llama4Tester


class Qwen25VLVisionTest(VisionTests, unittest.TestCase):
    all_model_classes = (Qwen2_5_VisionTransformerPretrainedModel,)
    make_tester = QwenTester


class SiglipVisionTest(VisionTests, unittest.TestCase):
    all_model_classes = (SiglipVisionModel,)
    make_tester = SiglipTester


class ClipVisionTest(VisionTests, unittest.TestCase):
    all_model_classes = (CLIPVisionModel,)
    make_tester = ClipTester


class PixtralVisionTest(VisionTests, unittest.TestCase):
    all_model_classes = (PixtralVisionModel,)
    make_tester = PixtralTester
