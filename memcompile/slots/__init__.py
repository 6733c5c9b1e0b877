"""Single slots: which are read, which may learn, what they hold, and how they travel without the model."""
