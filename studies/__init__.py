"""Small reproductions of the methods' claims: one module each, started as ``python -m studies.NAME``."""
