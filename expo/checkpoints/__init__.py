"""A read-only view of checkpoints on the disk: headers, names, readers of bytes, adapters, and the files beside them."""
