"""What is saved of a model and of an optimizer, by name, and the way back."""
