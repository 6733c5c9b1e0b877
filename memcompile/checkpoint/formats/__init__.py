"""The files: DCP's, read by rectangles, and safetensors."""
