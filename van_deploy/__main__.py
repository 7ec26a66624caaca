"""Runs ``van-deploy`` as ``python -m van_deploy``."""

from __future__ import annotations

from van_deploy.cli.app import main

main()
