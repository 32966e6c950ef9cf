"""Vision families: InternVL, and a fake one."""
