"""Evaluation results -> one page that says what quantization costs, as HTML and as Markdown."""
