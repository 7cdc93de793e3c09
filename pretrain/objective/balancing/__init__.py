"""Balancing of experts: losses on what a router does, and the bias that balances without a loss."""
