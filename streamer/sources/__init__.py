"""Where samples come from: files, folders, packed shards and object storage, found by name or by place."""
