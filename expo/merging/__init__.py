"""The merge from files to files: the job, its coordinator, the workers of each rank, and the result."""
