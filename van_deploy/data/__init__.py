"""Images and their labels: read alike by quantize, evaluate, predict, serve and the checks."""
