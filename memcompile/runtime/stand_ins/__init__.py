"""What a model's own code finds in the place of an FFN's parameters."""
