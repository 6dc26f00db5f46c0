"""What is run from a checkout of the repository and is not installed.

At the top stand thin mains of `pangu-quant`. embedded/ makes the embedded checkpoints and their data; peers/ holds other
tools beside this project; goldens/ makes the goldens of the tests; ascend/ is for a machine with an NPU, or predicts one;
dev/ is for work on this project.
"""
