"""Addresses of pages and of websockets."""

from __future__ import annotations

from django.urls import path, register_converter

from chat import views
from chat.consumers import ChatConsumer
from chat.rooms import RoomConverter

register_converter(RoomConverter, "room")

urlpatterns = [
    path("", views.index),
    path("room/<room:room>/", views.room, name="room"),
]

websocket_urlpatterns = [
    path("ws/<room:room>/", ChatConsumer.as_asgi()),
]
