"""Runners: one module for each runtime, all with the same interface."""
