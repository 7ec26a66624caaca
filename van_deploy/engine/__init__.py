"""Engines: from an ONNX file to a TensorRT plan, and everything that vouches for the plan.

``backend`` is TensorRT 10, 11 and TensorRT for RTX behind one face; ``compatibility`` says what
each of them cannot build, and where a plan does not run; ``source`` looks at the ONNX file
first; ``build`` runs ``worker`` in a process of its own; ``catalogue`` explains what TensorRT
said; ``sidecar`` guards the plan afterwards; ``inspect`` describes one; ``fleet`` says which
engines are asked for, ``bundled`` and ``on_ray`` build them; ``inductor`` compiles packages with
PyTorch instead.
"""
