"""From a float checkpoint to a quantized one: loop.py is the whole method, and read first."""
