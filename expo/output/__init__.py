"""Write computed buffers to durable files: direct writes, staging folders, atomic renames, the journal."""
