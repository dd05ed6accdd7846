"""Error measures: images against photographs, meshes against the true surface. Independent of the networks."""
