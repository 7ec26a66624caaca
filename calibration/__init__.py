"""Calibration sets: which images the ranges of INT8 tensors are recorded on."""
