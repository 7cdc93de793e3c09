"""Mixtures of experts: the feed-forward layer of a block as many small ones, of which a router takes a few a token."""
