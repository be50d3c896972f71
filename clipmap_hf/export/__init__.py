"""Models in the formats of other programs: ONNX, open_clip, GGUF."""
