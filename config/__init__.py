"""What a run may be told: every key of a configuration (settings.py), and configurations to copy (*.yaml)."""
