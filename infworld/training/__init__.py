"""Procedural worlds, walks through them, action labels, and the programs that train on them."""
