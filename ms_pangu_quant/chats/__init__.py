"""Calibration text that a checkpoint writes itself: its own answers, thoughts included, to prompts."""
