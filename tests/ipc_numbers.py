"""What ranks send each other in jobs on GPU memory: it differs by rank and by element."""

import numpy as np


def numbers(rank: int, count: int) -> np.ndarray:
    """Return whole numbers, exact in float32."""
    return (np.arange(count) * (rank + 3) % 1009).astype(np.float32)
