"""How fast each artefact is, measured so that the numbers can be believed."""
