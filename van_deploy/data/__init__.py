"""Images and their labels, read the same way by every command."""
