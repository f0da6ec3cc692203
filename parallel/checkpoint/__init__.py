"""Checkpoints that fit every grid: one safetensors file per rank, and one manifest.

errors, values (JSON), manifest, files, partial and store (folders) hold what needs one process;
state takes objects apart and puts them together; session is what the ranks do together.
"""
