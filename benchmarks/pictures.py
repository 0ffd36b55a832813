"""Draw again what results files alone allow: quality against bytes of all comparisons, and of stored forms.

    python benchmarks/pictures.py

The pictures of routers and layers are drawn by their own benchmarks, which have the single requests.
"""

import codec_plot
import quality
import rates_plot
import record
from sections import COMPARISONS

from mergekit_mediator.cli.plots import plot_quality


def main() -> None:
    quality.main()
    codec_plot.main()
    rates_plot.main()
    for name in COMPARISONS:
        plot_quality(record.read(name)["systems"], record.RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
