"""Plan a merge: pair the tensors, decide what happens to each, and lay out the output's files and bytes.

All modules of this package are pure: they read and write no file, and load neither NumPy nor torch.
"""
