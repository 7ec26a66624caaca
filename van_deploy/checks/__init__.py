"""Whether an artefact still is the network it was made from."""
