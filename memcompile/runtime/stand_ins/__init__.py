"""What runs where an FFN's parameters were."""
