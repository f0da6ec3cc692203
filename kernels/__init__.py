"""Array code: NumPy definitions and the compiled kernels that must equal them.

`storage`, `table` and `reference` need NumPy alone.  `cast`, `reduce` and `pack` import Numba, so
import them where they are first needed, not at the head of a module that everyone loads.
"""

__all__ = ["cast", "pack", "reduce", "reference", "storage", "table"]
