"""`dist-fusion demo`: the whole method on real data, at a size two CPU cores train in minutes."""
