"""The files: DCP's, of which rectangles are read, and safetensors."""
