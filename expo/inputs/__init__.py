"""Open the two checkpoints that a user names: by paths, hub ids or a recipe; aligned may be an adapter."""
