"""A run on one page. Needs no torch."""
