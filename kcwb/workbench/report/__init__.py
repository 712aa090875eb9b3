"""Notebooks as reports of one file."""
