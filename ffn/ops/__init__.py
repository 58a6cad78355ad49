"""Functions on tensors: no weights, no modules."""
