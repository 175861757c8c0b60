"""The way from bytes of inputs to computed buffers: engines, lanes of workers, and the pool that runs them."""
