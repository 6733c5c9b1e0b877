"""What is trained, as ordinary PyTorch."""
