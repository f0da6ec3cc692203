"""Data-parallel and pipeline training on top of comm."""
