"""Django's settings for the chat: no database, no sessions, no accounts."""

from __future__ import annotations

import os
import secrets

# Nothing here is signed, so a key which lasts as long as the process will do.
SECRET_KEY = os.environ.get("SECRET_KEY") or secrets.token_urlsafe()
DEBUG = os.environ.get("DEBUG") == "1"
ALLOWED_HOSTS = os.environ.get("ALLOWED_HOSTS", "127.0.0.1,localhost,[::1]").split(",")

INSTALLED_APPS = ["channels", "django.contrib.staticfiles", "chat"]
MIDDLEWARE = ["django.middleware.security.SecurityMiddleware"]
ROOT_URLCONF = "chat.urls"
ASGI_APPLICATION = "chat.asgi.application"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
STATIC_URL = "/static/"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True

CHANNEL_LAYERS = {
    "default": {
        "BACKEND": "channels_rabbitmq.core.RabbitmqChannelLayer",
        "CONFIG": {
            "host": os.environ.get("RABBITMQ_URL", "amqp://guest:guest@127.0.0.1"),
        },
    },
}

# The chat's own: where its server processes answer, so that the page can link to the others.
CHAT_ADDRESSES = os.environ.get("CHAT_ADDRESSES", "").split()
CHAT_ROOMS = ["lobby", "kitchen", "library"]
