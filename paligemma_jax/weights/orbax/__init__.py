"""Our own format: an Orbax folder and a config.json."""
