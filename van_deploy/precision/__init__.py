"""Precision written into the graph: FP16 types, and INT8 as explicit Q/DQ."""
