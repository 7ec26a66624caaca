"""Recipes: how each variant is deployed, one TOML file a variant."""
