"""How long the sample loop takes, and how much memory it holds."""
