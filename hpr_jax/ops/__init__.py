"""Array operations: sampling, RoIAlign, boxes, non-maximum suppression, padding. No parameters, no modules."""
