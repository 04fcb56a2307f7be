"""What the model is shown and what it says: volumes, prompts, cached features, engines."""
