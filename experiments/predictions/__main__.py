"""What the roofline predicts for kernels that others measured, how far off it is, and what ours would take.

FlashAttention 3 and 4, TensorRT-LLM's attention and matrix products were measured by others on H100, H200 and B200;
the rows are committed beside this file. The roofline's interval is held against them as it is. Then a model with a
launch, waves of tiles and efficiencies is fitted to FlashAttention 3 on an H100 at head_dim 64 and 80, and judged on
what it was not fitted to. Last, our attention at the sizes of the measured peer: the time if our kernel reached the
peer's efficiency. Nothing of ours was run on a GPU.
"""

from __future__ import annotations

import os
import sys

from experiments.common import cli
from experiments.predictions import attention, measured, ours, report
from experiments.predictions.figure import draw
from experiments.predictions.text import markdown


def main(arguments: list[str] | None = None) -> int:
    """Fit, judge, print the tables, write the files and return the exit status."""
    parser = cli.parser("python -m experiments.predictions", __doc__)
    cli.add_out(parser, "JSON, the tables and the figure")
    options = parser.parse_args(arguments)
    rows, products = measured.attention(), measured.products()
    efficiency = attention.calibrate(rows)
    product_efficiencies, by_kernel, by_size = report.product_groups(products)
    flash = [row for row in rows if row.is_flash_attention]
    judged = sorted((row for row in flash if not attention.is_fitted(row)), key=lambda row: row.length)
    result = cli.result(
        "predictions",
        source=measured.SOURCE,
        efficiency=efficiency,
        held_out=report.held_out(rows, efficiency),
        attention=report.attention_groups(
            rows, efficiency, lambda row: {"gpu": row.gpu, "engine": row.engine, "head_dim": row.head_dim}
        ),
        attention_sizes=report.attention_groups(
            judged, efficiency, lambda row: {"length": row.length, "head_dim": row.head_dim}
        ),
        product_efficiencies=product_efficiencies,
        products=by_kernel,
        product_sizes=by_size,
        ours=ours.as_json(ours.beside(rows, efficiency, cli.COMMITTED / "kernel_report.json")),
    )
    plain = cli.plain(result)
    text = markdown(plain)
    cli.write_json(options.out / "predictions.json", result)
    (options.out / "predictions.md").write_text(text, encoding="utf-8")
    draw(rows, efficiency, plain, options.out / "predictions.png")
    console = cli.console(markup=False)
    console.print(text, soft_wrap=True)
    console.print(f"wrote predictions.json, .md and .png to {options.out}")
    return 0


if __name__ == "__main__":
    # Read when Triton is first imported, which nothing above has done.
    os.environ["TRITON_INTERPRET"] = "1"
    sys.exit(main())
