"""C: shards and their index."""
