"""Engines: from an ONNX file to a TensorRT plan, and everything that vouches for the plan.

``options`` says what can be asked for; ``backend`` is TensorRT 10, 11 and TensorRT
for RTX behind one face; ``refusals`` what each of them cannot do; ``source`` looks
at the ONNX file first; ``build`` runs ``worker`` in a process of its own;
``catalogue`` explains what TensorRT said; ``sidecar`` and ``compatibility`` guard
the plan afterwards; ``inspect`` describes one; ``bundled`` and ``fleet`` build many.
"""
