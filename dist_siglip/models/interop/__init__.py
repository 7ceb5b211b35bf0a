"""Models of transformers, open_clip and ONNX: in and out."""
