"""Rewrites of a block that leave its function unchanged and make it easier to round.

A transform takes a block and the statistics of its inputs and returns both, rewritten. To add one: one file, one line in
ms_pangu_quant.recipe.TRANSFORMS, a golden and a recipe.
"""
