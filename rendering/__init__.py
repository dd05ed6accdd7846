"""What a camera sees of an sdf and its renderer, as images."""
