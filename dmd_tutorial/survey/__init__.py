"""The other methods on the road to one step, each a loss and a step on top of the core."""
