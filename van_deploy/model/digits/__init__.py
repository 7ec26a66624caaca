"""Data: the trained network ``van_digits`` and the handwritten digits it was made from."""
