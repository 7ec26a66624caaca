"""Lets ``python -m van_deploy`` do what ``van-deploy`` does."""

from __future__ import annotations

from van_deploy.cli.app import main

main()
