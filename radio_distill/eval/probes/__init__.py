"""Heads that are trained on frozen features, and the loop that trains them."""
