"""E: chat templates and conversations."""
