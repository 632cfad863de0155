"""Metal kernels as text files, and how each one is launched. They know arrays and bits, nothing of models."""
