"""TensorRT engines and Inductor packages: build, describe and check them.

``backend`` gives TensorRT 10, TensorRT 11 and TensorRT for RTX one interface; ``compatibility``
lists what each cannot build and where a plan does not run; ``build`` builds a plan by running
``worker`` in a subprocess; ``messages`` maps TensorRT's errors to causes and remedies;
``sidecar`` reads and verifies the JSON file next to each plan; ``inspect`` describes a plan;
``fleet`` builds the engines of bundles, locally or on Ray; ``inductor`` compiles packages with
PyTorch.
"""
