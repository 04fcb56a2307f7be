"""The small stand-in base model: how it is built and trained. Real users name a downloaded checkpoint instead."""
