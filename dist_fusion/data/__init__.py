"""Shards in, pair batches out. The only room that knows webdataset, Pillow and the tokenizer."""
