"""The only code that formats results: tables for a terminal, and files for people."""
