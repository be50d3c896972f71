"""Converts models to the formats of other programs, ONNX, open_clip and GGUF, and back from open_clip."""
