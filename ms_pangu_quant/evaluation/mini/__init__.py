"""The embedded checkpoint's own problems: generated Python functions of one to five steps."""
