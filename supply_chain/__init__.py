"""Maintenance of the project: pinned versions, known vulnerabilities, and generated reference."""
