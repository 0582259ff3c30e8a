"""A daemon is started, upgraded, hurt, drained and ended."""
