"""The configuration of a run: typed, strict, and checked before heavy imports."""

from chorus.config.keys import Config, RunConfig, on_resume
from chorus.config.load import as_settings, load_config, render

__all__ = ["Config", "RunConfig", "as_settings", "load_config", "on_resume", "render"]
