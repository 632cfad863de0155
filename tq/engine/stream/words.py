"""Stored bytes of one expert as the arrays that kernels read: types of numbers, and words of another bit layout.

In NumPy, because the threads that read run it, and in no order with MLX's own work.
"""

import numpy as np

FLOATS = ("F32", "F16", "BF16")
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32}  # bfloat16: its bits


def converted(values: np.ndarray, stored: str, wanted: str) -> np.ndarray:
    """Numbers of one of FLOATS as another one, rounded to nearest as MLX does; bfloat16 as its bits."""
    if stored == wanted:
        return values
    wide = (values.astype(np.uint32) << 16).view(np.float32) if stored == "BF16" else values.astype(np.float32)
    if wanted != "BF16":
        return wide.astype(NUMPY[wanted])
    bits = wide.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def to_stream(words: np.ndarray, used: int, n_words: int) -> np.ndarray:
    """uint32 words (rows, any) that hold ``used`` bits each as one bit stream (rows, n_words).

    The same as ``_to_stream`` of tq.engine.model.turboquant, which says why.
    """
    if used == 32:
        return words
    step = 32 - used
    per_block = 32 // step
    rows, n = words.shape
    blocks = np.zeros((rows, -(-n // per_block), per_block), np.uint32)
    blocks.reshape(rows, -1)[:, :n] = words & np.uint32(2**used - 1)
    shift = np.arange(used // step, dtype=np.uint32) * np.uint32(step)
    stream = (blocks[..., :-1] >> shift) | (blocks[..., 1:] << (np.uint32(used) - shift))
    return np.ascontiguousarray(stream.reshape(rows, -1)[:, :n_words])
