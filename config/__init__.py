"""Configurations: the keys and their checks (settings.py), and files to copy (*.yaml)."""
