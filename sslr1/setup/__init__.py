"""From a configuration to everything it names, or to a plan of what that takes."""
