"""From what data sets really ship to shards: one small file a data set, and what makes shards of any of them."""
