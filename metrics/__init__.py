"""How good a result is: images against photographs, meshes against the true surface. Neither knows of networks."""
