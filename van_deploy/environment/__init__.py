"""What this machine has: packages, processor, memory, GPUs, and what clashes."""
