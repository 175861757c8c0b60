"""The way from the words that a user typed to two opened checkpoints: paths, hub ids, recipes, adapters."""
