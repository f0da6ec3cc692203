"""Array kernels for reduction, packing and casting."""
