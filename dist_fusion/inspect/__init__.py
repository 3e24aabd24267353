"""What is in some shards, for people to see before they train: counts, and samples as a model would see them."""
