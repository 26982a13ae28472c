"""The configuration of a run: typed, strict, and checked before heavy imports."""

from chorus.config.keys import Config, RunConfig, on_resume
from chorus.config.load import load_config, render

__all__ = ["Config", "RunConfig", "load_config", "on_resume", "render"]
