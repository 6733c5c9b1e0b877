"""The state of a model and of optimizers by names: what is saved, and how it is put back."""
