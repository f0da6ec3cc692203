"""Means of moving bytes between ranks, behind one protocol."""
