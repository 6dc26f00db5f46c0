"""Rounding of a weight to its grid: pure functions (weight, scheme, stats, rows) -> QuantizedWeight.

To add one: one file, one line in ms_pangu_quant.recipe.parse.QUANTIZERS, a golden and a recipe.
"""
