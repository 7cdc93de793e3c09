"""What does not show on the data of one machine: 10^5 shards, 10^13 tokens, a million batches."""
