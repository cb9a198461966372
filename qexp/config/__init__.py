"""Settings: every dataclass that no plugin declares, and the yaml files in conf/. Light: nothing here imports torch."""
