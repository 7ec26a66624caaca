"""One file a runtime, all behind one protocol."""
