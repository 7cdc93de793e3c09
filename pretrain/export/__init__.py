"""Models for the `transformers` library, and from it."""
