"""Django's settings for all programs here; the tests name the broker."""

from __future__ import annotations

import json
import os

SECRET_KEY = "nothing here is secret"
ALLOWED_HOSTS = ["127.0.0.1"]
INSTALLED_APPS = ["daphne", "channels", "mysite"]  # daphne brings its runserver
ROOT_URLCONF = "mysite.urls"
ASGI_APPLICATION = os.environ.get("SITE_APPLICATION", "mysite.asgi.application")
# Channels' live server looks into TEST.
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": ":memory:",
        "TEST": {"NAME": None},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"stderr": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
}

_LAYER = {
    "BACKEND": "channels_rabbitmq.core.RabbitmqChannelLayer",
    "CONFIG": {
        "host": os.environ["LAYER_HOST"],
        "groups_exchange": os.environ["LAYER_EXCHANGE"],
        **json.loads(os.environ.get("LAYER_CONFIG", "{}")),
    },
}
CHANNEL_LAYERS = {"default": _LAYER, "second": _LAYER}
