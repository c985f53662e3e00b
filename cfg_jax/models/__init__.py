"""The networks, and weights that were published: the room that knows Flax modules."""
