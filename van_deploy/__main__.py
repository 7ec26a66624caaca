"""Runs ``van-deploy`` as ``python -m van_deploy``."""

from van_deploy.cli.app import main

main()
