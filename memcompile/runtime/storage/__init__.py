"""Where values come from: drawn anew, or, for inference, in a file or in the CPU's memory."""
