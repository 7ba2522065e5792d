"""COCO-format data: annotations, geometry, the plan of batches, loading. NumPy and OpenCV; no model, no loss."""
