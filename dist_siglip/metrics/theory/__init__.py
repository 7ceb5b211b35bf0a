"""What theory says of an embedding space: bounds, constructions, guarantees."""
