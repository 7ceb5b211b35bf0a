"""Theory of embedding spaces: bounds and constructions."""
