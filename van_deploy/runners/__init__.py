"""One file a run time, all behind one protocol."""
