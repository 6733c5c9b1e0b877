"""Values for inference, in a file or in the CPU's memory."""
