"""The plan of a merge, without any input or output: pairs of tensors, each tensor's fate, files, bytes."""
