"""Settings that belong to no single plugin, as frozen dataclasses, and the yaml files in conf/. Light: no torch."""
