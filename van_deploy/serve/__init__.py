"""From a bundle to something that answers: prediction, Triton's files, a small server."""
