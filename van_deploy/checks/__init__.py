"""Whether an artifact still is the network it was made from."""
