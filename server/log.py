"""Where log lines go and how they look. Knows logger names only."""

from __future__ import annotations

import logging.config


def configure_logging(level: str) -> None:
    """One line per event, to stderr."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"format": "%(asctime)s %(levelname)-7s %(message)s"}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
            "loggers": {
                "quire": {"level": level.upper(), "handlers": ["stderr"], "propagate": False},
                "engine": {"level": level.upper(), "handlers": ["stderr"], "propagate": False},
                # Its notes on bad requests are a client's doing; ours say the same in the access log.
                "uvicorn.error": {"level": "ERROR", "handlers": ["stderr"], "propagate": False},
            },
        }
    )
