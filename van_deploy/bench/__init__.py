"""How fast each artifact is, measured so that the numbers can be believed."""
