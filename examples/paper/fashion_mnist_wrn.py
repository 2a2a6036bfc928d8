"""FashionMNIST with WRN-28-10: 200 epochs, Cutout, the relative flatness of the head.

python examples/paper/fashion_mnist_wrn.py                 # published settings
python examples/paper/fashion_mnist_wrn.py --strength 0    # the baseline, all else equal
python examples/paper/fashion_mnist_wrn.py --smoke         # a few steps on generated images
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import wrn


def main(arguments: Sequence[str] | None = None) -> common.Log:
    return wrn.main(
        "fashion_mnist",
        __doc__,
        arguments,
        falls=(0.4, 0.6, 0.8),
        epochs=200,
        batch=64,
        lr=0.05,
        strength=0.1,
    )


if __name__ == "__main__":
    main()
