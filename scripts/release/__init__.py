"""Builds what a release consists of: sdist, wheel and a Debian package."""
