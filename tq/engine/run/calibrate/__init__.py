"""Calibration: run a model over a text, one weight matrix in memory at a time, and see what its matrices read."""
