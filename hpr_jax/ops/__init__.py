"""Array operations: sampling, RoIAlign, attention, convolution, boxes, NMS, padding. No parameters, no modules."""
