"""A read-only view of checkpoints on the disk: headers, names, bytes, adapters, and the files beside them."""
