"""plan(): detect, place, rehearse, install."""
