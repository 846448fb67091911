"""What a merge of files writes: a whole model in shards, or an adapter; checked before it gets its name."""
