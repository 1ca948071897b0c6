"""The lab: the papers' controlled experiments, and their proofs as running weights."""
