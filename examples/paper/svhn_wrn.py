"""SVHN with WRN-28-10: 100 epochs, AutoAugment and Cutout, the relative flatness of the head.

python examples/paper/svhn_wrn.py                 # published settings
python examples/paper/svhn_wrn.py --strength 0    # the baseline, all else equal
python examples/paper/svhn_wrn.py --smoke         # a few steps on generated images
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import wrn


def main(arguments: Sequence[str] | None = None) -> common.Log:
    return wrn.main(
        "svhn", __doc__, arguments, falls=(0.3, 0.6, 0.8), epochs=100, batch=128, lr=0.1, strength=0.2
    )


if __name__ == "__main__":
    main()
