"""What this project is made of: pinned versions, lowest versions, known vulnerabilities."""
