"""What the ray tracer stands on. Nothing here knows of networks, scenes or files."""
