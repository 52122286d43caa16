"""Mixes of image sizes, (width, height) in pixels with the probability of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mix:
    """Sizes that images are drawn from, independently.

    Attributes:
        source: where it comes from, or that it is made up.
        sizes: (width, height) -> probability.
    """

    name: str
    source: str
    sizes: dict[tuple[int, int], float]


def _uniform(*sizes: tuple[int, int]) -> dict[tuple[int, int], float]:
    return dict.fromkeys(sizes, 1 / len(sizes))


COMMON = Mix(
    "common",
    "made up, not measured: usual resolutions of the web, screens, cameras and scanned pages, each as likely",
    _uniform(
        # pictures of web pages and of data sets
        *((224, 224), (256, 256), (320, 240), (400, 300), (480, 360), (500, 375), (512, 512), (600, 400), (640, 360)),
        *(
            (640, 427),
            (427, 640),
            (640, 480),
            (480, 640),
            (768, 512),
            (768, 768),
            (800, 600),
            (1024, 768),
            (1024, 1024),
        ),
        *((1080, 1080), (1080, 1350), (1200, 630), (1600, 900)),
        # screens
        *((1280, 720), (1366, 768), (1440, 900), (1920, 1080), (2560, 1440), (390, 844), (412, 915), (1080, 2400)),
        *((1170, 2532), (1290, 2796), (768, 1024)),
        # cameras
        *(
            (1600, 1200),
            (2048, 1536),
            (3264, 2448),
            (4000, 3000),
            (3000, 4000),
            (4032, 3024),
            (3024, 4032),
            (6000, 4000),
        ),
        # A4 and US letter at 72, 100, 150, 200 and 300 dots an inch
        *((595, 842), (827, 1169), (1240, 1754), (1654, 2339), (2480, 3508)),
        *((612, 792), (850, 1100), (1275, 1650), (1700, 2200), (2550, 3300)),
    ),
)
VLLM = Mix(
    "vLLM's benchmark",
    "vLLM 0.32, vllm/benchmarks/datasets/datasets.py: RandomMultiModalDataset.DEFAULT_MM_ITEM_BUCKET_CONFIG",
    {(256, 256): 0.5, (1280, 720): 0.5},
)
MIXES = (COMMON, VLLM)
