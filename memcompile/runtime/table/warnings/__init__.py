"""What the log says of a training whose memory learns little or not at all."""
