"""Circuits: which units of a network carry a class score, read out and tested by ablation."""
