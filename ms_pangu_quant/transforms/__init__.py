"""Rewrites of a block that leave its function unchanged and make it easier to round.

A transform takes a block, the statistics of its inputs and the schemes of its layers, and returns block and statistics,
rewritten. To add one: one file, one line in recipe.parse.TRANSFORMS, a golden and a recipe. A rewrite that needs no
statistics but the whole checkpoint (rotate) takes a reader and returns one; its table is REWRITES in rotate.py.
"""
