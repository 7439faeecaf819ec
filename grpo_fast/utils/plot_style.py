"""The palette and line styles that every figure of the package uses. It needs no plotting library."""

from __future__ import annotations

__all__ = ["COLOURS", "LINE_STYLES"]

# Okabe and Ito's palette, whose colours remain distinct with colour-vision deficiency. Further curves differ in line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
