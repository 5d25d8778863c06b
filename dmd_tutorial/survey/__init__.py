"""The methods of Part II, each a loss and a step, and one table that compares them."""
